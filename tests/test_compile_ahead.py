"""Which calls of the operator are compiled before the first step; test_kernel_shards.py compares launches."""

import importlib.util
from dataclasses import replace

import pytest
import torch

from pi_dist.config import Config, ModelConfig, ParallelConfig, TrainingConfig
from pi_dist.ops.pattern import layer_patterns
from pi_dist.parallel.mesh import Mesh
from pi_dist.training.compile_ahead import compile_ahead, kernel_calls

if importlib.util.find_spec("triton") is None:  # not imported here: see kernel_calls.py
    pytest.skip("needs triton", allow_module_level=True)

MODEL = ModelConfig(num_layers=4, hidden_size=64, num_heads=4, vocab_size=64, window=4, stride=16)


def calls(config, sp_degree=1, rank=0):
    mesh = Mesh(rank, sp_degree, sp_degree, torch.device("cpu"), None)
    return list(kernel_calls(config, layer_patterns(config.model, config.training.context), mesh))


def test_layers_that_are_alike_are_asked_for_once_and_exact_ones_never():
    training = TrainingConfig(context=256, micro_batch_size=2, precision="bf16")
    (call,) = calls(Config(model=MODEL, training=training))
    assert (call.batch, call.q_len, call.num_heads, call.head_dim) == (2, 256, 4, 16)
    assert call.dtype == torch.bfloat16 and call.gated and call.labelled
    mixed = replace(MODEL, method=["pi", "dense", "window", "pi"], schedule="doubling")
    found = calls(Config(model=mixed, training=training))
    assert [(c.spec.pattern.strides, c.spec.pattern.num_skips) for c in found] == [(16, 1), (64, 0), (128, 1)]


def test_a_rank_asks_for_the_rows_that_it_receives():
    config = Config(
        model=MODEL,
        parallel=ParallelConfig(sp_degree=2, overlap="pipelined"),
        training=TrainingConfig(context=256, micro_batch_size=2),
    )
    (first,), (last,) = calls(config, 2, 0), calls(config, 2, 1)
    assert (first.batch, first.q_len) == (last.batch, last.q_len) == (1, 128)
    assert [block.run for block in first.spec.blocks] == [(0, 128)]
    assert [block.run for block in last.spec.blocks] == [(128, 256), (112, 128)]
    assert (first.spec.query_start, last.spec.query_start) == (0, 128)


def test_of_chunks_the_first_one_in_the_middle_and_the_last():
    config = Config(model=MODEL, training=TrainingConfig(context=256 * 9 + 64, chunk_tokens=256))
    found = calls(config)
    assert [call.spec.query_start for call in found] == [0, 256, 1024, 2304]
    assert [call.q_len for call in found] == [256, 256, 256, 64]


def test_nothing_is_compiled_without_a_gpu():
    mesh = Mesh(0, 1, 1, torch.device("cpu"), None)
    assert compile_ahead(Config(model=MODEL), layer_patterns(MODEL, 64), mesh) is None
