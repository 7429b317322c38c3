"""The cost model, its fit to the records, profiles, plans and their commands."""

import dataclasses
import itertools
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from pi_dist.cli import main
from pi_dist.config import PRESETS, Config, ConfigError, ParallelConfig, TrainingConfig, UserError
from pi_dist.measure import calibrate, kernel_bench
from pi_dist.measure.cost_model import exchanged_bytes
from pi_dist.measure.plan import describe, make_plan
from pi_dist.measure.profile import (
    NETWORKS,
    Network,
    attention_costs,
    constants,
    load_profile,
    profile_names,
    write_profile,
)
from pi_dist.measure.record import kept_records
from pi_dist.measure.savings import Terms, config_of
from pi_dist.measure.step_model import (
    communication_seconds,
    compute_seconds,
    gpu_seconds,
    memory,
    num_parameters,
    state_bytes,
    step_time,
    work,
)
from pi_dist.measure.steps import PAPER, model_of, random_batch
from pi_dist.measure.timeline import counted_bytes
from pi_dist.measure.workers import OUT_OF_MEMORY
from pi_dist.model.transformer import PiTransformer
from pi_dist.ops.pattern import layer_patterns, looks_beyond_a_chunk
from pi_dist.parallel import exchange_plan
from pi_dist.parallel.mesh import make_mesh
from pi_dist.training.streaming import streamed_losses

H100 = load_profile("H100")
STEPS = {"H200": ("step_h200", "sp_h200", "sp_four_h200"), "H100": ("step_h100", "step_large_h100")}


def job(method="pi", context=131072, num_gpus=1, streamed=False, preset="small", **terms):
    return config_of(preset, method, streamed, context, num_gpus, Terms(**terms))


@pytest.mark.parametrize("gate", ["dynamic", "static", "none"])
@pytest.mark.parametrize("method", ["pi", "window", "ring", ["pi", "dense"]])
def test_parameters_are_those_of_the_model(gate, method):
    model = dataclasses.replace(PRESETS["tiny"], gate=gate, method=method)
    assert num_parameters(Config(model=model)) == PiTransformer(model, 64).num_parameters()


def test_every_shipped_constant_has_a_source():
    assert profile_names() == ["A100", "H100", "H200"]
    for name in profile_names():
        profile = load_profile(name)
        assert {*constants(profile), "attention"} <= set(profile.sources)
        assert min(constants(profile).values()) >= 0 and 0 < profile.matmul_share <= 1
    assert "data sheet" in load_profile("A100").sources["copy_bytes_per_s"]


def test_the_a100_is_the_h100_by_the_ratios_of_their_data_sheets():
    h100, a100 = load_profile("H100"), load_profile("A100")
    faster = {"copy_bytes_per_s": 2039 / 3352, "matmul_flops_per_s": 312 / 989}
    faster |= dict.fromkeys(("exact_forward_flops_per_s", "exact_backward_flops_per_s"), 312 / 989)
    for name, ratio in faster.items():
        assert getattr(a100, name) == pytest.approx(getattr(h100, name) * ratio, rel=1e-6), name
    for mine, theirs in zip(a100.attention, h100.attention, strict=True):
        assert mine.forward_ns * 2039 / 3352 == pytest.approx(theirs.forward_ns, rel=1e-3)
        assert mine.backward_ns * 2039 / 3352 == pytest.approx(theirs.backward_ns, rel=1e-3)


def test_rings_of_nccl_go_through_every_adapter():
    """Gradients' sums do, messages of neighbours through one."""
    config = job(num_gpus=16)
    one, eight = (communication_seconds(config, 16, H100, Network(adapters_per_node=n)) for n in (1, 8))
    assert one > 2 * eight
    assert Network().of_collective(8) == Network().of(8)
    assert Network(adapters_per_node=1).of_collective(16)[0] == Network().of(16)[0]


def test_one_flow_of_a_ring_crosses_a_nodes_edge():
    ethernet = NETWORKS["ethernet"]
    assert ethernet.of(16)[0] == 8 * ethernet.of(16, all_at_once=True)[0]
    assert ethernet.of(8) == ethernet.of(8, all_at_once=True) == NETWORKS["infiniband"].of(8)
    assert NETWORKS["infiniband"].of(16) == NETWORKS["infiniband"].of(16, all_at_once=True)


