"""Every cross-check of the configuration: one line that names the key and prints the failing equation."""

import dataclasses
import math

import pytest

from pi_dist.config import (
    Config,
    ConfigError,
    ParallelConfig,
    TrainingConfig,
    accumulation_steps,
    check,
    compiles,
)

INF = math.inf


def changed(**parts):
    config = Config()
    for part, values in parts.items():
        config = dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **values)})
    return config


@pytest.mark.parametrize(
    ("parts", "world_size", "key", "equation"),
    [
        ({"model": {"num_heads": 7}}, 1, "model.num_heads", "hidden_size (768) % num_heads (7) == 0"),
        ({"model": {"num_kv_heads": 5}}, 1, "model.num_kv_heads", "num_heads (12) % num_kv_heads (5) == 0"),
        ({"model": {"num_kv_heads": 0}}, 1, "model.num_kv_heads", "num_kv_heads (0) >= 1"),
        ({"model": {"hidden_size": 36}}, 1, "model.num_heads", "head_dim (3) % 2 == 0"),
        ({"model": {"window": -1}}, 1, "model.window", "window (-1) >= 0"),
        ({"model": {"stride": 0}}, 1, "model.stride", "stride (0) >= 1"),
        ({"model": {"num_layers": 10**9}}, 1, "model.num_layers", "num_layers (1000000000) <= 1024"),
        ({"model": {"num_heads": 10**8}}, 1, "model.num_heads", "num_heads (100000000) <= 4096"),
        ({"model": {"num_strides": 10**8}}, 1, "model.num_strides", "num_strides (100000000) <= 1024"),
        ({"model": {"num_skips": 10**8}}, 1, "model.num_skips", "num_skips (100000000) <= 1048576"),
        ({"model": {"strides": [4, 8]}}, 1, "model.strides", "len(strides) (2) == num_layers (12)"),
        ({"model": {"strides": [[4]] * 12}}, 1, "model.strides", "len(strides[0]) (1) == num_heads (12)"),
        ({"model": {"strides": [4] * 11 + [0]}}, 1, "model.strides", "strides[11] (0) >= 1"),
        ({"model": {"attention_dropout": 1.0}}, 1, "model.attention_dropout", "attention_dropout (1.0) < 1"),
        ({"model": {"logit_cap": 0.0}}, 1, "model.logit_cap", "logit_cap (0.0) > 0"),
        ({"model": {"ring": False, "skip": False}}, 1, "model.ring", "ring or (skip and num_skips > 0)"),
        ({"model": {"causal": False}}, 1, "model.causal", "causal == true"),
        ({"model": {"method": ["pi"] * 3}}, 1, "model.method", "len(method) (3) == num_layers (12)"),
        (
            {"model": {"method": "ring", "attention_dropout": 0.1}},
            1,
            "model.method",
            "attention_dropout (0.1) == 0 for 'ring'",
        ),
        (
            {"model": {"method": "ring"}, "parallel": {"sp_degree": 2}, "training": {"context": 4098}},
            2,
            "training.context",
            "context (4098) % (2 × parallel.sp_degree (2)) == 0 for 'ring'",
        ),
        (
            {"parallel": {"sp_degree": 2, "overlap": "pipelined"}},
            2,
            "parallel.overlap",
            "training.micro_batch_size (1) > 1 for 'pipelined'",
        ),
        (
            {
                "model": {"method": ["pi", "ring"], "num_layers": 2},
                "parallel": {"sp_degree": 2},
                "training": {"context": 4098},
            },
            2,
            "training.context",
            "context (4098) % (2 × parallel.sp_degree (2)) == 0 for 'ring'",
        ),
        (
            {"model": {"method": "dense"}, "parallel": {"sp_degree": 2}},
            2,
            "model.method",
            "parallel.sp_degree (2) == 1 for 'dense'",
        ),
        (
            {"model": {"method": ["ulysses"] * 12, "num_kv_heads": 3}, "parallel": {"sp_degree": 2}},
            2,
            "model.method",
            "num_kv_heads (3) % parallel.sp_degree (2) == 0 for 'ulysses'",
        ),
        ({"training": {"context": 4}}, 1, "training.context", "context (4) > model.window (4)"),
        (
            {"training": {"context": 1}, "model": {"window": 0}, "data": {"packing": "join"}},
            1,
            "training.context",
            "context (1) > 1 for data.packing 'join'",
        ),
        ({"training": {"context": 2**31 + 1}}, 1, "training.context", "context (2147483649) <= 2^31"),
        (
            {"training": {"compile": True}, "parallel": {"zero_stage": 3}},
            1,
            "training.compile",
            "parallel.zero_stage (3) < 3 for True",
        ),
        (
            {"training": {"activation_checkpointing": "selective"}, "parallel": {"zero_stage": 3}},
            1,
            "training.activation_checkpointing",
            "parallel.zero_stage (3) < 3 for 'selective'",
        ),
        (
            {"training": {"chunk_tokens": 0}},
            1,
            "training.chunk_tokens",
            "1 <= chunk_tokens (0) <= context (4096)",
        ),
        (
            {"training": {"chunk_tokens": 4097}},
            1,
            "training.chunk_tokens",
            "1 <= chunk_tokens (4097) <= context (4096)",
        ),
        (
            {"training": {"chunk_tokens": 64}, "model": {"causal": False}},
            1,
            "training.chunk_tokens",
            "model.causal == true",
        ),
        (
            {"training": {"chunk_tokens": 64}, "model": {"method": ["pi"] * 11 + ["dense"]}},
            1,
            "training.chunk_tokens",
            "model.method in ('pi', 'window') for 'dense'",
        ),
        (
            {"training": {"chunk_tokens": 64}, "model": {"method": "ring"}, "parallel": {"sp_degree": 2}},
            2,
            "training.chunk_tokens",
            "model.method in ('pi', 'window') for 'ring'",
        ),
        (
            {"training": {"chunk_tokens": 64}, "model": {"method": "ulysses"}},
            1,
            "training.chunk_tokens",
            "model.method in ('pi', 'window') for 'ulysses'",
        ),
        (
            {"training": {"chunk_tokens": 65}, "parallel": {"sp_degree": 2}},
            2,
            "training.chunk_tokens",
            "chunk_tokens (65) % parallel.sp_degree (2) == 0",
        ),
        (
            {"training": {"chunk_tokens": 66}, "parallel": {"sp_degree": 2}},
            2,
            "training.chunk_tokens",
            "training.context (4096) % chunk_tokens (66) == 0 with parallel.sp_degree (2) > 1",
        ),
        (
            {"training": {"kept_rows": "host"}},
            1,
            "training.kept_rows",
            "kept_rows ('host') == 'auto' with chunk_tokens null",
        ),
        (
            {"training": {"activation_offload": True}},
            1,
            "training.activation_offload",
            "activation_checkpointing == true",
        ),
        (
            {
                "training": {
                    "activation_offload": True,
                    "activation_checkpointing": True,
                    "chunk_tokens": 64,
                }
            },
            1,
            "training.activation_offload",
            "chunk_tokens == null",
        ),
        ({"training": {"mlp_tile_tokens": 0}}, 1, "training.mlp_tile_tokens", "mlp_tile_tokens (0) >= 1"),
        (
            {"training": {"mlp_tile_tokens": 64}, "parallel": {"zero_stage": 3}},
            1,
            "training.mlp_tile_tokens",
            "parallel.zero_stage (3) < 3",
        ),
        ({"training": {"steps": 0}}, 1, "training.steps", "steps (0) >= 1"),
        ({"training": {"learning_rate": 0.0}}, 1, "training.learning_rate", "learning_rate (0.0) > 0"),
        ({"training": {"min_learning_rate": 1.0}}, 1, "training.min_learning_rate", "<= learning_rate"),
        ({"training": {"beta2": 1.0}}, 1, "training.beta2", "beta2 (1.0) < 1"),
        ({"training": {"seed": -1}}, 1, "training.seed", "0 <= seed (-1)"),
        (
            {"parallel": {"sp_degree": 3}},
            3,
            "parallel.sp_degree",
            "training.context (4096) % sp_degree (3) == 0",
        ),
        ({"parallel": {"sp_degree": 4}}, 2, "parallel.sp_degree", "world size (2) % sp_degree (4) == 0"),
        ({"parallel": {"timeout_s": 0.0}}, 1, "parallel.timeout_s", "timeout_s (0.0) > 0"),
        ({"parallel": {"timeout_s": 1e30}}, 1, "parallel.timeout_s", "timeout_s (1e+30) <= 2592000"),
        ({"parallel": {"timeout_s": INF}}, 1, "parallel.timeout_s", "-inf < timeout_s (inf) < inf"),
        ({"training": {"learning_rate": INF}}, 1, "training.learning_rate", "learning_rate (inf) < inf"),
        ({"training": {"weight_decay": INF}}, 1, "training.weight_decay", "weight_decay (inf) < inf"),
        ({"training": {"clip_norm": -INF}}, 1, "training.clip_norm", "-inf < clip_norm (-inf)"),
        ({"training": {"beta1": math.nan}}, 1, "training.beta1", "-inf < beta1 (nan) < inf"),
        ({"model": {"logit_cap": INF}}, 1, "model.logit_cap", "logit_cap (inf) < inf"),
        ({"model": {"rope_theta": math.nan}}, 1, "model.rope_theta", "-inf < rope_theta (nan) < inf"),
        ({}, 0, "launch", "ranks (0) >= 1"),
        ({}, 3, "training.batch_size", "batch_size (8) % (dp_degree (3) × micro_batch_size (1)) == 0"),
        ({"data": {"prefetch": 0}}, 1, "data.prefetch", "prefetch (0) >= 1"),
    ],
)
def test_impossible_sizes_name_the_key_and_the_equation(parts, world_size, key, equation):
    with pytest.raises(ConfigError) as error:
        check(changed(**parts), world_size)
    text = str(error.value)
    assert text.startswith(f"{key}: ") and equation in text and "does not hold" in text and "\n" not in text


