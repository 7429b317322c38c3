"""The benchmark of sequence parallelism: real ranks, counted bytes equal to closed forms, records."""

import contextlib
import gc
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed import Ranks
from hypothesis import given
from hypothesis import strategies as st
from test_cli import ENVIRONMENT
from test_key_exchange import rows_by_brute_force
from test_watchdog import is_alive

from pi_dist.config import PRESETS, Config, ParallelConfig, TrainingConfig, UserError, check
from pi_dist.measure import sp_bench
from pi_dist.measure.cost_model import exchanged_bytes, rebalanced_bytes, rows_received
from pi_dist.measure.figures import draw_timeline
from pi_dist.measure.record import STEP, kept_records, resume, source_hash
from pi_dist.measure.steps import random_batch
from pi_dist.measure.timeline import Kernel, counted_bytes, exposed_ms
from pi_dist.model.attention import SequenceContext
from pi_dist.model.transformer import PiTransformer
from pi_dist.ops import PiPattern
from pi_dist.parallel.mesh import make_mesh


@given(st.integers(0, 40), st.integers(1, 30), st.integers(0, 5), st.integers(1, 12), st.integers(0, 5))
def test_rows_received_equal_those_of_the_definition(window, stride, num_skips, length, rank):
    shard = (rank * length, (rank + 1) * length)
    pattern = PiPattern(window, stride, num_skips=num_skips)
    halo, skip = rows_by_brute_force(pattern, [stride], shard, shard[1])
    assert rows_received(window, stride, num_skips, shard[0], length) == len(halo | skip)


def test_equation_8_is_a_case_of_the_closed_form():
    """`4·B·H_kv·head_dim·π` bytes in bf16 at M = 1, of an interior rank, one way."""
    assert rows_received(4, 16, 1, 1024, 512) == 16
    assert rows_received(4, 16, 3, 1024, 512) == 48


def run_bench(path, contexts, methods, **options):
    complete = sp_bench.bench(path, ["tiny"], contexts, methods, device="cpu", **options)
    return complete, dist.get_rank()


def rows_of(path):
    return json.loads(path.read_text())["rows"]


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """A record of two ranks."""
    path = tmp_path_factory.mktemp("bench") / "sp.json"
    with Ranks(2) as ranks:
        methods = ["pi", "window", "ring", "ulysses", "dense"]
        assert ranks.run(run_bench, str(path), [256, 512], methods) == [(True, 0), (True, 1)]
    return path


def test_every_method_and_mode_is_measured_and_sends_what_its_formula_says(record):
    rows = rows_of(record)
    assert {row["method"] for row in rows} == {"pi", "window", "ring", "ulysses"}  # dense takes one rank
    modes = {(row["overlap"], row["exchange"]) for row in rows}
    assert modes == {
        (overlap, exchange)
        for overlap in ("none", "interior", "pipelined")
        for exchange in ("ring_all_to_all", "all_to_all")
    }
    apart = [row for row in rows if row["sp_degree"] == 1]
    assert [(row["num_skips"], row["tokens"], row["batch"]) for row in apart] == [
        (skips, tokens, 2) for skips in (16, 1, 0) for tokens in (128, 256)
    ]
    for row in rows:
        assert row["measured"] and row["fits"] and row["ms"] > 0
        assert row["bytes_sent"] == row["bytes_formula"], row
        assert (row["bytes_sent"] > 0) == (row["sp_degree"] == 2)
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] * row["batch"] / row["ms"] * 1e3, rel=1e-2)
        assert row["reach"] >= 0 and 0 <= row["covered_share"] <= 1
    assert {row["reach"] for row in rows if row["method"] == "ring"} == {255, 511}