@pytest.mark.parametrize(
    ("context", "training", "said"),
    [
        (3 * 2**22, {}, "--training.activation_offload=true"),
        (3 * 2**22, {"cuda_graphs": True}, "--training.cuda_graphs=null"),
        (2**23, {"activation_checkpointing": "selective"}, "--training.activation_checkpointing=true"),
    ],
)
def test_a_plan_offers_every_setting_that_saves_memory(context, training, said):
    config = job("ring", context=context, num_gpus=16, preset="medium")
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, **training))
    changes = [change.what for change in make_plan(config, 16, H100, Network()).changes]
    assert any(said in what for what in changes), changes


@pytest.mark.parametrize("schedule", ["fixed", "doubling", "per_head"])
def test_bytes_are_those_of_the_exchange_plans(schedule):
    """Every rank, chunk and layer; shorter last chunks, far strides, several of a key's queries."""
    draw, found = random.Random(7), 0
    while found < 150:
        ranks, num_chunks = draw.randint(1, 5), draw.randint(1, 6)
        shard = draw.randint(1, 9)
        chunk, last = ranks * shard, ranks * draw.randint(1, shard) if num_chunks > 1 else ranks * shard
        context = (num_chunks - 1) * chunk + last
        pattern = {"window": draw.randint(0, 12), "stride": draw.randint(1, 12), "schedule": schedule}
        model = dataclasses.replace(
            PRESETS["tiny"], num_layers=3, num_kv_heads=2, num_skips=draw.randint(0, 5), **pattern
        )
        recomputed = draw.choice([False, True])
        chunk_tokens = chunk if num_chunks > 1 else None
        training = {"chunk_tokens": chunk_tokens, "activation_checkpointing": recomputed}
        config = Config(
            model=model,
            parallel=ParallelConfig(sp_degree=ranks),
            training=TrainingConfig(context=context, batch_size=1, **training),
        )
        for layer, of_layer in enumerate(layer_patterns(model, context)):
            sent = 0
            for rank, at in itertools.product(range(ranks), range(num_chunks)):
                plan = exchange_plan.make_plan(
                    of_layer, model.num_heads, 2, context, ranks, rank, chunk_tokens=chunk_tokens, chunk=at
                )
                messages = (*plan.halo_sends, *(m for m in plan.skip_sends if m.peer != rank))
                elements = sum(m.elements(1, model.head_dim, plan.groups) for m in messages)
                made_first = at < num_chunks - 1 and layer < 2
                sent += 4 * elements * (1 + recomputed + made_first + 1)
            assert exchanged_bytes(config, layer) * ranks == pytest.approx(sent), config
            found += sent > 0


def streamed_step_on_a_rank(config):
    """Bytes that a rank sends in one step in chunks, without ZeRO's."""
    mesh = make_mesh(config.parallel.sp_degree, torch.device("cpu"))
    model, batch = PiTransformer.of_run(config, "cpu"), random_batch(config, mesh)
    with counted_bytes() as sent:
        chunks = streamed_losses(model, mesh, batch, config.parallel, 0, config.training.chunk_tokens)
        for loss in chunks:
            loss.backward()
    return sum(map(sum, sent.values()))


@pytest.mark.parametrize("chunk_tokens", [None, 64, 256])
def test_bytes_of_chunks_are_those_that_ranks_send(ranks, chunk_tokens):
    config = Config(
        model=dataclasses.replace(PRESETS["tiny"], window=4, stride=16),
        parallel=ParallelConfig(sp_degree=2, device="cpu"),
        training=TrainingConfig(
            context=1024, batch_size=1, chunk_tokens=chunk_tokens, activation_checkpointing=True
        ),
    )
    sent = ranks(2).run(streamed_step_on_a_rank, config)
    layers = range(config.model.num_layers)
    assert sum(sent) / 2 == sum(exchanged_bytes(config, layer) for layer in layers)