def test_a_run_without_a_directory_is_refused():
    with pytest.raises(ConfigError, match=r"^run_dir: run_dir \(''\) != '' does not hold$"):
        check(Config(run_dir=""))


@pytest.mark.parametrize(("value", "kind"), [(5, "int"), ([], "list"), (None, "NoneType")])
def test_a_section_is_a_mapping(value, kind):
    with pytest.raises(
        ConfigError, match=rf"^training: type of training \({kind}\) == mapping does not hold$"
    ):
        Config.from_dict({"training": value})


def test_sensible_configurations_pass():
    check(Config())
    check(changed(parallel={"sp_degree": 4}), 8)
    check(changed(model={"num_kv_heads": 3, "strides": [[4] * 12] * 12, "logit_cap": None}))
    assert accumulation_steps(changed(parallel={"sp_degree": 2}), 4) == 4


def test_dictionaries_round_trip():
    config = changed(model={"strides": [[4] * 12] * 12}, training={"seed": 3})
    assert Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("wanted", "device", "zero_stage", "compiled"),
    [
        (None, "cuda", 1, True),
        (None, "cuda", 3, False),
        (None, "cpu", 1, False),
        (True, "cpu", 1, True),
        (False, "cuda", 1, False),
    ],
)
def test_blocks_are_compiled_where_there_is_a_gpu_or_as_asked(wanted, device, zero_stage, compiled):
    config = Config(parallel=ParallelConfig(zero_stage=zero_stage), training=TrainingConfig(compile=wanted))
    assert compiles(config, device) == compiled
