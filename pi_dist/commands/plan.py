"""`pi-dist plan`: memory and time of a run before it is queued."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from pi_dist.commands.shared import (
    ConfigFile,
    add_network,
    check_written,
    config_of,
    network_of,
    print_or_write,
)
from pi_dist.config import Config


def parser() -> ArgumentParser:
    p = ArgumentParser(
        description="Memory of a GPU and time of a step that a run would take, by the cost model: before "
        "anyone queues it. Exit status 1 if it does not fit; then with what it would. "
        "Overrides as for pi-dist train.",
        exit_on_error=False,
    )
    p.add_argument("--config", action=ConfigFile, help="YAML as `pi-dist train` takes it")
    p.add_argument("--gpus", type=int, required=True, help="of the job")
    p.add_argument(
        "--gpu", type=str, default="H100", help="H100, H200, A100 or a file of `pi-dist calibrate`"
    )
    p.add_argument("--json", type=str | None, default=None, help="write JSON there; - is standard output")
    add_network(p)
    p.add_class_arguments(Config)
    return p


def run(arguments: Namespace) -> int:
    from pi_dist.measure.plan import describe, make_plan, to_json
    from pi_dist.measure.profile import load_profile

    check_written("json", arguments.json, printed=True)
    config = config_of(arguments)
    vocabulary = ""
    if config.model.vocab_size is None:
        size, where = _vocabulary(config)
        config = replace(config, model=replace(config.model, vocab_size=size))
        vocabulary = f"\nvocabulary        {size:,}, {where}"
    plan = make_plan(config, arguments.gpus, load_profile(arguments.gpu), network_of(arguments))
    print_or_write(to_json(plan), arguments.json, describe(plan) + vocabulary)
    return 0 if plan.fits else 1


def _vocabulary(config: Config) -> tuple[int, str]:
    """(rounded up as training does, where it comes from): the data's, or GPT-2's where there are none yet."""
    from pi_dist.config import resolve
    from pi_dist.data.shards import open_splits
    from pi_dist.measure.steps import VOCABULARY

    if not Path(config.data.train).is_dir():
        return VOCABULARY, f"assumed: there is no {config.data.train} yet"
    index, _ = open_splits(config.data)
    return resolve(config, index.vocab_size).model.vocab_size, "that of the data"