@pytest.mark.parametrize("chunks", [1, 4])
def test_zero_2_and_3_sum_after_every_chunk(chunks):
    """And ZeRO 3 gathers before every pass; ZeRO 1 does so once a step."""

    def waits(stage):
        sizes = {"streamed": chunks > 1, "chunk_tokens": 131072 // 4 // chunks}
        config, network = job(num_gpus=4, zero_stage=stage, **sizes), Network(node_latency_s=0.0)
        return communication_seconds(config, 4, H100, network)

    byte_of_all = 0.75 * num_parameters(job()) / Network().node_bytes_per_s
    assert waits(2) - waits(1) == pytest.approx((chunks - 1) * 8 * byte_of_all)
    gathered = 2 * (3 * chunks - 1)
    assert waits(3) - waits(1) == pytest.approx((4 * chunks + gathered - 10) * byte_of_all)


def test_a_plan_says_with_how_many_gpus_or_that_none_helps():
    ring = make_plan(job("ring", context=2**26, num_gpus=8, preset="large"), 8, H100, Network())
    assert ring.more_gpus and "--gpus 256 --parallel.sp_degree=256 would" in describe(ring)
    uneven = make_plan(job("ulysses", context=5 * 2**20, num_gpus=4, preset="large"), 4, H100, Network())
    flags = "--parallel.sp_degree=20"
    assert uneven.more_gpus == (20, flags)  # of 32 heads and 20 ranks' tokens, no power of two
    dense = make_plan(job("dense", context=2**24, preset="medium"), 1, H100, Network())
    assert "--gpus 32 --model.method=ring --parallel.sp_degree=32 would" in describe(dense)
    prime = make_plan(job("dense", context=2**24 + 43, preset="medium"), 1, H100, Network())
    assert "nor with any change that was tried, nor on up to 4,096 GPUs" in describe(prime)


def test_a_plan_offers_rings_where_attention_cannot_be_split():
    config = dataclasses.replace(job("dense", context=2**20, preset="large"), parallel=ParallelConfig(1))
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, batch_size=2))
    whole = make_plan(config, 2, H100, Network())
    assert [change.what for change in whole.changes] == [
        "--model.method=ring --parallel.sp_degree=2 --training.activation_offload=true"
    ]


def test_a_plan_offers_the_longest_chunks_that_fit():
    training = TrainingConfig(context=2**20, batch_size=1, precision="bf16")
    config = Config(model=model_of("small"), parallel=ParallelConfig(sp_degree=2), training=training)
    chunks = [change.what for change in make_plan(config, 2, H100, Network()).changes]
    assert "--training.chunk_tokens=262144" in chunks and "--training.chunk_tokens=65536" not in chunks


def test_a_plan_is_told_that_kept_rows_have_no_room_and_what_would_help():
    far = {"window": 64, "stride": 65, "num_skips": 16, "schedule": "doubling"}
    training = {"batch_size": 8, "precision": "bf16", "activation_checkpointing": True}
    config = Config(
        model=model_of("medium", **far),
        parallel=ParallelConfig(sp_degree=1),
        training=TrainingConfig(context=2**24, chunk_tokens=65536, **training),
    )
    plan = make_plan(config, 8, H100, Network())
    assert not plan.fits and plan.memory is None and plan.changes[0].what == "--parallel.sp_degree=8"
    said = describe(plan)
    assert "kept rows (829.8 GiB)" in said and "steps that did so took 2 to 4 times as long" in said


@pytest.mark.parametrize(
    ("method", "context", "training", "said"),
    [
        ("pi", 2**22, {"chunk_tokens": 2**21}, "--training.chunk_tokens=1048576: 55,798 MiB"),
        (
            *("pi", 2**22, {"chunk_tokens": 2**18, "activation_checkpointing": False}),
            "--training.activation_checkpointing=true: ",
        ),
        (
            *("dense", 3 * 2**19, {"activation_checkpointing": False}),
            "--training.activation_checkpointing=true --training.activation_offload=true: ",
        ),
        ("pi", 2**20, {"precision": "fp32"}, "--training.precision=bf16: "),
    ],
)
def test_what_a_plan_advises_is_enough(method, context, training, said):
    config = job(method, context=context)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, **training))
    plan = make_plan(config, 1, H100, Network())
    assert not plan.fits and said in describe(plan)
    for change in plan.changes:
        flags = [flag.removeprefix("--").split("=") for flag in change.what.split()]
        values = {room: {} for room in ("parallel", "training")}
        for name, value in flags:
            room, field = name.split(".")
            values[room][field] = yaml.safe_load(value)
        followed = dataclasses.replace(
            config, **{room: dataclasses.replace(getattr(config, room), **values[room]) for room in values}
        )
        again = make_plan(followed, 1, H100, Network())
        assert again.fits and again.memory.host == change.host_mib, change


def test_shipped_kernel_times_are_those_of_the_records():
    for name in ("H100", "H200"):
        record = kept_records()[f"kernels_{name.lower()}"]
        assert load_profile(name).attention == attention_costs(record)


def test_the_cheapest_kernel_that_has_the_pattern_is_taken():
    cost, entry = H100.attention_cost(60, 10), H100.attention_cost(64, 16)
    assert dataclasses.replace(cost, window=64, num_skips=16) == entry in H100.attention