def test_replicas_of_two_ranks_send_what_their_formula_says(tmp_path):
    """A replica has a part of the batch."""
    path = tmp_path / "sp.json"
    with Ranks(4) as ranks:
        assert ranks.run(run_bench, str(path), [512], ["window"])[0] == (True, 0)
    rows = rows_of(path)
    assert [(row["sp_degree"], row["batch"]) for row in rows] == [(4, 1), (2, 2), (1, 4)]
    assert all(row["bytes_sent"] == row["bytes_formula"] for row in rows), rows
    assert [row["bytes_sent"] > 0 for row in rows] == [True, True, False]


RANK = """
import time
from pi_dist.measure.steps import end_with_parent
end_with_parent()
print("ready", flush=True)
time.sleep(600)
"""
LAUNCHER = """
import subprocess, sys
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE)
rank.stdout.readline()
print(rank.pid)
"""


def test_a_rank_ends_soon_after_its_launcher():
    """Else it would wait for others, on a GPU that somebody else measures on."""
    command = [sys.executable, "-c", LAUNCHER, RANK]
    ended = subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.PIPE, timeout=240, check=True)
    until = time.monotonic() + 120
    while is_alive(int(ended.stdout)):
        assert time.monotonic() < until
        time.sleep(0.1)


def test_a_record_is_resumed_and_takes_the_baseline_of_one_rank(record):
    before = rows_of(record)
    with Ranks(2) as ranks:
        ranks.run(run_bench, str(record), [256, 512], ["pi", "ring"])
    assert rows_of(record) == before
    with Ranks(1) as ranks:
        ranks.run(run_bench, str(record), [128], ["window", "dense"])
    added = rows_of(record)[len(before) :]
    assert [(row["method"], row["world_size"], row["bytes_sent"]) for row in added] == [
        ("window", 1, 0),
        ("dense", 1, 0),
    ]


def test_what_cannot_be_split_or_ended_the_process_is_a_row_in_words(tmp_path):
    path = tmp_path / "sp.json"
    with Ranks(2) as ranks:
        ranks.run(run_bench, str(path), [65], ["ulysses"])
        (row,) = rows_of(path)
        assert row["ms"] is None and "(65) % sp_degree (2) == 0 does not hold" in row["note"]
        record = json.loads(path.read_text())
        attempted = sp_bench.Setup("tiny", "ulysses", 2, 4, 16, 0)
        record["settings"]["attempting"] = [*vars(attempted).values(), 64, 2]  # as if it had ended the job
        path.write_text(json.dumps(record))
        ranks.run(run_bench, str(path), [64, 128], ["ulysses"])
    found = [(row["tokens"], row["fits"], row["measured"]) for row in rows_of(path)]
    assert found == [(65, None, False), (64, None, False), (128, True, True)]
    assert "the process ended" in rows_of(path)[1]["note"]


def out_of_memory(path):
    """What a benchmark says whose steps run out of memory; what it says when it is run again."""
    measure, said = sp_bench.measure, []

    def fail(*_):
        raise torch.OutOfMemoryError("no memory")

    for replacement in (fail, measure):
        sp_bench.measure = replacement
        try:
            sp_bench.bench(path, ["tiny"], [128, 256], ["ring"], device="cpu")
        except UserError as error:
            said.append(str(error))
    return said


def test_out_of_memory_ends_the_process_and_is_not_tried_again(tmp_path):
    path = tmp_path / "sp.json"
    with Ranks(2) as ranks:
        said = ranks.run(out_of_memory, str(path))
    assert said == [["bench sp: out of memory, which is in the record; run it again to go on"]] * 2
    rows = [(row["tokens"], row["fits"], row["measured"], row["note"]) for row in rows_of(path)]
    assert rows == [
        (128, False, True, "out of memory"),
        (256, False, False, "out of memory at a shorter context"),
    ]


