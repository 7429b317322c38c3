"""The benchmark of whole steps: rows, resuming, what does not fit, and which kernels belong to what."""

import gc
import json

import pytest
import torch
from distributed import Ranks

from pi_dist.config import UserError
from pi_dist.measure import step_bench
from pi_dist.measure.figures import draw_steps
from pi_dist.measure.steps import model_of
from pi_dist.measure.timeline import PARTS, Kernel, Profile, busy_ms, parts_ms
from pi_dist.model.transformer import PiTransformer


def run_bench(path, contexts, streamed, minutes=8.0):
    return step_bench.bench(path, ["tiny"], contexts, streamed, minutes=minutes, device="cpu")


def rows_of(path):
    return json.loads(path.read_text())["rows"]


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "step.json"
    with Ranks(1) as ranks:
        assert ranks.run(run_bench, str(path), [128, 96], [256]) == [True]
    return path


def test_every_series_is_measured(record):
    rows = rows_of(record)
    assert all(row["measured"] and row["fits"] and row["ms"] > 0 for row in rows)
    usual = {"engine": "deepspeed", "eager": False, "cuda_graphs": None, "window": 4}

    def compared(row):
        return any(row[key] != value for key, value in usual.items())

    plain = [row for row in rows if not compared(row)]
    policies = [(row["activation_checkpointing"], row["chunk_tokens"], row["tokens"]) for row in plain]
    whole = [(policy, None, tokens) for policy in (False, "selective", True) for tokens in (96, 128)]
    assert policies == [*whole, (False, 256, 256)]
    keys = ("engine", "eager", "cuda_graphs", "window", "tokens")
    assert [tuple(row[key] for key in keys) for row in rows if compared(row)] == [
        ("torch", False, None, 4, 128),
        ("deepspeed", True, None, 4, 128),
        ("deepspeed", False, False, 4, 96),
        ("deepspeed", False, None, 64, 128),
    ]
    for row in rows:
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] * row["batch"] / row["ms"] * 1e3, rel=1e-2)
        assert row["zero_stage"] == (None if row["engine"] == "torch" else 1)
        assert not row["compiled"]  # on a CPU


def test_a_record_is_resumed_and_drawn(record, tmp_path):
    before = rows_of(record)
    with Ranks(1) as ranks:
        assert ranks.run(run_bench, str(record), [96, 128], [256]) == [True]
    assert rows_of(record) == before
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    draw_steps(record, tmp_path / "step.svg")
    assert "tiny, what is cheap again" in (tmp_path / "step.svg").read_text()


def test_time_is_checked_before_every_measurement(tmp_path):
    with Ranks(1) as ranks:
        assert ranks.run(run_bench, str(tmp_path / "step.json"), [96], [], 0.0) == [False]


def out_of_memory(path):
    """A benchmark whose steps without recomputation run out of memory; True if it goes on to its end."""
    measure = step_bench.measure

    def fail(setup, mesh):
        if setup.activation_checkpointing is False:
            raise torch.OutOfMemoryError("no memory")
        return measure(setup, mesh)

    step_bench.measure = fail
    return run_bench(path, [96, 128], [])


def test_out_of_memory_is_a_row_and_longer_contexts_are_not_tried(tmp_path):
    path = tmp_path / "step.json"
    with Ranks(1) as ranks:
        assert ranks.run(out_of_memory, str(path)) == [True]
    found = [(row["tokens"], row["fits"], row["measured"]) for row in rows_of(path)]
    assert found[:3] == [(96, False, True), (128, False, False), (96, True, True)]
    assert "shorter context" in rows_of(path)[1]["note"]


def test_a_setup_that_ended_the_process_is_not_tried_again(tmp_path):
    path = tmp_path / "step.json"
    with Ranks(1) as ranks:
        ranks.run(run_bench, str(path), [96], [])
        content = json.loads(path.read_text()) | {"rows": []}
        content["settings"]["attempting"] = [*vars(step_bench.Setup("tiny", 96)).values()]
        path.write_text(json.dumps(content))
        assert ranks.run(run_bench, str(path), [96], []) == [True]
    first, *others = rows_of(path)
    assert first["note"] == "the process ended while this was measured" and first["fits"] is None
    assert all(row["ms"] > 0 for row in others)


def models_left(path):
    run_bench(path, [96], [128])
    return sum(isinstance(found, PiTransformer) for found in gc.get_objects())


def test_a_setup_leaves_no_memory_to_the_next(tmp_path):
    with Ranks(1) as ranks:
        assert ranks.run(models_left, str(tmp_path / "step.json")) == [0]


def test_several_ranks_are_refused(tmp_path, ranks):
    said = ranks(2).run(refused, str(tmp_path / "step.json"))
    assert all("ranks (2) == 1 does not hold" in text for text in said)


def refused(path):
    with pytest.raises(UserError) as error:
        run_bench(path, [96], [])
    return str(error.value)


def test_kernels_belong_to_parts_by_name_and_products_by_their_weights():
    kernels = [
        Kernel("_pi_attention_fwd_kernel", "compute", 0, 1000),
        Kernel("gemm", "compute", 1000, 3000),
        Kernel("gemm", "compute", 3000, 7000),
        Kernel("gemm", "compute", 7000, 15000),
        Kernel("_cross_entropy_kernel", "compute", 15000, 15500),
        Kernel("ncclDevKernel_AllReduce", "collective", 15200, 15700),
        Kernel("Memcpy HtoD (Pinned -> Device)", "compute", 15700, 15800),
        Kernel("triton_poi_fused_gelu_0", "compute", 16000, 16300),
    ]
    d, vocab = 64, 512
    products = [
        (frozenset((100, d, 3 * d)), 2.0),  # projection
        (frozenset((d, 100, 4 * d)), 4.0),  # weight gradient of the MLP
        (frozenset((100, vocab, d)), 8.0),
    ]
    found = parts_ms(Profile(kernels, products), d, vocab)
    assert list(found) == list(PARTS)
    expected = {"attention": 1.0, "projections": 2.0, "mlp": 4.0, "loss": 8.5, "optimizer": 0.0}
    assert found == pytest.approx(expected | {"communication": 0.5, "data": 0.1, "other": 0.3})
    assert busy_ms(kernels) == pytest.approx(16.1)


def test_shares_add_up_to_the_step():
    config = step_bench.Setup("tiny", 64).config("cpu")
    gradients = Profile([Kernel("_queries_kernel", "compute", 0, 3000)], [])
    update = Profile([Kernel("adam", "compute", 0, 1000), Kernel("nccl", "collective", 1000, 1500)], [])
    found = step_bench.shares(gradients, update, config, 5.0)
    assert found["attention_ms"] == 3.0 and found["optimizer_ms"] == 1.0 and found["communication_ms"] == 0.5
    assert found["idle_ms"] == 0.5 and sum(found.values()) == pytest.approx(5.0)


def test_model_of_a_preset_has_a_vocabulary():
    assert model_of("small").vocab_size == 50304 and model_of("tiny", window=9).window == 9
