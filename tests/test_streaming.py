"""Training in chunks: loss and every gradient of the whole sequence, in memory that does not grow with it."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed import Ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from test_key_exchange import cases as patterns
from test_key_exchange import rows_by_brute_force
from test_trainer import config_for, run_three, train_on, weights
from test_training_parity import CLIP_NORM, MODEL, check, on_a_rank, one_process

from pi_dist.config import PRESETS, Config, ConfigError, ModelConfig, ParallelConfig, TrainingConfig
from pi_dist.data.loader import Batch
from pi_dist.model.attention import SequenceContext
from pi_dist.model.loss import IGNORE
from pi_dist.model.transformer import PiTransformer
from pi_dist.ops import PiPattern
from pi_dist.ops.pattern import layer_patterns
from pi_dist.ops.spec import Run
from pi_dist.parallel.exchange_plan import make_plan, shard_starts
from pi_dist.parallel.host_memory import HostMemory
from pi_dist.parallel.kept_keys import KeptKeys, Placement, kept_size
from pi_dist.parallel.mesh import Mesh
from pi_dist.training.kept_memory import Memory, check_offload, offloaded_bytes, plan_kept_rows
from pi_dist.training.streaming import ON_DEVICE, evaluated_loss, streamed_losses

SEED = 11


@st.composite
def models(draw):
    """Every schedule, window, number of skips, heads, gate and clamp; methods pi and window."""
    heads, kv_heads = draw(st.sampled_from([(1, 1), (4, 2), (3, 3), (4, 1)]))
    stride, layers = st.integers(1, 20), 2
    explicit = st.lists(stride | st.lists(stride, min_size=heads, max_size=heads), min_size=2, max_size=2)
    num_skips = draw(st.integers(0, 3))
    ring = num_skips == 0 or draw(st.integers(0, 4)) > 0
    return ModelConfig(
        method=draw(st.sampled_from(["pi", "pi", "window", ["window", "pi"]])) if ring else "pi",
        num_layers=layers,
        hidden_size=4 * heads,
        num_heads=heads,
        num_kv_heads=kv_heads,
        vocab_size=13,
        window=draw(st.integers(0, 12)),
        stride=draw(stride),
        num_skips=num_skips,
        schedule=draw(st.sampled_from(["fixed", "doubling", "per_head"])),
        strides=draw(st.none() | explicit),
        include_self=draw(st.booleans()),
        ring=ring,
        gate=draw(st.sampled_from(["dynamic", "static", "none"])),
        gate_input=draw(st.sampled_from(["hidden", "query"])),
        logit_cap=draw(st.sampled_from([20.0, 0.3, None])),
        attention_dropout=draw(st.sampled_from([0.0, 0.3])),
    )


def sequences(length, labels_kind, seed):
    """Tokens, labels and segment ids [2, n]: one document, several, or several with padding in between."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 13, (2, length), generator=generator)
    segment_ids = torch.zeros(2, length, dtype=torch.int32)
    if labels_kind != "none":
        segment_ids = torch.randint(0, 3, (2, length), generator=generator).sort(dim=1).values.int()
    if labels_kind == "padded":
        segment_ids[torch.rand(2, length, generator=generator) < 0.2] = -1
        segment_ids[0, length // 2 :] = -1  # whole chunks of padding
    labels = torch.full_like(tokens, IGNORE)
    same = (segment_ids[:, :-1] == segment_ids[:, 1:]) & (segment_ids[:, 1:] >= 0)
    labels[:, :-1] = torch.where(same, tokens[:, 1:], IGNORE)
    return tokens, labels, segment_ids


def make_model(config, length, recompute, dtype=torch.float64):
    """Weights large enough that attention is far from uniform and the clamp and the gates matter."""
    model = PiTransformer(config, length, seed=1, activation_checkpointing=recompute).to(dtype)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator).to(dtype)
    return model