def interrupted(path):
    """What is noted as being attempted, and the rows, after an interrupted benchmark and a whole one."""
    measure, contents = sp_bench.measure, []

    def stop(*_):
        raise KeyboardInterrupt

    for replacement in (stop, measure):
        sp_bench.measure = replacement
        with contextlib.suppress(KeyboardInterrupt):
            sp_bench.bench(path, ["tiny"], [128], ["ring"], device="cpu")
        dist.barrier()
        contents.append(json.loads(Path(path).read_text()))
        dist.barrier()
    return [(content["settings"]["attempting"], len(content["rows"])) for content in contents]


def test_an_interrupted_measurement_is_made_again(tmp_path):
    with Ranks(2) as ranks:
        assert ranks.run(interrupted, str(tmp_path / "sp.json")) == [[(None, 0), (None, 1)]] * 2


def test_time_is_checked_before_every_measurement(tmp_path):
    with Ranks(2) as ranks:
        options = {"minutes": 0.0}
        (complete, _), _ = ranks.run(run_bench_for, str(tmp_path / "sp.json"), [128], ["window"], options)
    assert not complete


def test_a_row_is_not_begun_that_the_time_left_is_too_short_for(tmp_path):
    """Killed at a time limit, it would be noted as what ended its process, and never be measured."""
    path = tmp_path / "sp.json"
    with Ranks(2) as ranks:
        options = {"minutes": 5 / 60}  # of the second row, the timed steps alone are expected to take 8 s
        for rows in (1, 2):  # what is not begun in one slice is the first of the next
            ranks.run(run_bench_for, str(path), [128, 256], ["ring"], options)
            assert [row["tokens"] for row in rows_of(path)] == [128, 256][:rows]


def test_the_time_of_a_row_is_expected_from_the_context_before():
    rows = [{"tokens": 100, "ms": 1000.0}, {"tokens": 200, "ms": 4000.0}, {"tokens": 800, "ms": None}]
    exact, linear = (sp_bench.Setup("tiny", method, 2, 4, 16, 0) for method in ("ring", "window"))
    assert sp_bench.expected_s(rows, exact, 400) == pytest.approx(5 * 16)
    assert sp_bench.expected_s(rows, linear, 400) == pytest.approx(5 * 8)
    assert sp_bench.expected_s(rows, linear, 200) == pytest.approx((3 + 3) * 2 + 8)
    assert sp_bench.expected_s(rows, linear, 100) == 0


def run_bench_for(path, contexts, methods, options):
    return run_bench(path, contexts, methods, **options)


