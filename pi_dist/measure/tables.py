"""The records as Markdown tables: `python -m pi_dist.measure.tables` writes `records/README.md`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pi_dist.measure.profile import OURS
from pi_dist.measure.record import kept_records
from pi_dist.measure.savings import ONE_CHUNK
from pi_dist.measure.timeline import PARTS

COLUMNS = {
    "tokens": "context",
    "world_size": "GPUs",
    "sp_degree": "sp",
    "zero_stage": "ZeRO",
    "replays": "graphs",
    "ms": "ms a step",
    "tokens_per_s": "tokens/s",
    "reserved_mib": "MiB reserved a GPU",
    "last_loss": "last loss",
    "heldout_loss": "held-out loss",
    "reach": "reach",
}


PAGE = Path(__file__).parent / "records" / "README.md"


def markdown_page() -> str:
    """All records that ship, each with its device and command."""
    parts = ["# Records", "Made by `python -m pi_dist.measure.tables` from the files beside this one."]
    for name, record in kept_records().items():
        parts += [f"## {name}", f"{record['device']}: `{record['command']}`", markdown_table(record)]
    return "\n\n".join(parts) + "\n"


def markdown_table(record: dict) -> str:
    """A record as a Markdown table, or several; in a step's, reach stands beside the context."""
    if "what" in record["rows"][0]:
        from pi_dist.measure.paper import markdown  # which makes tables of these

        return markdown(record).strip()
    if "gpus" in record["rows"][0]:
        return _savings_table(record["rows"])
    if "floor_ms" in record["rows"][0]:
        return _kernel_table(record["rows"])
    if any("idle_ms" in row for row in record["rows"]):
        return _step_table(record["rows"])
    if any("exposed_share" in row or "bytes_formula" in row for row in record["rows"]):
        return _sp_table(record["rows"])
    if all(row.get("chunk_tokens") for row in record["rows"]):
        return _chunks_table(record["rows"])

    def cell(value: object) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, float):
            return f"{value:,.0f}" if value >= 100 else f"{value:.4f}"
        return f"{value:,}"

    return table([*COLUMNS.values()], [[cell(row[key]) for key in COLUMNS] for row in record["rows"]])


