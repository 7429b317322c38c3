"""A record of `pi-dist savings` for people: a table in Markdown, and curves of GPUs against context."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from typing import Any

from pi_dist.measure.profile import FRAGMENTS, Network, profile_from
from pi_dist.measure.savings import ONE_CHUNK, budget_text, errors, ms_text
from pi_dist.measure.savings_points import COMPOSED, MEASURED
from pi_dist.measure.stand_ins import PROBE_TOKENS
from pi_dist.measure.tables import table

_EXPLANATION = {
    MEASURED: "run on this GPU",
    COMPOSED: "one rank's step run on this GPU among fake ranks, plus predicted communication",
    "predicted": "by the cost model and the profile's constants",
}


def label(row: dict[str, Any]) -> str:
    """The method, and whether it streams."""
    return {"pi": "π"}.get(row["method"], row["method"]) + (", streamed" if row["streamed"] else "")


def _cell(row: dict[str, Any]) -> str:
    if row["gpus"] is None:
        return row["note"]
    said = f"{_memory(row)}, {_time(row, row)}{row['note'] and ' ' + row['note']}"
    fewer = [check for check in row.get("checks", ()) if check["num_gpus"] < row["gpus"]]
    if fewer:  # why they are not enough
        most = max(fewer, key=lambda check: check["num_gpus"])
        said += f"; on {most['num_gpus']}: {_time(most, row) if most['fits'] else _memory(most)}"
    return f"**{row['gpus']}** ({said})"


def _memory(point: dict[str, Any]) -> str:
    need = "out of memory" if point["peak_mib"] is None else f"{point['peak_mib'] / 1024:,.1f} GiB"
    host, problem = point.get("host_mib"), point.get("problem")
    beside = f" and {host / 1024:,.1f} GiB of host memory a GPU" if host else ""
    failed = f" (measuring failed: {problem})" if problem else ""
    return f"{need} {_letter(point['memory_source'])}{beside}{failed}"


def _time(point: dict[str, Any], row: dict[str, Any]) -> str:
    return f"{ms_text(point['ms'], row['budget_ms'])} ms {_letter(point['time_source'])}"


def _letter(source: str) -> str:
    return {MEASURED: "m", COMPOSED: "c"}.get(source, "p")


def _by(rows: list[dict[str, Any]], *keys: str) -> dict[tuple, list[dict[str, Any]]]:
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def saving(row: dict[str, Any], other: dict[str, Any]) -> str:
    """How many GPUs fewer `row` needs than `other`, as a share, at the same context and budget."""
    if row["gpus"] is None or other["gpus"] is None:
        return "—"
    if row["gpus"] > other["gpus"]:
        return f"{row['gpus'] / other['gpus']:g} times as many"
    share = f"{1 - row['gpus'] / other['gpus']:.0%}"
    return "over 99%" if share == "100%" else share


def _budget(row: dict[str, Any]) -> str:
    return (
        "within memory" if row["budget_ms"] is None else f"within {budget_text(row['budget_ms'])} ms a step"
    )


def markdown(record: dict[str, Any]) -> str:
    """The report: terms, one table for each preset and context, savings, errors of predictions, sources."""
    rows, profile = record["rows"], profile_from(record["settings"]["profile"])
    usable, whole = profile.usable_mib / 1024, profile.memory_mib / 1024
    lines = [
        "# GPUs that a context needs",
        "",
        f"On {profile.label}, {usable:,.1f} of {whole:,.1f} GiB for tensors, of which predictions leave "
        f"{FRAGMENTS:.0%} between them. Every method: the same model, bf16, one sequence a step over all "
        "GPUs, blocks recomputed, logits in tiles, no data parallelism.",
        "",
        "A cell is the fewest GPUs, with memory and step time of each, and why the next smaller number that "
        "was tried is not enough. Letters say how a figure was found: "
        f"m {_EXPLANATION[MEASURED]}; c {_EXPLANATION[COMPOSED]}; p {_EXPLANATION['predicted']}. "
        "Where memory is measured and the time is not, each call of exact attention runs once, on at most "
        f"{PROBE_TOKENS:,} tokens, and then only allocates what it did, in proportion to its tokens. "
        "What lies in host memory is predicted, and its way there and back is not in predicted times, which "
        "so were up to 33% too short; those of chunks that the host paces, as of the small model on several "
        "GPUs, up to 42%. "
        "Reach is how far back the last token sees: a method that sees less is not the same goods. "
        "Among what is fewer, — says that for this method or the other there is no number of GPUs; its cell "
        "says why.",
    ]
    for terms, of_terms in _by(rows, *_TERMS).items():
        lines += ["", _terms(dict(zip(_TERMS, terms, strict=True)))]
        for group in _by(of_terms, "preset", "context", "budget_ms").values():
            lines += _section(group)
    lines += ["", "## Predictions beside measurements", ""]
    lines += [*_error_lines(rows), *_foreseen(rows, profile.tensors_mib), "", "## Constants", ""]
    lines += [f"- {name}: {source}" for name, source in profile.sources.items()]
    return "\n".join(lines) + "\n"


_TERMS = (
    *("zero_stage", "window", "stride", "num_skips", "schedule", "chunk_tokens", "max_gpus", "gpus_per_node"),
    *("node_bytes_per_s", "fabric_bytes_per_s", "fabric_latency_s", "adapters_per_node"),
    *("activation_offload", "mlp_tile_tokens", "measures"),
)


def _terms(t: dict[str, Any]) -> str:
    """What rows have in common, in a sentence."""
    offload = "inputs of blocks in host memory, but streamed" if t["activation_offload"] else "no offload"
    tile = t["mlp_tile_tokens"]
    as_two = " (as two H200)" if t["node_bytes_per_s"] == Network().node_bytes_per_s else ""
    return (
        f"{'Measured where this GPU can' if t['measures'] else 'Predicted'}; "
        f"ZeRO {t['zero_stage']}; {offload}; "
        f"the MLP {'at once' if tile is None else f'in tiles of {tile:,}'}; "
        f"pattern k = {t['window']}, π = {t['stride']}, M = {t['num_skips']}, "
        f"{t['schedule']} strides; streamed: chunks of up to {t['chunk_tokens']:,} tokens a GPU; GPUs: "
        f"divisors of the context up to {t['max_gpus']:,}, {t['gpus_per_node']} a node at "
        f"{t['node_bytes_per_s'] / 1e9:g} GB/s each{as_two}, between nodes "
        f"{t['adapters_per_node']} times {t['fabric_bytes_per_s'] / 1e9:g} GB/s and "
        f"{1e6 * t['fabric_latency_s']:g} µs."
    )


def _section(group: list[dict[str, Any]]) -> list[str]:
    """The table of one preset, context and budget."""
    first, columns = group[0], [label(other) for other in group]
    lines = [
        "",
        f"## {first['preset']}, {first['context']:,} tokens, {_budget(first)}",
        "",
    ]
    cells = []
    for row in group:
        shares = ["" if other is row else saving(row, other) for other in group]
        cells.append([label(row), _cell(row), f"{row['reach']:,}", f"{row['covered_share']:.1%}", *shares])
    head = ["method", "GPUs", "reach", "seen", *(f"fewer than {name}" for name in columns)]
    return [*lines, table(head, cells)]


def _error_lines(rows: list[dict[str, Any]]) -> list[str]:
    found = errors(rows)
    if not found:
        return ["Nothing was measured here: every figure is predicted."]
    names = ["preset", "context", "method", "GPUs", "unit", "measured", "how", "predicted", "error"]
    lines = []
    for e in found:
        lines.append(
            [
                e["preset"],
                f"{e['context']:,}",
                label(e),
                str(e["gpus"]),
                {"mib": "MiB", "ms": "ms"}[e["unit"]],
                f"{e['measured']:,.1f}",
                e["source"],
                f"{e['predicted']:,.1f}",
                f"{e['error']:+.1%}",
            ]
        )
    worst = max(abs(e["error"]) for e in found)
    count = len({(e["preset"], e["context"], e["gpus"], e["unit"], e["measured"]) for e in found})
    return [table(names, lines), "", f"Largest error: {worst:.1%} of {count} measured figures."]


def _foreseen(rows: list[dict[str, Any]], tensors_mib: float) -> list[str]:
    """Which points ran out of memory, and of which of them that was not predicted."""
    out = [
        (row, point)
        for row in rows
        for point in row.get("checks", ())
        if point["memory_source"] == MEASURED and point["peak_mib"] is None
    ]
    if not out:
        return []
    names = [
        f"{row['preset']} {row['context']:,} {label(row)} on {point['num_gpus']} "
        f"({point['predicted_mib'] / 1024:,.1f} GiB predicted)"
        for row, point in out
        if point["predicted_mib"] <= tensors_mib
    ]
    said = (
        f"{len(out)} points ran out of memory; of them were predicted to fit: {', '.join(names) or 'none'}."
    )
    return ["", said]


def draw(record: dict[str, Any], path: str | os.PathLike) -> None:
    """GPUs against context, a panel for each preset, a curve for each method, budget and terms.

    A colour is a method, a line style a budget with its terms. Filled points have measured memory; where no
    number of GPUs is enough, a cross stands at the top. What is one chunk is not drawn as several.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    from pi_dist.measure.figures import STYLE, save

    shown = [row for row in record["rows"] if ONE_CHUNK not in row.get("note", "")] or record["rows"]
    rows = [row | {"label": label(row), "under": under} for row, under in _under(shown)]
    panels = list(_by(rows, "preset").items())
    curves = list(_by(rows, "label", "under"))
    colours = dict(
        zip(dict.fromkeys(row["label"] for row in rows), plt.get_cmap("tab10").colors, strict=False)
    )
    styles = dict(zip(dict.fromkeys(row["under"] for row in rows), itertools.cycle(_STYLES), strict=False))
    most = max([8, *(row["gpus"] for row in rows if row["gpus"])])
    nowhere = 2 ** (math.ceil(math.log2(most)) + 1)  # the height of crosses
    none_fits = any(not row["gpus"] for row in rows)
    apart = min(1.05, 1.3 ** (1 / len(curves)))  # equal curves lie side by side
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            1,
            len(panels),
            figsize=(4.2 * len(panels) + 2.6, 3.6),
            squeeze=False,
            sharey=True,
            layout="constrained",
        )
        for axes, ((preset,), group) in zip(grid[0], panels, strict=True):
            for (name, under), points in _by(group, "label", "under").items():
                shift = apart ** (curves.index((name, under)) - (len(curves) - 1) / 2)
                colour, points = colours[name], sorted(points, key=lambda row: row["context"])
                at = [(row["context"], (row["gpus"] or nowhere) * shift) for row in points]
                enough = [y if row["gpus"] else math.nan for (_, y), row in zip(at, points, strict=True)]
                line = {"linestyle": styles[under], "color": colour}
                axes.plot(*zip(*at, strict=True), **line, linewidth=0.8, alpha=0.3)
                axes.plot([x for x, _ in at], enough, **line)
                for xy, row in zip(at, points, strict=True):
                    inside = colour if row["gpus"] and row["memory_source"] == MEASURED else "white"
                    marker = "o" if row["gpus"] else "x"
                    axes.plot(*xy, marker, color=colour, markerfacecolor=inside, markersize=5)
            axes.set(xlabel="context, tokens", title=preset)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
        ticks = {2**i: f"{2**i:,}" for i in range(nowhere.bit_length())}
        if none_fits:
            ticks[nowhere] = "none"
        grid[0][0].set_yticks(list(ticks), list(ticks.values()))
        grid[0][0].set_ylim(0.8, nowhere * 1.3 if none_fits else nowhere)
        gpu = profile_from(record["settings"]["profile"]).label
        grid[0][0].set_ylabel(f"fewest {gpu} GPUs")
        signs = [Line2D([], [], label=name, **look) for name, look in _signs(rows, colours, styles)]
        figure.legend(handles=signs, loc="outside right upper", fontsize=8, frameon=False)
        save(figure, path)
        plt.close(figure)