def test_wider_windows_and_more_skips_than_were_measured_cost_in_proportion():
    """So what sees all of a context is no faster than dense attention, which does so in one product."""
    widest = H100.attention_cost(512, 0)
    assert H100.attention_cost(4096, 0).backward_ns == pytest.approx(8 * widest.backward_ns)
    assert H100.attention_cost(4, 640).forward_ns == 10 * H100.attention_cost(4, 64).forward_ns

    def seconds(method, **terms):
        return step_time(job(method, **terms), 1, H100, Network()).compute

    assert seconds("pi", window=131071) > seconds("window", window=131071) > seconds("dense")


def test_what_is_no_bf16_takes_as_long_as_its_products():
    config = job()
    training = dataclasses.replace(config.training, precision="fp32")
    rate = (
        work(config, 1, H100).matmul_flops
        / step_time(dataclasses.replace(config, training=training), 1, H100, Network()).compute
    )
    assert 30e12 < rate < 67e12  # below the data sheet's for fp32


def test_memory_falls_and_time_splits_with_the_number_of_gpus():
    for method in ("pi", "window", "ring"):
        needs = [memory(job(method, num_gpus=p), p, H100).total for p in (1, 2, 4, 8)]
        assert needs == sorted(needs, reverse=True)
    one, two = (compute_seconds(work(job("ring", num_gpus=p), p, H100), H100) for p in (1, 2))
    assert one / 2 < two < one * 0.55  # its sums over steps are extra


def test_streaming_keeps_memory_flat_and_costs_a_forward_pass_of_all_but_one_chunk():
    short, long = (memory(job("pi", n, streamed=True), 1, H100).total for n in (2**18, 2**22))
    assert long < short * 1.05 < memory(job("pi", 2**18), 1, H100).total
    whole, chunks = (work(job("pi", 2**20, streamed=s), 1, H100) for s in (False, True))
    assert chunks.moved_bytes == pytest.approx(whole.moved_bytes * (5 - 1 / 32) / 4)
    seconds = [gpu_seconds(done, H100) for done in (whole, chunks)]
    assert seconds[0] * 1.15 < seconds[1] < seconds[0] * 1.3


def test_a_peak_is_in_the_loss_or_in_a_block_or_where_all_gradients_are():
    """One copy more in a block, in MiB: none where the loss needs more than a block; else tokens · d."""

    def slope(config, ranks=1):
        more = dataclasses.replace(H100, block_copies=H100.block_copies + 1)
        return memory(config, ranks, more).total - memory(config, ranks, H100).total

    assert slope(job(context=8192)) == 0 and slope(job(context=131072)) == pytest.approx(131072 * 768 / 2**19)
    short, long = (job("ring", n, num_gpus=64, preset="large") for n in (2**16, 2**22))
    assert memory(short, 64, H100).kept < memory(long, 64, H100).kept / 64
    n, rest = num_parameters(short), state_bytes(short, 64)[0]
    assert memory(short, 64, H100).states * 2**20 == pytest.approx(rest + 2 * n)
    assert memory(long, 64, H100).states * 2**20 == pytest.approx(rest + 2 * 50304 * 1280)


def test_exact_methods_hold_what_travels():
    def copies(method, ranks):
        config = job(method, 2**20, num_gpus=ranks)
        return memory(config, ranks, dataclasses.replace(H100, block_copies=0.0)).working

    tokens = 2**20 // 4 * 768 / 2**19
    assert copies("ring", 4) - copies("ulysses", 4) == pytest.approx(11 * tokens)
    assert copies("ring", 4) > copies("dense", 1) / 4


def test_a_ring_among_other_layers_also_moves_its_shards():
    """Within a node two messages and a share of q, k, v and out, three times where blocks are recomputed."""
    alone, mixed = (job(method, num_gpus=4) for method in ("ring", ["ulysses"] + ["ring"] * 11))
    ulysses = job("ulysses", num_gpus=4)
    waits = [communication_seconds(config, 4, H100, Network()) for config in (alone, mixed, ulysses)]
    seconds, pieces = 6 * 40e-6 + 3 * 6 / 4 * 2**17 / 8 * 4 * 768 * 2 / 296e9, 12
    assert waits[1] == pytest.approx((11 * waits[0] + waits[2]) / pieces + 11 * seconds, rel=1e-6)


@pytest.mark.parametrize("method", ["pi", "window", "ring", "ulysses"])
def test_slower_networks_wait_longer(method):
    config = job(method, num_gpus=4)
    waits = [
        communication_seconds(config, 4, H100, dataclasses.replace(network, gpus_per_node=2))
        for network in (NETWORKS["infiniband"], NETWORKS["ethernet"])
    ]
    assert 0 < waits[0] < waits[1]
    assert communication_seconds(job(method), 1, H100, Network()) == 0