def at_once(config, arguments, dtype=torch.float64):
    """(loss with dropout, loss without, gradients) of the whole sequence in one piece, on one rank."""
    tokens, labels, segment_ids = sequences(*arguments)
    model = make_model(config, tokens.shape[1], False, dtype)
    loss = model(tokens, labels, SequenceContext(labels=segment_ids, seed=SEED, row_start=3))
    loss.backward()
    with torch.no_grad():
        heldout = model.eval()(tokens, labels, SequenceContext(labels=segment_ids, row_start=3))
    return loss.detach(), heldout, {name: p.grad for name, p in model.named_parameters()}


class PoisonedMemory(HostMemory):
    """Whoever loads what was given back finds NaN."""

    def give_back(self, buffer):
        buffer.fill_(float("nan"))
        super().give_back(buffer)


def placed(where):
    """Where rows are kept, by a name: "device", or in "host" memory, or there also what lies "between"."""
    return ON_DEVICE if where == "device" else Placement(PoisonedMemory(), spread=where == "host")


PLACES = ["device", "host", "between"]


def in_chunks(config, arguments, chunk_tokens, recompute, parallel=None, dtype=torch.float64, where="device"):
    """As `at_once`, on the ranks of the default group if there is one, whose sums are returned."""
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    group = dist.group.WORLD if ranks > 1 else None
    mesh = Mesh(rank, ranks, ranks, torch.device("cpu"), group)
    whole = sequences(*arguments)
    length = whole[0].shape[1]
    starts = shard_starts(length, ranks, rank, False, chunk_tokens)
    columns = [start + t for start in starts for t in range(length // ranks // len(starts))]
    batch = Batch(*(x[:, columns] for x in whole), starts=starts, row_start=3)
    model = make_model(config, length, recompute, dtype)
    parallel = parallel or ParallelConfig()
    total, placement = 0, placed(where)
    for loss in streamed_losses(model, mesh, batch, parallel, SEED, chunk_tokens, placement):
        total += loss.detach()
        loss.backward()
    heldout = evaluated_loss(model.eval(), mesh, batch, parallel, chunk_tokens, placement)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    if group is not None:
        for tensor in (total, heldout, *gradients.values()):
            dist.all_reduce(tensor)
    return total, heldout, gradients


def assert_equal(found, expected, tolerance=1e-10):
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        assert (ours - theirs).abs() <= tolerance * theirs.abs()
    whole = torch.cat([g.flatten() for g in expected[2].values()]).norm()
    for name, gradient in expected[2].items():
        # a gate has no gradient but rounding errors where all neighbours are of one kind
        scale = torch.maximum(gradient.norm(), 1e-5 * whole)
        assert (found[2][name] - gradient).norm() <= tolerance * scale, name


@settings(max_examples=100)
@given(
    models(),
    st.integers(13, 40),
    st.integers(1, 40),
    st.sampled_from(["none", "documents", "padded"]),
    st.integers(0, 99),
    st.booleans(),
)
def test_equals_the_whole_sequence(config, length, chunk_tokens, labels_kind, seed, recompute):
    """Chunks down to one token, smaller than stride and window, the last one shorter."""
    arguments = (length, labels_kind, seed)
    assert_equal(in_chunks(config, arguments, chunk_tokens, recompute), at_once(config, arguments))


@settings(max_examples=60)
@given(
    models(),
    st.integers(13, 40),
    st.integers(1, 12),
    st.sampled_from(["none", "padded"]),
    st.booleans(),
    st.sampled_from(["host", "between"]),
)
def test_rows_in_host_memory_change_no_bit(config, length, chunk_tokens, labels_kind, recompute, where):
    """Rows and gradients that leave and return, with what lies between skips and without."""
    arguments = ((length, labels_kind, 5), chunk_tokens, recompute)
    here, there = (in_chunks(config, *arguments, where=place) for place in ("device", where))
    assert torch.equal(here[0], there[0]) and torch.equal(here[1], there[1])
    assert all(torch.equal(here[2][name], there[2][name]) for name in here[2])


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_equals_the_whole_sequence_on_several_ranks(ranks, num_ranks):
    """Halos that lie on other ranks, in this chunk and in earlier ones; every form of exchange."""

    @settings(max_examples=20)
    @given(
        models(),
        st.integers(1, 5),
        st.integers(2, 6),
        st.sampled_from(["none", "documents", "padded"]),
        st.sampled_from(["ring_all_to_all", "all_to_all"]),
        st.sampled_from(["none", "interior"]),
        st.booleans(),
        st.sampled_from(PLACES),
    )
    def check_case(config, shard_length, num_chunks, labels_kind, exchange, overlap, recompute, where):
        chunk_tokens = shard_length * num_ranks
        arguments = (chunk_tokens * num_chunks, labels_kind, 5)
        parallel = ParallelConfig(exchange=exchange, overlap=overlap)
        options = (recompute, parallel, torch.float64, where)
        found = ranks(num_ranks).run(in_chunks, config, arguments, chunk_tokens, *options)
        for of_rank in found:
            assert_equal(of_rank, at_once(config, arguments))

    check_case()


@pytest.mark.parametrize(
    ("sp", "dp", "chunk_tokens"), [(1, 1, 4), (1, 1, 10), (1, 2, 10), (2, 1, 4), (2, 1, 16), (2, 2, 8)]
)
def test_equals_one_process_in_every_zero_stage(sp, dp, chunk_tokens):
    """The real engine, accumulation over rows and chunks, clipping; fp32, 1e-5. A 10 leaves 2 of 32 over."""
    with Ranks(sp * dp) as ranks:
        options = {"clip_norm": CLIP_NORM, "chunk_tokens": chunk_tokens}
        check(ranks.run(on_a_rank, sp, [0, 1, 2, 3], options, True))


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_recomputation_and_larger_micro_batches_change_nothing(zero_stage):
    with Ranks(2) as ranks:
        options = {"activation_checkpointing": True, "micro_batch_size": 2, "chunk_tokens": 8}
        check(ranks.run(on_a_rank, 2, [zero_stage], options, False))


def test_bf16_gradients_add_up_in_fp32():
    """Chunks of one token are as close to fp32 as whole rows are; added up in bf16, 2.5 times as far."""
    exact, stages = one_process()[2], [1, 2, 3]
    with Ranks(1) as ranks:
        whole, chunks = (
            ranks.run(on_a_rank, 1, stages, {"precision": "bf16", "chunk_tokens": size}, False)[0]
            for size in (None, 1)
        )

    def error(gradients):
        different = torch.cat([(gradients[name] - exact[name]).flatten() for name in exact])
        return different.norm() / torch.cat([x.flatten() for x in exact.values()]).norm()

    for together, apart in zip(whole, chunks, strict=True):
        assert error(apart[2]) < 1.3 * error(together[2])


@settings(max_examples=60)
@given(patterns(), st.integers(1, 4), st.integers(1, 5), st.integers(1, 9), st.booleans())
def test_plans_of_chunks_move_and_keep_the_rows_of_the_definition(
    case, num_ranks, shard_length, num_chunks, fused
):
    pattern, _, (heads, kv_heads), *_ = case
    pattern = replace(pattern, causal=True)
    chunk_tokens = num_ranks * shard_length
    seq_len = chunk_tokens * num_chunks
    looked_at = set()  # (group, position) that chunks from here on need of earlier ones
    for chunk in reversed(range(num_chunks)):
        plans = [
            make_plan(pattern, heads, kv_heads, seq_len, num_ranks, rank, fused, chunk_tokens, chunk)
            for rank in range(num_ranks)
        ]
        kept = {(g, p) for plan in plans for g, runs in enumerate(plan.kept) for r in runs for p in range(*r)}
        first, stop = chunk * chunk_tokens, (chunk + 1) * chunk_tokens
        assert kept == {(g, p) for g, p in looked_at if first <= p < stop}
        for rank, plan in enumerate(plans):
            assert plan.shard == (first + rank * shard_length, first + (rank + 1) * shard_length)
            for index, group in enumerate(plan.groups):
                halo, skip = rows_by_brute_force(pattern, group.strides, plan.shard, seq_len)
                assert {p for run in plan.received[index] for p in range(*run)} == halo | skip
                messages = (plan.own, *plan.halo_receives, *plan.skip_receives)
                owned = [(m.peer, p) for m in messages for run in m.rows[index] for p in range(*run)]
                assert sorted(p for _, p in owned) == sorted(halo | skip)  # each row once
                assert all(p % chunk_tokens // shard_length == peer for peer, p in owned)
                looked_at |= {(index, p) for p in halo | skip if p < first}
            for way in ("halo", "skip"):  # what one sends is what the other expects
                for message in getattr(plan, f"{way}_sends"):
                    back = [m for m in getattr(plans[message.peer], f"{way}_receives") if m.peer == rank]
                    assert [m.rows for m in back] == [message.rows]
                    assert message.peer != rank or not any(message.rows)


def test_training_runs_equal_those_at_once_and_resume_bit_equal(corpus, tmp_path):
    """Losses, held-out loss and weights through `train`, with dropout, two ranks; and stopped half-way."""
    whole = train_on(2, config_for(corpus, tmp_path / "whole"))[0]
    config = config_for(corpus, tmp_path / "chunks", chunk_tokens=32)
    chunks = train_on(2, config)[0]
    assert chunks.losses == pytest.approx(whole.losses, rel=1e-5)
    assert chunks.heldout_loss == pytest.approx(whole.heldout_loss, rel=1e-5)
    with Ranks(2) as ranks:
        first = ranks.run(run_three, replace(config, run_dir=str(tmp_path / "resumed")))[0]
    second = train_on(2, replace(config, run_dir=str(tmp_path / "resumed")))[0]
    assert first + second.losses == chunks.losses
    a, b = weights(tmp_path / "chunks", 6), weights(tmp_path / "resumed", 6)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_with_rows_in_host_memory_has_the_same_losses(corpus, tmp_path):
    runs = []
    for where in ("device", "host"):
        config = config_for(corpus, tmp_path / where, sp=1, stage=1, chunk_tokens=16, kept_rows=where)
        runs.append(train_on(1, config)[0])
    assert runs[0].losses == runs[1].losses and runs[0].heldout_loss == runs[1].heldout_loss
    assert [run.kept.host for run in runs] == [False, True]


def train_in_a_process(corpus, run_dir, **flags):
    """`pi-dist train` of one layer and one step; "training.X" is given as X."""
    flags = {
        **{"run_dir": run_dir, "data.train": corpus / "train", "parallel.device": "cpu"},
        **{"model.num_layers": 1, "model.hidden_size": 32, "model.num_heads": 4, "parallel.zero_stage": 1},
        **{f"training.{key}": value for key, value in ({"steps": 1, "batch_size": 1} | flags).items()},
    }
    command = [
        sys.executable,
        "-m",
        "pi_dist",
        "train",
        *(f"--{key}={value}" for key, value in flags.items()),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])


def test_a_run_says_at_its_start_what_is_kept_and_where(corpus, tmp_path):
    done = train_in_a_process(corpus, tmp_path, context=128, chunk_tokens=32, kept_rows="host")
    assert done.returncode == 0, done.stderr
    # 16 rows of 32 keys and values, in fp32, of each chunk but the last; gradients of one chunk at a time
    said = (
        "4 chunks of 32 tokens; a rank keeps 12.0 KiB of keys and values for later chunks and at most 4.0 KiB"
    )
    assert f"{said} of their gradients, in host memory but for " in done.stdout


def test_a_run_that_host_memory_has_no_room_for_is_refused(corpus, tmp_path):
    offload = {"activation_checkpointing": "true", "activation_offload": "true"}
    done = train_in_a_process(corpus, tmp_path / "run", context=2**31, **offload)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "training.activation_offload: inputs of blocks in host memory (2048.0 GiB) <= " in done.stderr
    assert not list(tmp_path.rglob("step-*"))


class Held:
    """Bytes that autograd has saved and layers have kept, at their most, of chunks of a sequence."""

    def __init__(self, monkeypatch):
        self.saved, self.kept, self.rows, self.on_device = 0, 0, 0, 0
        self.layers = []
        original = KeptKeys.__init__

        def noting(layer, *arguments):
            original(layer, *arguments)
            self.layers.append(layer)

        monkeypatch.setattr(KeptKeys, "__init__", noting)

    def train(self, config, length, chunk_tokens, placement=ON_DEVICE):
        batch = Batch(*sequences(length, "none", 0), starts=(0,), row_start=0)
        model = make_model(config, length, False, torch.float32)
        mesh = Mesh(0, 1, 1, torch.device("cpu"), None)
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            for loss in streamed_losses(model, mesh, batch, ParallelConfig(), 0, chunk_tokens, placement):
                self.saved = max(self.saved, sum(storages.values()))
                self.rows = self.rows or self.now()  # all of them, and no gradient yet
                self.note()
                loss.backward()
                self.note()
                storages.clear()
        assert self.now() == 0  # everything was handed back
        return self.saved, self.kept

    def note(self):
        self.kept = max(self.kept, self.now())
        self.on_device = max(self.on_device, sum(x.nbytes for one in self.layers for x in one.on_device()))

    def now(self):
        return sum(x.nbytes for layer in self.layers for x in layer.tensors())


def test_memory_is_one_chunk_and_the_formula(monkeypatch):
    """Autograd saves the same of 512 and 4096 tokens, but for token ids (8 bytes) and documents (4), views of
    the whole; layers keep what the formula in `pi_dist.training.streaming` says.
    """
    config = replace(MODEL, strides=[5, 40], num_skips=2, attention_dropout=0.0, vocab_size=13)
    chunk, per_row, reaches = 64, 2 * 2 * 2 * 6 * 4, (10, 80)  # K and V, rows of the batch, H_kv, D, bytes
    found = []
    for length in (512, 4096):
        saved, kept = Held(monkeypatch).train(config, length, chunk)
        found.append(saved)
        formula = length // chunk * sum(min(reach, chunk) for reach in reaches) * per_row
        gradients = sum(-(-reach // chunk) * min(reach, chunk) for reach in reaches) * per_row
        assert kept <= formula + gradients
        last = sum(min(reach, chunk) for reach in reaches) * per_row  # of the last chunk nothing is kept
        assert kept >= formula - 2 * last
    assert found[1] - found[0] == 2 * (4096 - 512) * (8 + 4)


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize(
    ("strides", "num_skips", "length", "chunk"),
    [
        ([5, 40], 2, 500, 64),
        ([200, 3], 3, 1024, 64),
        ([[1, 1, 40, 40], [9, 9, 9, 2]], 1, 300, 16),
        ([70, 500], 5, 900, 32),
    ],
)
def test_the_closed_form_is_what_layers_hold(monkeypatch, where, strides, num_skips, length, chunk):
    """All rows to the byte; gradients, and what is on the device, at most."""
    config = replace(MODEL, strides=strides, num_skips=num_skips, attention_dropout=0.0, vocab_size=13)
    held, placement = Held(monkeypatch), placed(where)
    held.train(config, length, chunk, placement)
    sizes = [
        kept_size(
            pattern,
            config.num_heads,
            config.kv_heads,
            config.head_dim,
            batch=2,
            dtype=torch.float32,
            seq_len=length,
            chunk_tokens=chunk,
            spread=placement.spread,
        )
        for pattern in layer_patterns(config, length)
    ]
    assert held.rows == sum(size.rows for size in sizes)
    assert held.kept <= sum(size.rows + size.gradients for size in sizes)
    if placement.memory is not None:
        assert held.on_device <= sum(size.near + size.near_gradients for size in sizes)


def test_rows_are_kept_where_they_fit():
    """The paper's small model, strides up to 133,120 with 16 skips, and 4M tokens: 90 GB of kept rows."""
    gib = 2**30
    model = replace(
        PRESETS["small"], vocab_size=50304, window=64, stride=65, num_skips=16, schedule="doubling"
    )

    def plan(device, host, where="auto", context=2**22, chunk_tokens=2**16, **changes):
        chunks = {"context": context, "chunk_tokens": chunk_tokens}
        training = TrainingConfig(**chunks, precision="bf16", kept_rows=where)
        config = Config(model=replace(model, **changes), training=training)
        return plan_kept_rows(config, Memory(device, host))

    whole = plan(79 * gib, 115 * gib)
    assert whole.host and whole.spread and 85e9 < whole.size.rows < 95e9
    assert "keeps 82.5 GiB" in whole.describe() and "in host memory" in whole.describe()
    assert not plan(79 * gib, 115 * gib, num_layers=6).host  # strides up to 2080
    assert plan(79 * gib, 115 * gib, "host", num_layers=6).host
    # 42.7 GiB of rows and gradients fit, but not beside 31 GiB of a chunk's activations and 6 of states
    medium = {"num_layers": 24, "hidden_size": 1024, "num_heads": 16, "schedule": "fixed"}
    medium |= {"strides": [65, 1105, 18785, 125_000] + [65] * 20}
    assert plan(79 * gib, 115 * gib, context=2**21, chunk_tokens=2**15, **medium).host
    assert not plan(79 * gib, 115 * gib, context=2**21, chunk_tokens=2**14, **medium).host
    assert not plan(None, None).host and "on the device" in plan(None, None).describe()
    long = {"num_layers": 4, "strides": [65, 1105, 18785, 250_000], "chunk_tokens": 2**14}
    assert plan(79 * gib, 80 * gib, **long).spread
    assert not plan(30 * gib, 80 * gib, **long).spread  # gradients go to host memory too
    for device, host, where in ((79, 80, "auto"), (79, 500, "device"), (10, 500, "auto"), (None, 80, "auto")):
        with pytest.raises(ConfigError, match=r"kept rows \(82.5 GiB\) and .* does not hold"):
            plan(device and device * gib, host * gib, where)


@pytest.mark.parametrize("tile", [None, 128])
def test_offloaded_inputs_take_the_closed_form_or_are_refused(tile):
    offload = {"activation_checkpointing": True, "activation_offload": True, "mlp_tile_tokens": tile}
    config = Config(
        model=ModelConfig(num_layers=6, hidden_size=64, num_heads=2, vocab_size=100),
        training=TrainingConfig(context=500, **offload),
    )
    model, tokens = PiTransformer.of_run(config, "cpu"), torch.randint(0, 100, (1, 500))
    for _ in range(2):
        model(tokens, tokens).backward()
    held = {buffer.untyped_storage()._cdata: buffer.untyped_storage().nbytes()
            for buffers in model.host_memory._free.values() for buffer in buffers}  # fmt: skip
    assert sum(held.values()) == offloaded_bytes(config) == 2**20 * (1 if tile is None else 2)
    check_offload(config, offloaded_bytes(config))
    with pytest.raises(ConfigError, match=r"activation_offload: .* \([12].0 MiB\) <= .* \(1000.0 KiB\)"):
        check_offload(config, 1000 * 2**10)


def test_gradients_of_kept_rows_add_up_in_fp32():
    """256 gradients of 2^-9 that come to a row of bf16 after one of 1; in bf16 each would be rounded away."""
    kept, k = KeptKeys(8, 4, True, Placement()), torch.zeros(1, 4, 1, 2, dtype=torch.bfloat16)
    plan = make_plan(PiPattern(3, 9), 1, 1, 8, 1, 0, False, 4, 0)
    kept.keep(plan, k, k, PiPattern(3, 9))
    assert plan.kept == ((Run(1, 4),),)
    for size in (1.0, *[2.0**-9] * 256):
        kept.add(0, Run(1, 4), *[torch.full((1, 3, 1, 2), size)] * 2)
    dk, dv = torch.zeros_like(k), torch.ones_like(k)
    kept.give_back(plan, dk, dv)
    assert dk[0, :, 0, 0].tolist() == [0, 1.5, 1.5, 1.5] and dv[0, :, 0, 0].tolist() == [1, 2.5, 2.5, 2.5]


def test_evaluation_forgets_what_no_later_chunk_needs(monkeypatch):
    held, config = Held(monkeypatch), replace(MODEL, strides=[5, 40], num_skips=2, vocab_size=13)
    batch = Batch(*sequences(1024, "none", 0), starts=(0,), row_start=0)
    model = make_model(config, 1024, False, torch.float32).eval()
    evaluated_loss(model, Mesh(0, 1, 1, torch.device("cpu"), None), batch, ParallelConfig(), 64)
    assert 0 < held.now() <= (2 * 10 + 3 * 64) * 2 * 2 * 2 * 6 * 4


MEASURE = """
import resource, sys
import torch
from pi_dist.config import PRESETS, Config, ConfigError, ModelConfig, ParallelConfig, TrainingConfig
from pi_dist.data.loader import Batch
from pi_dist.model.transformer import PiTransformer
from pi_dist.parallel.mesh import Mesh
from pi_dist.training.streaming import streamed_losses
import yaml

length, chunk_tokens = int(sys.argv[1]), int(sys.argv[2])
settings = yaml.safe_load(open("launch/configs/quickstart.yaml"))["model"]
model = PiTransformer(ModelConfig(vocab_size=4096, **settings), 4096)
optimizer = torch.optim.AdamW(model.parameters())
tokens = torch.randint(0, 4096, (1, length), generator=torch.Generator().manual_seed(0))
segment_ids = torch.zeros(1, length, dtype=torch.int32)
batch = Batch(tokens, tokens.roll(-1, 1), segment_ids, (0,), 0)
mesh = Mesh(0, 1, 1, torch.device("cpu"), None)
for loss in streamed_losses(model, mesh, batch, ParallelConfig(), 0, chunk_tokens):
    (loss / length).backward()
optimizer.step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def peak_mib(length, chunk_tokens):
    """Peak memory of a process that trains the quickstart's model on one sequence, one optimizer step."""
    command = [sys.executable, "-c", MEASURE, str(length), str(chunk_tokens)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def kept_mib(length, chunk_tokens):
    """The docstring's formula for the quickstart's model: reaches 64, 128, 256, 512; fp32; 6 heads of 32."""
    rows = sum(min(reach, chunk_tokens) for reach in (64, 128, 256, 512))
    return length / chunk_tokens * rows * 2 * 6 * 32 * 4 / 2**20


@pytest.mark.slow
@pytest.mark.parametrize(("length", "chunk_tokens"), [(2**17, 4096), (2**20, 8192)])
def test_long_sequences_train_in_bounded_memory_on_a_cpu(length, chunk_tokens):
    """131,072 and 1,048,576 tokens in one step need what 32,768 need, within a tenth, and what is kept."""
    short = 2**15
    more = kept_mib(length, chunk_tokens) - kept_mib(short, chunk_tokens)
    more += (length - short) * 20 / 2**20  # token ids, labels and documents
    needed = peak_mib(short, chunk_tokens)
    found = peak_mib(length, chunk_tokens)
    print(
        f"{length} tokens in chunks of {chunk_tokens}: {found} MiB; "
        f"{short}: {needed} MiB, and {more:.0f} more is kept"
    )
    assert found <= 1.1 * needed + more