def test_a_timeline_is_drawn_and_one_without_exchange_refused(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    kernels = [
        ["gemm", "compute", 0, 300],
        ["nccl SendRecv", "exchange", 100, 200],
        ["gemm", "compute", 310, 600],
    ]
    row = {"method": "pi", "window": 4, "num_skips": 1, "tokens": 64, "world_size": 2}
    row |= {"overlap": "interior", "exchange": "all_to_all", "exposed_share": 0.01}
    trace = tmp_path / "trace.json"
    trace.write_text(json.dumps({"row": row, "kernels": kernels}))
    draw_timeline(trace, tmp_path / "step.svg")
    assert "rows travel" in (tmp_path / "step.svg").read_text()
    trace.write_text(json.dumps({"row": row, "kernels": kernels[:1]}))
    with pytest.raises(UserError, match="nothing to draw"):
        draw_timeline(trace, tmp_path / "none.svg")


def test_more_ranks_than_there_are_are_predicted(tmp_path):
    """Every row says so; what cannot be split is a row in words."""
    path = tmp_path / "sp.json"
    flags = ["--presets", "small", "--contexts", "131072", "--ranks", "4,8", "--gpu", "H200"]
    command = [sys.executable, "-m", "pi_dist", "bench", "sp", "--json", str(path), *flags]
    for gpu, status in (("H200", 0), ("H200", 0), ("B9", 2)):  # twice: it is gone on with
        ended = subprocess.run([*command[:-1], gpu], env=ENVIRONMENT, capture_output=True, text=True)
        assert ended.returncode == status, ended.stderr
    assert "gpu: 'B9' in" in ended.stderr
    none = [*command[:-1], "H200", "--methods", "dense", "--json", str(tmp_path / "none.json")]
    ended = subprocess.run(none, env=ENVIRONMENT, capture_output=True, text=True)
    assert ended.returncode == 2 and "ranks (4, 8) == 1 for dense" in ended.stderr
    assert not (tmp_path / "none.json").exists()
    rows = {(row["method"], row["num_skips"], row["world_size"]): row for row in rows_of(path)}
    assert len(rows) == len(rows_of(path)) == 10 and not any(row["measured"] for row in rows.values())
    assert "num_kv_heads (12) % parallel.sp_degree (8)" in rows["ulysses", 0, 8]["note"]
    whole = [row for row in rows.values() if row["ms"] is not None]  # of the GPU, not of what predicts
    assert all(row["compiled"] and 0.2 < row["mfu"] < 0.9 and row["reserved_mib"] is None for row in whole)
    measured = kept_records()["sp_four_h200"]["rows"]
    for row in (row for row in measured if (row["sp_degree"], row["tokens"]) == (4, 131072)):
        predicted = rows[row["method"], row["num_skips"], 4]
        assert predicted["ms"] == pytest.approx(row["ms"], rel=0.1)
        assert predicted["bytes_formula"] == row["bytes_sent"]


def refused(path, presets, methods, reason):
    with pytest.raises(UserError, match=reason):
        sp_bench.bench(path, presets, [64], methods, device="cpu")


@pytest.mark.parametrize(
    ("num_ranks", "preset", "method", "reason"),
    [
        (2, "huge", "pi", r"presets \(huge\) in .* does not hold"),
        (2, "tiny", "flash", r"methods \(flash\) in .* does not hold"),
        (2, "tiny", "dense", r"ranks \(2\) == 1 for dense, .* does not hold for methods \(dense\)"),
        (1, "tiny", "ring", r"ranks \(1\) == 1 for dense, > 1 for ring .* for methods \(ring\)"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path, ranks, num_ranks, preset, method, reason):
    ranks(num_ranks).run(refused, str(tmp_path / "sp.json"), [preset], [method], reason)


def test_prediction_beyond_a_minute_a_step_goes_through_the_last_two_measurements():
    def row(tokens, ms, peak):
        return {
            "tokens": tokens,
            "ms": ms,
            "peak_mib": peak,
            "reserved_mib": None,
            "measured": True,
            "fits": True,
        }

    rows = [row(10, 7.0, 1.0), row(100, 2 * 100 + 3 * 100**2, 30.0), row(200, 2 * 200 + 3 * 200**2, 50.0)]
    found = sp_bench.predicted(rows, 1000)
    assert found["ms"] == pytest.approx(2 * 1000 + 3 * 1000**2) and found["peak_mib"] == pytest.approx(210)
    assert sp_bench.predicted(rows[:1], 1000) is None


def test_exposed_time_is_what_no_compute_kernel_covers():
    kernels = [
        Kernel("gemm", "compute", 0, 1000),
        Kernel("ncclDevKernel_SendRecv", "exchange", 500, 1500),  # 500 µs under gemm
        Kernel("gemm", "compute", 1400, 1600),  # and 100 under this one
        Kernel("ncclDevKernel_SendRecv", "exchange", 1450, 1700),  # 200 of its own, half of it covered
        Kernel("ncclDevKernel_AllReduce", "collective", 3000, 3100),
    ]
    assert exposed_ms(kernels, "exchange") == pytest.approx((1.2, 0.5))
    assert exposed_ms(kernels, "collective") == pytest.approx((0.1, 0.1))


def count_on_a_rank():
    """Bytes to others of an uneven and an even all_to_all_single and of a send."""
    rank = dist.get_rank()
    with counted_bytes() as sent:
        uneven = torch.zeros(5)
        dist.all_to_all_single(
            torch.empty(2 if rank == 0 else 8), uneven, [1, 1] if rank == 0 else [4, 4], [1, 4]
        )
        dist.all_to_all_single(torch.empty(4, 3), torch.zeros(4, 3))
        other, buffer = 1 - rank, torch.empty(7)
        operations = [dist.P2POp(dist.isend, torch.zeros(7), other), dist.P2POp(dist.irecv, buffer, other)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    return sent


def test_bytes_to_others_are_counted(ranks):
    assert ranks(2).run(count_on_a_rank) == [
        {"all_to_all_single": [16, 24], "isend": [28]},
        {"all_to_all_single": [4, 24], "isend": [28]},
    ]


def mixed_step_on_a_rank(config):
    """Bytes that a rank sends in the forward and backward passes of a stack of a ring between others."""
    mesh = make_mesh(config.parallel.sp_degree, torch.device("cpu"))
    model, batch = PiTransformer.of_run(config, "cpu"), random_batch(config, mesh)
    context = SequenceContext(starts=batch.starts, group=mesh.sp_group)
    with counted_bytes() as sent:
        model(batch.tokens, batch.labels, context).backward()
    return sum(map(sum, sent.values()))


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 5])
@pytest.mark.parametrize("recomputed", [False, True])
def test_a_ring_among_other_layers_sends_what_the_formula_says(num_ranks, recomputed):
    training = TrainingConfig(
        context=60 * num_ranks, batch_size=2, micro_batch_size=2, precision="fp32",
        activation_checkpointing=recomputed,
    )  # fmt: skip
    model = replace(PRESETS["tiny"], num_layers=3, num_kv_heads=2, method=["pi", "ring", "window"])
    config = Config(model=model, training=training, parallel=ParallelConfig(sp_degree=num_ranks))
    check(config, num_ranks)
    with Ranks(num_ranks) as ranks:
        sent = ranks.run(mixed_step_on_a_rank, config)
    assert sum(sent) / num_ranks == pytest.approx(sum(exchanged_bytes(config, i) for i in range(3)), abs=0.5)
    assert rebalanced_bytes(config) > 0
    alone = replace(config, model=replace(model, method="ring"))
    more = 2 * rebalanced_bytes(config)  # of two sequences
    assert exchanged_bytes(config, 1) - exchanged_bytes(alone, 1) == pytest.approx(more)


def models_left(path):
    """How many models live on after a benchmark of several setups."""
    sp_bench.bench(path, ["tiny"], [128], ["pi", "window"], device="cpu")
    return sum(isinstance(found, PiTransformer) for found in gc.get_objects())


def gone_on_with(path):
    """Rows added to a record that kept nothing of attempts; others are refused."""
    record = json.loads(Path(path).read_text())
    other = Path(path).with_name("other.json")
    for changed, key in (({"precision": "bf16"}, "precision"), ({"source": "of old"}, "source")):
        other.write_text(json.dumps(record | {"settings": record["settings"] | changed}))
        with pytest.raises(UserError, match=rf"{key} of the record \(.*\) == "):
            run_bench(str(other), [128], ["window"])
    run_bench(path, [128], ["window"])
    return len(rows_of(Path(path)))


def test_a_record_is_gone_on_with_and_that_of_another_benchmark_or_source_refused(tmp_path):
    path = tmp_path / "sp.json"
    settings = {"precision": "fp32", "activation_checkpointing": True, "data": "random tokens"}
    settings["source"] = source_hash(STEP)
    path.write_text(json.dumps(resume(None, settings)))
    with Ranks(1) as ranks:
        assert ranks.run(gone_on_with, str(path)) == [1]


@pytest.mark.slow
def test_a_setup_leaves_no_memory_to_the_next(tmp_path):
    """DeepSpeed's hooks keep an engine alive unless it is told to let go."""
    with Ranks(2) as ranks:
        assert ranks.run(models_left, str(tmp_path / "sp.json")) == [0, 0]