@pytest.mark.parametrize("method", ["pi", "dense"])
def test_offload_and_tiles_need_less_memory_and_so_reach_farther(method):
    terms = [{}, {"activation_offload": True}, {"activation_offload": True, "mlp_tile_tokens": 4096}]
    plain, offloaded, tiled = (memory(job(method, 2**20, **t), 1, H100) for t in terms)
    saved = PRESETS["small"].num_layers - 3  # inputs of blocks, in bf16
    assert plain.kept - offloaded.kept == pytest.approx(saved * 2**20 * 768 * 2 / 2**20)
    assert tiled.working < offloaded.working if method == "pi" else tiled.working == offloaded.working
    assert tiled.total < offloaded.total or method == "dense"
    streamed = job("pi", 2**20, streamed=True, activation_offload=True)
    assert not streamed.training.activation_offload
    assert (plain.host, offloaded.host, tiled.host) == (0, 32 * 1024, 48 * 1024)  # slabs of ten, 1.5 GiB each


def measured_steps(records):
    """(row, its configuration) of kept steps, on one to four GPUs of a kind."""
    for name in records:
        for row in kept_records()[name]["rows"]:
            plain = row.get("engine", "deepspeed") == "deepspeed" and not row.get("eager")
            if row["measured"] and row["ms"] and plain and row["chunk_tokens"] is None:
                what = {key: row[key] for key in ("method", "window", "stride", "num_skips")}
                model = model_of(row["preset"], **what)
                micro_batch_size = row["batch"] * row["sp_degree"] // row["world_size"]
                sizes = {"batch_size": row["batch"], "precision": "bf16"}
                sizes |= {"micro_batch_size": micro_batch_size}
                sizes |= {key: row[key] for key in ("activation_checkpointing", "cuda_graphs")}
                training = TrainingConfig(context=row["tokens"], **sizes)
                parallel = ParallelConfig(sp_degree=row["sp_degree"])
                yield row, Config(model=model, parallel=parallel, training=training)


SAVINGS = ("savings_h100", "savings_time_h100")


@pytest.mark.parametrize("name", [*SAVINGS, "longest_h100", "savings_ranks_h200", "savings_one_h200"])
def test_kept_savings_are_by_the_constants_that_ship(name):
    """And have their measured points."""
    record = kept_records()[name]
    profile = load_profile("H200" if "h200" in name else "H100")
    assert record["settings"]["profile"] == json.loads(json.dumps(dataclasses.asdict(profile)))
    points = record.get("points", [])
    assert len({point["job"] for point in points}) == len(points) >= (0 if name == "longest_h100" else 10)


def test_a_rank_alone_finds_the_memory_of_real_ones():
    """On an H200 beside two and four, which wait for the slowest card of theirs."""
    of_real, alone = (
        {point["what"]: point for point in kept_records()[name]["points"]}
        for name in ("savings_ranks_h200", "savings_one_h200")
    )
    several = [what for what in of_real if not what.endswith(" on 1")]
    assert len(several) == 11
    for what in several:
        assert alone[what]["fake"] and not of_real[what]["fake"]
        assert alone[what]["peak_mib"] == pytest.approx(of_real[what]["peak_mib"], rel=0.01), what
        assert "chunks" in what or 0.94 < alone[what]["ms"] / of_real[what]["ms"] < 1.0, what


def test_what_layers_read_beyond_a_chunk_is_not_in_the_time():
    """Nor does anyone take it to be."""
    strides = (65, 1105, 18785, 250000, *[65] * 8)
    model = dataclasses.replace(model_of("small"), window=64, num_skips=16, stride=65, strides=strides)
    training = TrainingConfig(context=2**22, chunk_tokens=32768, batch_size=1, precision="bf16")
    config = Config(model=model, parallel=ParallelConfig(sp_degree=1), training=training)
    (measured,) = [row for row in kept_records()["streamed_h100"]["rows"] if row["tokens"] == 2**22][:1]
    assert measured["num_layers"] == 12 and looks_beyond_a_chunk(config)
    assert 1e3 * step_time(config, 1, H100, Network()).total < measured["ms"] / 2
    assert not looks_beyond_a_chunk(job(context=2**22, streamed=True))