def _signs(
    rows: list[dict[str, Any]], colours: dict[str, Any], styles: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is drawn: (its name, its look)."""
    yield from ((name, {"color": colour}) for name, colour in colours.items())
    yield from ((name, {"color": "grey", "linestyle": style}) for name, style in styles.items())
    point = {"color": "grey", "marker": "o", "linestyle": ""}
    measured = {row["memory_source"] == MEASURED for row in rows if row["gpus"]}
    if True in measured:
        yield "memory measured", point
    if False in measured:
        yield "memory predicted", point | {"markerfacecolor": "white"}
    if not all(row["gpus"] for row in rows):
        yield "none: see the report", point | {"marker": "x"}
    if len({(row["label"], row["under"]) for row in rows}) > 1:
        yield "equal numbers: side by side", {"linestyle": ""}


_STYLES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 3)), (0, (1, 3)), (0, (3, 1, 1, 3)))


def _under(rows: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], str]]:
    """Each row, and its budget with those terms in which rows of the record differ, in words."""
    differ = [key for key in _TERMS if len({row[key] for row in rows}) > 1]
    for row in rows:
        limit = _budget(row)
        if row.get("budget") == "tokens_per_s":  # one budget, though another time for each context
            limit = f"{1e3 * row['context'] / row['budget_ms']:,.6g} tokens/s"
        yield row, ", ".join([limit, *(f"{key} {_plain(row[key])}" for key in differ)])


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else f"{value}"
