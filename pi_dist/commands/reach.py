"""`pi-dist reach`: how far back a stack of layers can see."""

from __future__ import annotations

from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from pi_dist.commands.shared import check_written, print_or_write
from pi_dist.config import ConfigError, ModelConfig, check_model


def parser() -> ArgumentParser:
    p = ArgumentParser(
        description="How far back a stack of π-attention layers can see, and what share of it.",
        exit_on_error=False,
    )
    p.add_argument("--layers", type=int, default=12, help="layers of the stack")
    p.add_argument("--heads", type=int, default=12, help="query heads (matters for per_head)")
    p.add_argument("--window", type=int, default=4, help="k: neighbours on a side, itself not counted")
    p.add_argument("--stride", type=int, default=16, help="π: base stride in tokens")
    p.add_argument("--num-skips", type=int, default=1, help="M: skip targets i-π … i-Mπ")
    p.add_argument(
        "--schedule",
        type=Literal["fixed", "doubling", "per_head"],
        default="fixed",
        help="strides of the layers",
    )
    p.add_argument("--strides", type=list[int] | None, default=None, help="one for each layer, in brackets")
    p.add_argument(
        "--num-strides", type=int | None, default=None, help="c; default: all strides below the context"
    )
    p.add_argument("--context", type=int, default=32768, help="tokens of the sequence")
    p.add_argument(
        "--json", type=str | None, default=None, help="write JSON there instead; - is standard output"
    )
    return p


def run(arguments: Namespace) -> int:
    from pi_dist.measure.reach import MAX_LAYERS, describe, report, to_json

    check_written("json", arguments.json, printed=True)
    if not 1 <= arguments.layers <= MAX_LAYERS:
        raise ConfigError(f"layers: 1 <= layers ({arguments.layers}) <= {MAX_LAYERS} does not hold")
    if arguments.heads < 1:
        raise ConfigError(f"heads: heads ({arguments.heads}) >= 1 does not hold")
    if arguments.context < 1:
        raise ConfigError(f"context: context ({arguments.context}) >= 1 does not hold")
    model = ModelConfig(
        num_layers=arguments.layers,
        hidden_size=64 * arguments.heads,
        num_heads=arguments.heads,
        window=arguments.window,
        stride=arguments.stride,
        num_skips=arguments.num_skips,
        schedule=arguments.schedule,
        strides=None if arguments.strides is None else tuple(arguments.strides),
        num_strides=arguments.num_strides,
    )
    check_model(model)
    found = report(model, arguments.context)
    print_or_write(to_json(found), arguments.json, describe(found))
    return 0