def measured_points(names):
    """(row, its configuration, seconds without communication) of points of savings on an H100."""
    for name in names:
        record = kept_records()[name]
        alone = {point["what"]: point["ms"] for point in record["points"]}
        for row in record["rows"]:
            for point in row.get("checks", ()):
                if point["time_source"] in ("measured", "composed"):
                    ranks, streamed = point["num_gpus"], row["streamed"]
                    config = job(row["method"], row["context"], ranks, streamed, row["preset"])
                    what = f"{row['preset']} {row['method']}{' in chunks' * streamed} {row['context']:,}"
                    ms = point["ms"] if ranks == 1 else alone[f"{what} on {ranks}"]
                    yield point | {"streamed": streamed}, config, ms / 1e3


def paced_by_gpus(gpu):
    """(configuration, ranks, seconds without communication) of the steps that constants of time are of."""
    profile = load_profile(gpu)
    for row, config in measured_steps(STEPS[gpu]):
        if row["cuda_graphs"] is None:
            ranks = row["world_size"]
            waits = communication_seconds(config, ranks, profile, Network()) if ranks > 1 else 0.0
            yield config, ranks, row["ms"] / 1e3 - waits
    if gpu == "H100":  # a step on one GPU once, though it is that of dense, ring and Ulysses
        points = {seconds: (config, point) for point, config, seconds in measured_points(["savings_h100"])}
        for seconds, (config, point) in points.items():
            if not point["streamed"]:
                yield config, point["num_gpus"], seconds


@pytest.mark.parametrize("gpu", STEPS)
def test_constants_of_time_are_fitted_to_the_kept_steps(gpu):
    profile = load_profile(gpu)
    found = calibrate.fit_gpu(profile, list(paced_by_gpus(gpu)))
    for name in ("block_moves", "gpu_layer_us", "exact_forward_flops_per_s", "exact_backward_flops_per_s"):
        assert getattr(profile, name) == pytest.approx(getattr(found, name), rel=5e-3), name


def test_constants_of_memory_are_fitted_to_the_kept_steps():
    """Of the small model on one H200; they follow from the code, so all profiles have the same."""
    jobs = [
        (config, 1, row["peak_mib"])
        for row, config in measured_steps(STEPS["H200"])
        if (row["preset"], row["world_size"], row["activation_checkpointing"]) == ("small", 1, True)
        and row["cuda_graphs"] is None
    ]
    found = calibrate.fit_memory(load_profile("H200"), jobs)
    for name in ("H100", "H200", "A100"):
        profile = load_profile(name)
        assert profile.block_copies == pytest.approx(found.block_copies, rel=1e-3)
        assert profile.fixed_mib == pytest.approx(found.fixed_mib, rel=1e-2)


@pytest.mark.parametrize(("gpu", "least"), [("H200", 120), ("H100", 30)])
def test_the_model_is_near_measured_steps(gpu, least):
    """On one to four H200, every method, 8k to 4M tokens, and on an H100: small, medium and large."""
    profile, found = load_profile(gpu), 0
    for row, config in measured_steps(STEPS[gpu]):
        ranks, found = row["world_size"], found + 1
        assert memory(config, ranks, profile).total == pytest.approx(row["peak_mib"], rel=0.05), row
        if row["cuda_graphs"] is None:  # else the host, which no profile knows, is waited for
            predicted = step_time(config, ranks, profile, Network()).total
            assert 1e3 * predicted == pytest.approx(row["ms"], rel=0.07), row
    assert found > least


def test_the_model_was_near_what_was_measured_later():
    """Nothing is fitted to it: steps of every method on one, two and four GPUs of a host, and whole jobs."""
    profile = load_profile("H200")
    for row, config in measured_steps(["sp_host_h200"]):
        ranks = row["world_size"]
        predicted = step_time(config, ranks, profile, Network()).total
        short = config.model.method == "ring" and config.training.context // ranks == 8192
        assert 1e3 * predicted == pytest.approx(row["ms"], rel=0.12 if short else 0.04), row
        assert memory(config, ranks, profile).total == pytest.approx(row["peak_mib"], rel=0.02)
        assert row["bytes_sent"] == row["bytes_formula"]
    for row in kept_records()["savings_ranks_h200"]["rows"]:
        for point in row["checks"]:
            late = row["streamed"] and point["num_gpus"] == 2  # the host, which other jobs were on
            assert point["predicted_mib"] == pytest.approx(point["peak_mib"], rel=0.02)
            if point["time_source"] == "measured":
                assert point["predicted_ms"] == pytest.approx(point["ms"], rel=0.43 if late else 0.06)