def table(head: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    rows = (" | ".join(["", *line, ""]).strip() for line in (head, *lines))
    return "\n".join([next(rows), "|---" * len(head) + "|", *rows])


def _savings_table(rows: list[dict]) -> str:
    """The fewest GPUs of each method at each context (GiB a GPU, ms a step), or "none".

    ~: predicted; ≈: a rank's time measured, and communication predicted.
    """
    contexts = sorted({row["context"] for row in rows})
    lines: dict[tuple[str, ...], dict[int, dict]] = {}
    for row in rows:
        skips = row["num_skips"] if row["method"] == "pi" else 0  # those of a record are of its π
        name = _pattern_of(row | {"num_skips": skips}) + (", in chunks" if row["streamed"] else "")
        name += (
            ", inputs of blocks in host memory" if row["activation_offload"] and not row["streamed"] else ""
        )
        limit = "" if row["budget_ms"] is None else f"{1e3 * row['context'] / row['budget_ms']:,.0f} tokens/s"
        lines.setdefault((row["preset"], name, limit or "memory"), {})[row["context"]] = row
    head = ["model", "method", "within", "reach", *(f"{context:,}" for context in contexts)]
    return table(
        head,
        [
            [*what, _reach(of_contexts), *(_savings_cell(of_contexts.get(context)) for context in contexts)]
            for what, of_contexts in lines.items()
        ],
    )


def _reach(of_contexts: dict[int, dict]) -> str:
    """Of one method at some contexts."""
    if all(row["reach"] == context - 1 for context, row in of_contexts.items()):
        return "all"
    return " to ".join(f"{reach:,}" for reach in sorted({row["reach"] for row in of_contexts.values()}))


def _savings_cell(row: dict | None) -> str:
    if row is None:
        return ""
    if row["gpus"] is None:
        return "one chunk" if ONE_CHUNK in row["note"] else "none"
    about = {"measured": "", "composed": "≈", "predicted": "~"}
    memory = f"{about[row['memory_source']]}{row['peak_mib'] / 1024:,.1f}"
    return f"{row['gpus']} ({memory}, {about[row['time_source']]}{row['ms']:,.0f})"


def _step_table(rows: list[dict]) -> str:
    """Steps of presets, and the share of each part of them; the GPU waits in the last."""
    head = ["model", "k", "M", "context", "sequences", "again", "engine", "ms", "tokens/s", "MFU", "peak GiB"]
    head += [*PARTS, "waiting", "reach"]
    lines = []
    for row in rows:
        engine = row["engine"] + (", eager" if row["eager"] else "")
        engine += "" if row["cuda_graphs"] is None else ", no graphs"
        again = row["activation_checkpointing"]
        if row["chunk_tokens"] is not None:
            again = f"chunks of {row['chunk_tokens']:,}"
        again = {False: "nothing", True: "blocks"}.get(again, again)
        what = [row["preset"], *(str(row[key]) for key in ("window", "num_skips")), f"{row['tokens']:,}"]
        if row["ms"] is None:
            lines.append([*what, "", again, engine, row["note"], *[""] * (len(head) - 8)])
            continue
        parts = [row.get(f"{part}_ms") for part in (*PARTS, "idle")]
        lines.append(
            [
                *(*what, str(row["batch"]), again, engine, f"{row['ms']:,.1f}", f"{row['tokens_per_s']:,}"),
                *("" if row["mfu"] is None else f"{row['mfu']:.1%}", f"{row['peak_mib'] / 1024:.1f}"),
                *("" if ms is None else f"{ms / row['ms']:.1%}" for ms in parts),
                f"{row['reach']:,}",
            ]
        )
    return table(head, lines)


def _chunks_table(rows: list[dict]) -> str:
    """Optimizer steps of one long sequence in chunks: what it takes, and how far the pattern reaches."""
    head = [
        "parameters",
        "k",
        "M",
        "context",
        "chunk",
        "s a step",
        "tokens/s",
        "peak GiB",
        "rows kept",
        "reach",
    ]
    lines = [
        [
            f"{row['num_parameters'] / 1e6:.0f} M",
            *(str(row[key]) for key in ("window", "num_skips")),
            *(f"{row[key]:,}" for key in ("tokens", "chunk_tokens")),
            f"{row['ms'] / 1e3:.1f}",
            f"{row['tokens_per_s']:,}",
            f"{row['peak_mib'] / 1024:.1f}",
            f"{row['kept_mib']:,.0f} MiB, {row['kept_rows']}",
            f"{row['reach']:,} ({row['covered_share']:.2%})",
        ]
        for row in rows
    ]
    return table(head, lines)


def _kernel_table(rows: list[dict]) -> str:
    """Times at 131,072 tokens and head_dim 64, one stride, and those of other kernels, where there are any.

    A line a window; a column a number of skips, then a column a kernel for the window alone.
    """
    rows = [row for row in rows if row["ms"] is not None]
    at = [row for row in rows if (row["tokens"], row["head_dim"], row["strides"]) == (131072, 64, "one")]
    ours, others = ([row for row in at if (row["method"][:2] == "pi") == mine] for mine in (True, False))
    windows, skips = (sorted({row[key] for row in ours}) for key in ("window", "num_skips"))
    by_skips = {f"M = {m}": [row for row in ours if row["num_skips"] == m] for m in skips}
    tables = [_times(windows, by_skips, lambda row: f"{row['ms']:.2f} ({row['times_floor']:.1f})")]
    names = dict.fromkeys(row["method"] for row in others if row["num_skips"] == 0)
    if names:
        of_window = [row for row in at if row["num_skips"] == 0]
        by_name = {name: [row for row in of_window if row["method"] == name] for name in (OURS, *names)}
        tables.append(_times(windows, by_name, lambda row: f"{row['ms']:.2f}"))
        tables.append(_aims_table(rows))
    return "\n\n".join(tables)


def _aims_table(rows: list[dict]) -> str:
    """What was aimed at and what was found, at all lengths: the range, forward / backward, by head_dim."""

    def case(row: dict) -> tuple:
        return tuple(
            row[key] for key in ("direction", "head_dim", "tokens", "window", "num_skips", "strides")
        )

    def narrow(row: dict) -> bool:
        return row["window"] <= 16 and row["num_skips"] <= 1

    ours = {case(row): row for row in rows if row["method"] == OURS}
    others = [row for row in rows if row["method"] != OURS]
    peers = [row | {"times": row["ms"] / ours[case(row)]["ms"]} for row in others]
    flex = [row for row in peers if row["method"].startswith("flex")]
    windows = [row for row in peers if row["method"].endswith(", window")]
    long = [row for row in ours.values() if narrow(row) and row["tokens"] >= 131072]
    wide = [row for row in ours.values() if row["window"] >= 64 and row["num_skips"] <= 1]
    many = [row for row in ours.values() if row["num_skips"] >= 16]
    of_copy, of_floor = ("copy_share", "≥ 0.90 / 0.80"), ("times_floor", "≤ 1.6 / 2")
    found = [
        ("of the copy rate, k ≤ 16, M ≤ 1", *of_copy, [row for row in long if row["strides"] == "one"]),
        ("of the copy rate, strides per head", *of_copy, [row for row in long if row["strides"] != "one"]),
        ("times the floor, k ≥ 64, M ≤ 1", *of_floor, wide),
        ("times the floor, M ≥ 16", *of_floor, many),
        ("FlexAttention's time over ours, k ≤ 16, M ≤ 1", "times", "≥ 5", list(filter(narrow, flex))),
        ("its time over ours, else", "times", "> 1", [row for row in flex if not narrow(row)]),
        ("other windows' time over ours", "times", "> 1", windows),
    ]
    dims = sorted({row["head_dim"] for row in rows})

    def spread(key: str, of: list[dict]) -> str:
        both = []
        for way in ("forward", "backward"):
            values = sorted(row[key] for row in of if row["direction"] == way)
            both.append(f"{values[0]:.2f} to {values[-1]:.2f}")
        return " / ".join(both)

    lines = [
        [what, aim, *(spread(key, [row for row in of if row["head_dim"] == dim]) for dim in dims)]
        for what, key, aim, of in found
    ]
    return table(["forward / backward", "aim", *(f"heads of {dim}" for dim in dims)], lines)


def _times(windows: list[int], columns: dict[str, list[dict]], cell: Callable[[dict], str]) -> str:
    """A line a window, a column a list of rows; `cell` of the forward / of the backward."""

    def both(rows: list[dict], window: int) -> str:
        found = {row["direction"]: row for row in rows if row["window"] == window}
        return " / ".join(cell(found[way]) for way in ("forward", "backward"))

    lines = [[str(k), *(both(rows, k) for rows in columns.values())] for k in windows]
    return table(["k", *columns], lines)


def _sp_table(rows: list[dict]) -> str:
    """Steps on one GPU and on several, then the forms of the exchange.

    Weak scaling: the step on one GPU with a P-th of the tokens over that on P. Apart: the step of P GPUs that
    each have a sequence of a P-th of the tokens over that on P: what the exchange leaves. Slower: by how much
    of the step the kernels of the slowest GPU take longer than those of the fastest, which waits as long.
    """
    plain = [row for row in rows if _shared(row) and _form(row) == ("interior", "ring_all_to_all", 1)]
    ranks = sorted({row["world_size"] for row in plain})
    most = ranks[-1]
    apart = {
        (_model_of(row), most * row["tokens"]): row
        for row in rows
        if (row["world_size"], row.get("sp_degree")) == (most, 1)
    }
    head = ["model", "method", "context", "reach", *(f"{p} GPU{'s' * (p > 1)}" for p in ranks)]
    head += ["weak scaling", f"of {most} apart", "exposed", "slower"]
    lines = []
    for what in dict.fromkeys(map(_model_of, plain)):
        mine = {(row["tokens"], row["world_size"]): row for row in plain if _model_of(row) == what}
        largest = max(p for _, p in mine)
        for tokens in sorted(tokens for tokens, p in mine if p == largest):
            found, last = [mine.get((tokens, p)) for p in ranks], mine[tokens, largest]
            shares = [last.get("exposed_share"), _slower(last)] if largest > 1 else [None, None]
            lines.append(
                [
                    *(*what, f"{tokens:,}", f"{last['reach']:,}" if "reach" in last else ""),
                    *map(_step_cell, found),
                    _ratio(mine.get((tokens // largest, 1)) if largest > 1 else None, last),
                    _ratio(apart.get((what, tokens)), last),
                    *("" if share is None else f"{share:.1%}" for share in shares),
                ]
            )
    kept = [n for n, name in enumerate(head) if name == "exposed" or any(line[n] for line in lines)]
    lines = [[line[n] for n in kept] for line in lines]
    return "\n\n".join([table([head[n] for n in kept], lines), *_forms_tables(rows, most)])


def _slower(row: dict) -> float | None:
    if row.get("compute_ms") is None:
        return None
    return (row["compute_ms"] - row["least_compute_ms"]) / row["ms"]


def _shared(row: dict) -> bool:
    """Whether all ranks share a sequence."""
    return row.get("sp_degree", row["world_size"]) == row["world_size"]


def _ratio(row: dict | None, last: dict) -> str:
    pair = [x for x in (row, last) if x and x["measured"] and x["ms"]]
    return f"{pair[0]['ms'] / pair[1]['ms']:.1%}" if len(pair) == 2 else ""


def _forms_tables(rows: list[dict], num_ranks: int) -> list[str]:
    """ms a step and share of it that is exposed exchange, by form; a column a context, a table a model."""
    timed = [row for row in rows if row["world_size"] == num_ranks and row["ms"] and row["num_skips"]]
    timed = [row for row in timed if _shared(row)]
    others = [row for row in timed if _form(row) != ("interior", "ring_all_to_all", 1)]
    tables = []
    for what in dict.fromkeys(map(_model_of, others)):
        contexts = sorted({row["tokens"] for row in others if _model_of(row) == what})
        at = {(_form(row), row["tokens"]): row for row in timed if _model_of(row) == what}
        lines = []
        for overlap, exchange, batch in sorted({form for form, _ in at}, key=lambda form: (form[2], form)):
            found = [at.get(((overlap, exchange, batch), n)) for n in contexts]
            cells = [f"{row['ms']:,.1f} ({row['exposed_share'] or 0:.1%})" if row else "" for row in found]
            lines.append([overlap, exchange, str(batch), *cells])
        head = [f"{', '.join(what)}: overlap", "exchange", "sequences", *(f"{n:,}" for n in contexts)]
        tables.append(table(head, lines))
    return tables


def _form(row: dict) -> tuple[str, str, int]:
    launched = ", no graphs" if row.get("cuda_graphs") is False else ""
    return row["overlap"] + launched, row["exchange"], row["batch"]


def _model_of(row: dict) -> tuple[str, str]:
    return row["preset"], _pattern_of(row)


def _pattern_of(row: dict) -> str:
    name = {"pi": "π", "window": "window"}.get(row["method"])
    pattern = f", k = {row['window']}" + (f", M = {row['num_skips']}" if row["num_skips"] else "")
    return row["method"] if name is None else name + pattern


def _step_cell(row: dict | None) -> str:
    """`ms (GiB)`, ~ before what is predicted."""
    if row is None:
        return ""
    if row["ms"] is None:
        return "out of memory" if row["fits"] is False else "not possible"
    memory = "" if row.get("peak_mib") is None else f" ({row['peak_mib'] / 1024:,.1f})"
    return f"{'' if row['measured'] else '~'}{row['ms']:,.0f}{memory}" + ("" if row["fits"] else ", too much")


if __name__ == "__main__":
    PAGE.write_text(markdown_page())
