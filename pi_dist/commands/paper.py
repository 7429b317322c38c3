"""`pi-dist paper`: the paper's Table V and claims, measured here."""

from __future__ import annotations

import time
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from pi_dist.commands.shared import UNFINISHED_RECORD, check_written, sizes
from pi_dist.config import ConfigError, UserError


def parser() -> ArgumentParser:
    p = ArgumentParser(
        description="The paper's figures beside ours. table: step, forward, memory, FLOP and MFU of dense, "
        "window and π (Table V). layer: what skips and gate add to a layer. kl: how far the clipped gate and "
        "the clamped logits of a trained model are from the ideal softmax.",
        exit_on_error=False,
    )
    p.add_argument("what", type=Literal["table", "layer", "kl"], help="what to measure")
    p.add_argument("--json", type=str, required=True, help="the record to add to; printed as Markdown too")
    p.add_argument("--preset", type=str, default="small", help="table, layer: tiny, small, medium or large")
    p.add_argument("--contexts", type=str, default="4096,8192,16384,32768", help="table, layer: with commas")
    p.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="where to compute")
    p.add_argument("--checkpoint", type=str | None, default=None, help="kl: a run directory or a checkpoint")
    p.add_argument("--data", type=str | None, default=None, help="kl: directory of prepared shards")
    p.add_argument("--sequences", type=int, default=4, help="kl: so many of the data")
    p.add_argument("--context", type=int, default=1024, help="kl: tokens of a sequence")
    p.add_argument(
        "--minutes", type=float, default=5.0, help="table: begin no row after so long; run again to go on"
    )
    return p


def run(arguments: Namespace) -> int:
    from pi_dist.config import PRESETS
    from pi_dist.measure import paper
    from pi_dist.measure.record import resume, write
    from pi_dist.parallel.process_group import choose_device

    a, complete = arguments, True
    check_written("json", a.json)
    record = resume(a.json, {"data": "random tokens"})
    if any("what" not in row for row in record["rows"]):
        raise UserError(f"{a.json}: not a record of `pi-dist paper`")
    known = [row for row in record["rows"] if row["what"] == a.what]
    if a.what != "kl" and a.preset not in PRESETS:
        raise ConfigError(f"preset: {a.preset!r} in {', '.join(PRESETS)} does not hold")
    if a.what == "table":
        contexts, device = sizes("contexts", a.contexts), choose_device(a.device, 0)
        until = time.monotonic() + 60 * a.minutes
        for row in paper.table_rows(contexts, a.preset, device.type, known, until):
            complete = row is not None
            if complete:
                record["rows"].append(row)
                write(record, a.json)
    else:
        if a.what == "kl":
            rows = _divergence_rows(a)
        else:
            rows = paper.layer_rows(sizes("contexts", a.contexts), a.preset, choose_device(a.device, 0))
        again = [_what(row) for row in rows]
        record["rows"] = [row for row in record["rows"] if _what(row) not in again] + rows
        write(record, a.json)
    print(paper.markdown(record), end="")
    return 0 if complete else UNFINISHED_RECORD


def _what(row: dict) -> tuple:
    """Which row it is: of a measurement done again the last one stays, and of checkpoints the last one."""
    if row["what"] == "kl":
        return ("kl",)
    return tuple(row[key] for key in ("what", "preset", "context", "layer" if "layer" in row else "method"))


def _divergence_rows(a: Namespace) -> list[dict]:
    """Of a checkpoint on the first sequences of the data."""
    import itertools

    from pi_dist.config import DataConfig
    from pi_dist.data.loader import SequenceLoader
    from pi_dist.data.shards import ShardIndex
    from pi_dist.measure.paper import divergence_rows
    from pi_dist.parallel.process_group import choose_device
    from pi_dist.training.checkpoint import load_model, open_checkpoint

    if a.checkpoint is None or a.data is None:
        raise ConfigError("paper kl: --checkpoint and --data are needed")
    if a.sequences < 1 or a.context < 2:
        raise ConfigError(
            f"paper kl: sequences ({a.sequences}) >= 1 and context ({a.context}) >= 2 do not hold"
        )
    device = choose_device(a.device, 0)
    checkpoint = open_checkpoint(a.checkpoint)
    model, _ = load_model(checkpoint, device)
    loader = SequenceLoader(
        ShardIndex.open(a.data),
        DataConfig(train=a.data, packing="split", num_workers=0),
        context=a.context,
        micro_batch_size=1,
        accumulation_steps=1,
        dp_rank=0,
        dp_degree=1,
        sp_rank=0,
        sp_degree=1,
        seed=0,
    )
    batches = itertools.islice(loader.evaluate(), a.sequences)
    return divergence_rows(model.eval(), [batch.tokens.to(device) for batch in batches])