def test_the_model_is_near_steps_of_few_tokens():
    """Nothing is fitted to these: one sequence of 4k to 32k tokens on an H100, nothing recomputed."""
    rows = [row for row in kept_records()["paper_h100"]["rows"] if row["what"] == "table"]
    for row in rows:
        model = model_of("small", method=row["method"], **PAPER | {"num_skips": int(row["method"] == "pi")})
        training = TrainingConfig(context=row["context"], batch_size=1, precision="bf16")
        config = Config(model=model, parallel=ParallelConfig(zero_stage=1), training=training)
        predicted = 1e3 * step_time(config, 1, H100, Network()).total
        assert predicted == pytest.approx(row["ms"], rel=0.11 if row["context"] == 4096 else 0.055), row
        assert memory(config, 1, H100).total == pytest.approx(row["peak_mib"], rel=0.02), row
    assert len(rows) == 12


def test_the_model_is_near_the_kept_savings():
    """Points on an H100, of one rank of 1 to 16; the host paces the small model's chunks."""
    found = 0
    for point, config, seconds in measured_points(SAVINGS):
        ranks = point["num_gpus"]
        predicted = compute_seconds(work(config, ranks, H100), H100)
        host = point["streamed"] and config.model.hidden_size == PRESETS["small"].hidden_size
        blocks = config.model.method in ("ring", "ulysses") and ranks > 1  # short ones, of 4,096 tokens
        limit = 0.25 if host and ranks > 1 else 0.17 if host else 0.13 if blocks else 0.07
        assert predicted == pytest.approx(seconds, rel=limit), (point, config.model.method)
        assert memory(config, ranks, H100).total == pytest.approx(point["peak_mib"], rel=0.03)
        found += 1
    assert found > 45


def synthetic(profile):
    """A record of `calibrate` whose figures come from the model with this profile."""
    settings = {
        name: getattr(profile, name) for name in ("copy_bytes_per_s", "matmul_flops_per_s", "memory_mib")
    }
    rows = []
    for point in calibrate.points(["small", "medium"]):
        config, ranks = config_of(*point, calibrate.TERMS), point[-1]
        row = dict(zip(("preset", "method", "streamed", "context", "world_size"), point, strict=True))
        row |= {"ms": 1e3 * compute_seconds(work(config, ranks, profile), profile), "status": "ok"}
        rows.append(row | {"peak_mib": memory(config, ranks, profile).total})
    rows.append(rows[0] | {"status": OUT_OF_MEMORY, "ms": None, "peak_mib": None})
    return {"settings": settings, "rows": rows}


def test_a_fit_finds_the_constants_that_made_the_figures():
    true = dataclasses.replace(
        H100, block_moves=120.0, gpu_layer_us=200.0, host_layer_us=4000.0,
        block_copies=40.0, fixed_mib=500.0,
        exact_forward_flops_per_s=4e14, exact_backward_flops_per_s=4e14 * 289 / 293,
    )  # fmt: skip
    record = synthetic(true)
    found = calibrate.fitted(H100, record, "test")
    for name, value in constants(true).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-3), name
    assert found.sources["block_moves"] == "test" and found.sources["attention"] == H100.sources["attention"]
    assert "+0.0%" in calibrate.describe_fit(found, record)
    with pytest.raises(UserError, match="measured steps"):
        calibrate.fitted(H100, record | {"rows": record["rows"][:4]}, "test")


def test_a_fit_of_few_noisy_steps_is_near_all_of_them():
    """As `--minutes` leaves them."""
    for count, seed in itertools.product((5, 6, 9), range(5)):
        record, draw = synthetic(H100), random.Random(seed)
        record["rows"] = [row | {"ms": row["ms"] * draw.gauss(1, 0.01)} for row in record["rows"][:count]]
        found = calibrate.fitted(H100, record, "test")
        for point in calibrate.points(["small", "medium"]):
            done = work(config_of(*point, calibrate.TERMS), point[-1], H100)
            assert compute_seconds(done, found) == pytest.approx(compute_seconds(done, H100), rel=0.04)


def test_least_squares_allows_no_negative_constant():
    columns = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    assert calibrate.least_squares(columns, np.array([3.0, 5.0, 7.0])) == pytest.approx([1.0, 2.0])
    assert calibrate.least_squares(columns, np.array([3.0, 2.0, 1.0])) == pytest.approx([2.0, 0.0])


