"""The same checks as on gloo, on two and four GPUs over NCCL. Skipped, with the reason, where there are none.

Or on two nodes with a GPU each, by torchrun."""

from dataclasses import replace

import pytest
import test_cuda_graph
import test_key_exchange
import test_launch
import test_training_parity
import torch
from distributed import Ranks

from pi_dist.measure import savings
from pi_dist.measure.fake_ranks import Request
from pi_dist.measure.workers import measured_apart
from pi_dist.ops import PiPattern

COMPILING_S = 400.0  # ranks compile their kernels, the first time

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(scope="module")
def pair():
    with Ranks(2, backend="nccl", timeout_s=COMPILING_S) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def four():
    if torch.cuda.device_count() < 4:
        pytest.skip("needs four GPUs")
    with Ranks(4, backend="nccl", timeout_s=COMPILING_S) as ranks:
        yield ranks


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("strides", [5, 21, (3, 3, 9, 9)])
def test_exchange_equals_the_oracle(pair, strides, causal, fused):
    """Bidirectional too: both neighbours of a rank are the same rank, and halos must not swap."""
    pattern = PiPattern(3, strides, causal=causal, num_skips=2)
    arguments = (0, 2, 32, 4, 2, True, "padded")
    options = {"dropout_p": 0.2, "seed": 3}
    test_key_exchange.check_equal(pair, pattern, options, arguments, fused, device="cuda")


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_gradients_equal_one_process_in_every_zero_stage(pair, activation_checkpointing):
    options = {"activation_checkpointing": activation_checkpointing}
    options["clip_norm"] = test_training_parity.CLIP_NORM
    test_training_parity.check(
        pair.run(test_training_parity.on_a_rank, 2, [0, 1, 2, 3], options, True, "cuda")
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("activation_checkpointing", [False, True])
@pytest.mark.parametrize("method", ["pi", "window", "ring", "ulysses", ["pi", "ring"]], ids=str)
def test_every_method_equals_one_process(pair, method, activation_checkpointing, precision):
    model = replace(test_training_parity.MODEL, method=method, attention_dropout=0.0)
    options = {"activation_checkpointing": activation_checkpointing, "precision": precision}
    found = pair.run(test_training_parity.on_a_rank, 2, [1, 2, 3], options, False, "cuda", model)
    if precision == "fp32":
        test_training_parity.check(found, model=model)
    else:
        test_training_parity.check_bf16(pair, found, model, "cuda")


@pytest.mark.parametrize("exchange", ["ring_all_to_all", "all_to_all"])
@pytest.mark.parametrize("method", ["pi", "window", "ring", "ulysses", ["pi", "ring"]], ids=str)
def test_whole_sequences_and_heads_of_64_equal_one_process(pair, method, exchange):
    """As the benchmark has them: exact attention by PyTorch's kernels, ours with tensor cores."""
    wide = {"hidden_size": 256, "num_kv_heads": 4, "attention_dropout": 0.0}
    model = replace(test_training_parity.MODEL, method=method, **wide)
    arguments = (2, [1], {"precision": "bf16"}, False, "cuda", model, {"exchange": exchange}, False)
    found = pair.run(test_training_parity.on_a_rank, *arguments)
    test_training_parity.check_bf16(pair, found, model, "cuda", documents=False)


@pytest.mark.parametrize("sp", [4, 2])
@pytest.mark.parametrize("method", ["pi", "window", "ring", "ulysses", ["pi", "ring"]], ids=str)
def test_four_ranks_equal_one_process(four, method, sp):
    """One sequence over all of them, and two replicas of two."""
    model = replace(test_training_parity.MODEL, num_kv_heads=4, method=method, attention_dropout=0.0)
    found = four.run(test_training_parity.on_a_rank, sp, [1, 2, 3], {}, False, "cuda", model)
    test_training_parity.check(found, model=model)


@pytest.mark.parametrize(("overlap", "chunk_tokens"), [("pipelined", None), ("interior", 8), ("none", None)])
def test_every_overlap_and_chunks_equal_one_process(pair, overlap, chunk_tokens):
    options = {"micro_batch_size": 2, "chunk_tokens": chunk_tokens}
    exchange = {"overlap": overlap, "exchange": "ring_all_to_all" if overlap == "interior" else "all_to_all"}
    arguments = (2, [1, 2, 3], options, False, "cuda", test_training_parity.MODEL, exchange)
    test_training_parity.check(pair.run(test_training_parity.on_a_rank, *arguments))


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_compiled_blocks_equal_one_process(pair, stage):
    """In bf16 parameters of a layer start at other multiples of 16 bytes, or none, than those of another."""
    options = {"precision": "bf16", "compile": True}
    found = pair.run(test_training_parity.on_a_rank, 2, [stage], options, False, "cuda")
    test_training_parity.check_bf16(pair, found, device="cuda")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_gradients_stay_within_the_error_of_bf16(pair, stage):
    """With dropout too."""
    found = pair.run(test_training_parity.on_a_rank, 2, [stage], {"precision": "bf16"}, False, "cuda")
    test_training_parity.check_bf16(pair, found, device="cuda")


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("overlap", ["interior", "none", "pipelined"])
def test_replayed_exchange_changes_no_bit(pair, overlap, documents):
    options = {"overlap": overlap, "exchange": "all_to_all" if overlap == "none" else "ring_all_to_all"}
    found = pair.run(test_cuda_graph.on_a_rank, 2, {}, options, {"micro_batch_size": 2}, documents)
    test_cuda_graph.check_equal(found)


@pytest.mark.parametrize("method", ["window", "ring", "ulysses", ["pi", "ring"]], ids=str)
def test_replayed_steps_of_every_method_are_the_same(pair, method):
    found = pair.run(test_cuda_graph.on_a_rank, 2, {"method": method}, {}, {}, False)
    test_cuda_graph.check_equal(found, 0.0 if method == "window" else 1e-3)


@pytest.mark.parametrize(
    ("method", "stage"), [("pi", 1), ("pi", 2), ("pi", 3), ("window", 1), ("ring", 1), ("ulysses", 1)]
)
def test_the_memory_of_a_fake_rank_is_that_of_real_ones(method, stage):
    """The small model at 65,536 tokens, its time measured too; prints both (-s)."""
    config = savings.config_of("small", method, False, 65536, 2, savings.Terms(zero_stage=stage))
    request = Request(config, 2, None, timed_steps=1, forward_too=False)
    (real,), (fake,) = measured_apart([request]), measured_apart([replace(request, rank=1)])
    print(method, stage, real, fake, sep="\n")
    assert real["status"] == fake["status"] == "ok" and fake["fake"] and not real["fake"]
    assert fake["peak_mib"] == pytest.approx(real["peak_mib"], rel=0.03)


def test_a_lost_node_of_two_comes_back_over_sockets(corpus, tmp_path):
    """Two torchruns with a GPU each, which reach one another by NCCL's sockets alone."""
    sockets = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_IB_DISABLE": "1"}
    said = {"NCCL_DEBUG": "INFO"}
    environments = [sockets | said | {"CUDA_VISIBLE_DEVICES": str(node)} for node in range(2)]
    whole = test_launch.config_for(corpus, tmp_path / "whole" / "run", "cuda")
    ended = test_launch.two_torchruns(whole, tmp_path / "whole", environments)
    assert ended == [0, 0], (tmp_path / "whole" / "log-0").read_text()
    expected = test_launch.losses(tmp_path / "whole" / "run")
    assert len(expected) == 8
    text = test_launch.check_a_lost_node(corpus, tmp_path / "lost", "cuda", environments, expected, 1e-5)
    assert "NET/Socket" in text and "via P2P" not in text and "via SHM" not in text