def test_a_profile_is_read_as_written(tmp_path):
    path = tmp_path / "mine.json"
    write_profile(H100, str(path))
    assert load_profile(str(path)) == H100
    values = json.loads(path.read_text())
    for change in ({"memory_mib": "big"}, {"gpu_layer_us": None}, {"copy_bytes_per_s": 0}, {"attention": []}):
        path.write_text(json.dumps(values | change))
        with pytest.raises(UserError, match=f"not a profile of this version's .*{next(iter(change))}"):
            load_profile(str(path))
    path.write_text('{"name": "x"}')
    with pytest.raises(UserError, match="not a profile"):
        load_profile(str(path))
    with pytest.raises(UserError, match="does not hold"):
        load_profile("H9000")


def plan_of(gpus, **training):
    model = dataclasses.replace(PRESETS["large"], vocab_size=50304)
    training = TrainingConfig(batch_size=1, precision="bf16", **training)
    return make_plan(
        Config(model=model, parallel=ParallelConfig(sp_degree=1), training=training), gpus, H100, Network()
    )


def test_a_plan_that_does_not_fit_names_changes_that_do():
    plan = plan_of(1, context=2**19)
    assert not plan.fits and plan.reach == 512
    assert any("activation_checkpointing=true" in change.what for change in plan.changes)
    assert all(change.mib <= plan.tensors_mib for change in plan.changes)
    fits = plan_of(1, context=8192, activation_checkpointing=True)
    assert fits.fits and not fits.changes
    with pytest.raises(ConfigError, match="batch_size"):
        plan_of(4, context=8192)


def run(*arguments):
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    return left.value.code


def test_the_plan_command_warns_and_tells_by_its_status(tmp_path, capsys):
    flags = ["plan", "--model.num_layers=12", "--training.precision=bf16", "--training.batch_size=1"]
    assert run(*flags, "--gpus=1", "--training.context=32768") == 0
    said = capsys.readouterr().out
    assert "nothing was run" in said and "context (32,768) > reach (192)" in said and "assumed" in said
    out = tmp_path / "plan.json"
    assert run(*flags, "--gpus=1", "--training.context=1048576", "--json", str(out)) == 1
    assert json.loads(out.read_text())["fits"] is False
    assert run(*flags, "--gpus=3", "--parallel.sp_degree=2") == 2
    assert "world size (3) % sp_degree (2) == 0 does not hold" in capsys.readouterr().err


def test_calibrating_measures_once_and_writes_a_profile(tmp_path, monkeypatch, capsys):
    """On a GPU that is made up: what its worker says comes from the H100's profile."""
    asked = []

    class Pretended:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def ask(self, request, timeout_s):
            asked.append(request.world_size)
            compute = compute_seconds(work(request.config, request.world_size, H100), H100)
            mib = memory(request.config, request.world_size, H100).total
            return {"status": "ok", "ms": 1e3 * compute, "peak_mib": mib}

    monkeypatch.setattr(calibrate, "Worker", Pretended)
    monkeypatch.setattr(calibrate, "device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    total = SimpleNamespace(total_memory=80000 * 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: total)
    rates = (H100.copy_bytes_per_s, H100.matmul_flops_per_s)
    monkeypatch.setattr(kernel_bench, "ceilings", lambda: rates)
    flags = ["--json", str(tmp_path / "mine.json"), "--record", str(tmp_path / "steps.json")]
    assert run("calibrate", *flags, "--presets", "small,medium") == 0
    mine = load_profile(str(tmp_path / "mine.json"))
    assert mine.memory_mib == 80000 and mine.sources["block_moves"] == "fitted to steps.json"
    assert mine.block_moves == pytest.approx(H100.block_moves, rel=0.01)
    assert mine.block_copies == pytest.approx(H100.block_copies, rel=0.01)
    assert asked == [1, 1, 1, 1, 1, 1, 4, 4] * 2
    assert run("calibrate", *flags) == 0 and len(asked) == 16
    assert "written to" in capsys.readouterr().out


def test_calibrating_needs_a_gpu(tmp_path, capsys):
    assert run("calibrate", "--json", str(tmp_path / "p.json"), "--record", str(tmp_path / "r.json")) == 2
    assert "calibrate: GPUs of this machine (0) >= 1 does not hold" in capsys.readouterr().err
    for name in ("json", "record"):  # before minutes of work
        paths = {"json": "p.json", "record": "r.json"} | {name: "nowhere/x.json"}
        assert run("calibrate", *(f"--{key}={tmp_path / path}" for key, path in paths.items())) == 2
        assert f"{name}: '{tmp_path}/nowhere' is not a directory" in capsys.readouterr().err
