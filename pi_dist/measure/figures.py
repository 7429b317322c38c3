"""Figures: two drawn from the definitions that the code uses, the others of records.

    python -m pi_dist.measure.figures DIR

writes DIR/pattern.svg (who attends to whom, and how far a stack sees) and DIR/exchange.svg (how sequence
parallelism moves data). The files are the same, byte for byte, on every run with the same matplotlib.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pi_dist.config import ModelConfig, UserError
from pi_dist.measure.reach import ReachReport, report
from pi_dist.ops.pattern import PiPattern

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind can tell apart.
_BLUE, _ORANGE, _GREEN, _PURPLE = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
_RANK_COLOURS = (_BLUE, _ORANGE, _GREEN, _PURPLE)
_INK, _QUIET, _PALE = "#222222", "#666666", "#EBEBEB"
STYLE = {
    "svg.hashsalt": "pi-dist",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _QUIET,
    "axes.labelcolor": _INK,
    "xtick.color": _QUIET,
    "ytick.color": _QUIET,
}
_HEADING = {"fontsize": 10.5, "fontweight": "bold"}

_RANKS, _SHARD, _GAP = 4, 8, 2.2


def save(figure: Figure, path: str | os.PathLike) -> None:
    """Write the figure, without the date in an SVG file."""
    metadata = {"Date": None} if os.fspath(path).endswith(".svg") else None
    figure.savefig(path, facecolor="white", metadata=metadata)


def _draw_matrix(axes: Axes, pattern: PiPattern, tokens: int) -> None:
    """One layer's attention matrix [tokens, tokens]: ring cells and skip cells."""
    from matplotlib.patches import Rectangle

    (stride,) = pattern.distinct_strides()
    for i in range(tokens):
        for offsets, colour in ((pattern.ring_offsets(), _BLUE), (pattern.skip_offsets(stride), _ORANGE)):
            for j in (i - o for o in offsets if o <= i):
                axes.add_patch(Rectangle((j + 0.06, i + 0.06), 0.88, 0.88, color=colour, linewidth=0))
    for at in range(tokens + 1):
        axes.axhline(at, color=_PALE, linewidth=0.4, zorder=0)
        axes.axvline(at, color=_PALE, linewidth=0.4, zorder=0)
    axes.set(xlim=(0, tokens), ylim=(tokens, 0), aspect="equal")
    ticks = [*range(0, tokens, 8), tokens - 1]
    axes.set_xticks([t + 0.5 for t in ticks], [str(t) for t in ticks])
    axes.set_yticks([t + 0.5 for t in ticks], [str(t) for t in ticks])
    axes.tick_params(length=0)
    axes.set_xlabel("key position j")
    axes.set_ylabel("query position i")


def _draw_coverage(axes: Axes, r: ReachReport) -> None:
    """Share of the distances that are reached, in bins of equal width in the logarithm of the distance."""
    bins = 90
    edges = sorted({round((r.context - 1) ** (i / bins)) for i in range(bins)} | {r.context})
    pairs = list(itertools.pairwise(edges))
    shares = [(r.reached >> low & ((1 << high - low) - 1)).bit_count() / (high - low) for low, high in pairs]
    axes.stairs(shares, edges, fill=True, color=_GREEN, linewidth=0)
    axes.set(xscale="log", xlim=(1, r.context), ylim=(0, 1.02), yticks=[0, 1], yticklabels=["0 %", "100 %"])
    axes.set_xticks([10**e for e in range(5)], [f"{10**e:,}" for e in range(5)])
    axes.minorticks_off()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def draw_pattern(path: str | os.PathLike) -> None:
    """Draw one layer's attention matrix and, beside it, the distances that 12 layers reach.

    Args:
        path: the file to write, .svg or .png.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    context = 65536
    model = ModelConfig(num_layers=12, window=4, stride=16)
    fixed, doubling = (
        report(dataclasses.replace(model, schedule=schedule), context) for schedule in ("fixed", "doubling")
    )
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 4.4))
        figure.text(0.067, 0.935, "One layer: who attends to whom", **_HEADING)
        matrix = figure.add_axes((0.067, 0.115, 0.384, 0.785))
        _draw_matrix(matrix, PiPattern(model.window, model.stride), 40)
        ring = Patch(color=_BLUE, label=f"ring: itself and the k = {model.window} before it")
        skip = Patch(color=_ORANGE, label=f"skip: the one π = {model.stride} before it")
        matrix.legend(
            handles=[ring, skip], loc="upper right", edgecolor="none", framealpha=1, borderaxespad=0.8
        )

        figure.text(0.535, 0.935, "Twelve layers: what the last token can see", **_HEADING)
        upper = figure.add_axes((0.59, 0.575, 0.385, 0.225))
        figure.text(0.535, 0.85, f"fixed stride: π = {model.stride} in every layer")
        _draw_coverage(upper, fixed)
        upper.text(
            fixed.reach * 1.5,
            0.5,
            f"nothing beyond {fixed.reach:,}:\n"
            f"blind to {100 * (1 - fixed.covered_share):.1f} % of\n"
            f"{context:,} tokens",
            va="center",
            linespacing=1.4,
        )
        lower = figure.add_axes((0.59, 0.115, 0.385, 0.225))
        strides = [s for s in doubling.strides if isinstance(s, int)]
        figure.text(
            0.535, 0.39, f"doubling strides: π = {strides[0]}, {strides[1]}, {strides[2]}, …, {strides[-1]:,}"
        )
        _draw_coverage(lower, doubling)
        lower.text(
            1.6,
            0.5,
            f"sees {100 * doubling.covered_share:.1f} % of {context:,} tokens;\n"
            f"the first that it misses is {doubling.first_hole:,} back",
            va="center",
            linespacing=1.4,
            color="white",
            fontweight="bold",
        )
        lower.set_xlabel("distance back from the last token (log scale)")
        figure.text(0.537, 0.6875, "share seen", rotation=90, va="center", ha="left")
        figure.text(0.537, 0.2275, "share seen", rotation=90, va="center", ha="left")
        save(figure, path)


def _shard_x(token: int) -> float:
    """Left edge of a token's cell in the row of shards."""
    return token + token // _SHARD * _GAP


def _draw_cell(axes: Axes, x: float, y: float, token: int, full: bool) -> None:
    """One token's cell in its owner's colour; a row that travels is full, one that stays is pale."""
    from matplotlib.patches import FancyBboxPatch

    colour = _RANK_COLOURS[token // _SHARD]
    box = FancyBboxPatch(
        (x + 0.07, y + 0.07), 0.86, 0.86, boxstyle="round,pad=0,rounding_size=0.14", linewidth=0
    )
    box.set_facecolor(colour if full else (*_mix(colour, 0.18),))
    axes.add_patch(box)
    ink = "white" if full and colour == _BLUE else _INK if full else _QUIET
    axes.text(x + 0.5, y + 0.47, str(token), ha="center", va="center", fontsize=7.5, color=ink)


def _mix(colour: str, share: float) -> tuple[float, float, float]:
    """The colour thinned with white."""
    red, green, blue = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    return 1 - share * (1 - red), 1 - share * (1 - green), 1 - share * (1 - blue)


def _draw_ribbon(axes: Axes, source: float, target: float, width: float, top: float, bottom: float) -> None:
    """Rows on their way: a band from x = source at the top to x = target at the bottom, ending in a head."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    colour = _RANK_COLOURS[int(source // (_SHARD + _GAP))]
    neck, bend = bottom - 0.62, (bottom - top) * 0.48
    left, right = source + 0.08, source + width - 0.08
    band = [
        (left, top),
        *[(left, top + bend), (target + 0.28, neck - bend), (target + 0.28, neck)],
        *[(target + 0.02, neck), (target + width / 2, bottom), (target + width - 0.02, neck)],
        (target + width - 0.28, neck),
        *[(target + width - 0.28, neck - bend), (right, top + bend), (right, top)],
        (left, top),
    ]
    curve = [Path.CURVE4] * 3
    codes = [Path.MOVETO, *curve, *[Path.LINETO] * 4, *curve, Path.CLOSEPOLY]
    axes.add_patch(PathPatch(Path(band, codes), facecolor=colour, alpha=0.4, linewidth=0))


def _draw_transfer(axes: Axes, y: float, title: str, offsets: tuple[int, ...]) -> None:
    """The shards, what each rank receives of them for these offsets, and the bands between the two."""
    top, bottom = y + 2.6, y + 6.9  # upper edges of the row of shards and of the row of received cells
    needed = []
    for rank in range(_RANKS):
        own = range(rank * _SHARD, (rank + 1) * _SHARD)
        needed.append(sorted({i - o for i in own for o in offsets if 0 <= i - o < own.start}))
    axes.text(-4.4, y + 0.6, title, va="center", **(_HEADING | {"fontsize": 9.5}))
    axes.text(-4.4, top + 0.5, "shards", va="center", color=_QUIET)
    axes.text(-4.4, bottom + 0.5, "received", va="center", color=_QUIET)
    travelling = {token for tokens in needed for token in tokens}
    for token in range(_RANKS * _SHARD):
        _draw_cell(axes, _shard_x(token), top, token, token in travelling)
    for rank, tokens in enumerate(needed):
        start = _shard_x(rank * _SHARD)
        axes.text(start + _SHARD / 2, top - 0.55, f"rank {rank}", ha="center", va="center", color=_QUIET)
        if not tokens:
            axes.text(start + _SHARD / 2, bottom + 0.5, "nothing", ha="center", va="center", color=_QUIET)
        left = start + (_SHARD - len(tokens)) / 2
        for place, token in enumerate(tokens):
            _draw_cell(axes, left + place, bottom, token, True)
        for owner in sorted({token // _SHARD for token in tokens}):
            sent = [token for token in tokens if token // _SHARD == owner]
            target = left + tokens.index(sent[0])
            _draw_ribbon(axes, _shard_x(sent[0]), target, len(sent), top + 1.08, bottom - 0.06)


def draw_exchange(path: str | os.PathLike) -> None:
    """Draw which rows four ranks exchange before a layer attends: window halo, short skips, long skips.

    Args:
        path: the file to write, .svg or .png.
    """
    import matplotlib
    from matplotlib.figure import Figure

    window, short, long = 2, 5, 11
    halo = PiPattern(window, 1, num_skips=0).ring_offsets()
    panels = [
        (f"Window, k = {window}: the last {window} rows go to the right neighbour, by ring send/recv", halo),
        (f"Skips, π = {short}: one all_to_all for all ranks", PiPattern(0, short).skip_offsets(short)),
        (
            f"Skips, π = {long}, longer than a shard: rows come from two ranks, still in one all_to_all",
            PiPattern(0, long).skip_offsets(long),
        ),
    ]
    pitch = 9.2
    left, right, height = -4.8, _shard_x(_RANKS * _SHARD - 1) + 1.2, len(panels) * pitch + 3.2
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 9 * height / (right - left)))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(left, right), ylim=(height, 0), aspect="equal")
        axes.set_axis_off()
        for index, (title, offsets) in enumerate(panels):
            _draw_transfer(axes, 0.3 + index * pitch, title, offsets)
        foot = len(panels) * pitch + 0.9
        axes.plot([-4.4, right - 0.2], [foot - 0.8] * 2, color=_PALE, linewidth=1)
        axes.text(
            -4.4,
            foot,
            f"{_RANKS * _SHARD} tokens on {_RANKS} ranks. "
            "Strong cells travel, as keys and values; pale ones stay. "
            "A row that the window brought is not sent again.\n"
            "Backward: the gradients of received rows go the same way back, and the owner adds them up.",
            va="top",
            linespacing=1.6,
        )
        save(figure, path)


def draw_kernels(record: str | os.PathLike, path: str | os.PathLike) -> None:
    """Times of the kernels in a record of `pi-dist bench kernel` over their floor, at 131,072 tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    content = json.loads(Path(record).read_text())
    rows = [row for row in content["rows"] if row["tokens"] == 131072 and row["strides"] == "one"]
    rows = [row for row in rows if row["ms"] is not None]
    dims = sorted({row["head_dim"] for row in rows})
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            len(dims), 2, figsize=(9, 2.6 * len(dims) + 0.6), sharex=True, squeeze=False, layout="constrained"
        )
        for axes_of, dim in zip(grid, dims, strict=True):
            for axes, direction in zip(axes_of, ("forward", "backward"), strict=True):
                mine = [row for row in rows if row["head_dim"] == dim and row["direction"] == direction]
                _draw_times(axes, mine)
                axes.set_title(f"{direction}, head_dim {dim}", **_HEADING)
        grid[0][0].legend(fontsize=8, frameon=False, ncols=2)
        for axes in grid[-1]:
            axes.set_xlabel("window k")
        figure.suptitle(
            f"{content['device']}, bf16, 131,072 tokens: time over the floor (1 = no kernel is faster)"
        )
        save(figure, path)
        plt.close(figure)


def _draw_times(axes: Axes, rows: list[dict]) -> None:
    """Bars by window and number of skips; crosses are FlexAttention with the same pattern."""
    windows = sorted({row["window"] for row in rows})
    for index, (skips, colour) in enumerate(zip((0, 1, 16, 64), _RANK_COLOURS, strict=True)):
        for method, kind in (("pi", "bar"), ("flex", "cross")):
            found = [r for r in rows if r["num_skips"] == skips and r["method"].startswith(method)]
            x = [windows.index(r["window"]) + 0.2 * (index - 1.5) for r in found]
            y = [r["times_floor"] for r in found]
            if kind == "bar":
                axes.bar(x, y, width=0.18, color=colour, label=f"M = {skips}")
            elif found:
                label = "FlexAttention" if index == 1 else None
                axes.plot(x, y, "x", color=_INK, markersize=5, label=label)
    axes.axhline(1, color=_QUIET, linewidth=0.8)
    axes.set_xticks(range(len(windows)), windows)
    axes.set_yscale("log")
    axes.set_yticks([1, 2, 5, 10, 20, 50], [1, 2, 5, 10, 20, 50])


def draw_steps(record: str | os.PathLike, path: str | os.PathLike) -> None:
    """Tokens/s and MFU over the context, of a record of `pi-dist bench step`; a line a preset and policy."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    content = json.loads(Path(record).read_text())
    rows = [row for row in content["rows"] if row["ms"] is not None]
    presets = list(dict.fromkeys(row["preset"] for row in rows))
    policies = {  # of what the backward pass computes again: style of its line
        "nothing again": ("-", lambda row: row["activation_checkpointing"] is False),
        "what is cheap again": ("--", lambda row: row["activation_checkpointing"] == "selective"),
        "blocks again": (":", lambda row: row["activation_checkpointing"] is True),
        "in chunks": ("-.", lambda row: row["chunk_tokens"] is not None),
    }
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained")
        for axes, key, title in zip(panels, ("tokens_per_s", "mfu"), ("tokens/s", "MFU"), strict=True):
            for preset, colour in zip(presets, _RANK_COLOURS, strict=False):
                for policy, (style, belongs) in policies.items():
                    of_policy = [
                        row
                        for row in rows
                        if row["preset"] == preset and row[key] is not None and belongs(row)
                        if policy == "in chunks" or row["chunk_tokens"] is None
                        if (row["engine"], row["eager"], row["window"]) == ("deepspeed", False, 4)
                        if row["cuda_graphs"] is None
                    ]
                    points = sorted((row["tokens"], row[key]) for row in of_policy)
                    if points:
                        label = f"{preset}, {policy}"
                        axes.plot(*zip(*points, strict=True), style, color=colour, marker="o", label=label)
            axes.set_xscale("log", base=2)
            axes.set_ylim(bottom=0)
            axes.set_xlabel("tokens of a sequence")
            axes.set_title(title, **_HEADING)
        lines, names = panels[0].get_legend_handles_labels()
        places = {"loc": "outside lower center", "ncols": len(presets)}
        figure.legend(lines, names, fontsize=7, frameon=False, **places)
        figure.suptitle(f"{content['device']}: one optimizer step")
        save(figure, path)
        plt.close(figure)


_SHOWN_US = 1000.0  # of a step, around an exchange
_BACKWARD = ("_fused_kernel", "_keys_kernel", "_queries_kernel", "_queries_once_kernel")
_LANES = ("attention", "other compute", "rows travel", "ZeRO")


def _lane(name: str, kind: str) -> int:
    if kind != "compute":
        return 2 if kind == "exchange" else 3
    return 0 if name in _BACKWARD or "pi_attention" in name else 1


def draw_timeline(trace: str | os.PathLike, path: str | os.PathLike) -> None:
    """What ran while rows of a layer travelled, forward and backward, by `pi-dist bench sp --trace`.

    Raises:
        UserError: there is no exchange in it.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    content = json.loads(Path(trace).read_text())
    kernels = [(start, stop, _lane(name, kind), name) for name, kind, start, stop in content["kernels"]]
    shown: dict[str, list[float]] = {"forward": [], "backward": []}  # when exchanges start
    going = "forward"
    for start, _, lane, name in kernels:
        if lane == 0:
            going = "backward" if name in _BACKWARD else "forward"
        elif lane == 2:
            shown[going].append(start)
    if not (found := {way: starts for way, starts in shown.items() if starts}):
        raise UserError(f"{trace}: exchanges on a GPU (0) >= 1 does not hold; nothing to draw")
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(len(found), figsize=(9, 1.9 * len(found)), layout="constrained")
        for axes, (way, starts) in zip([panels] if len(found) == 1 else panels, found.items(), strict=True):
            begin = starts[len(starts) // 2] - 0.15 * _SHOWN_US
            for start, stop, lane, _ in kernels:
                if stop > begin and start < begin + _SHOWN_US:
                    bar = ((start - begin) / 1e3, (stop - start) / 1e3)
                    colour = _RANK_COLOURS[lane % len(_RANK_COLOURS)]
                    axes.broken_barh(
                        [bar], (-lane - 0.35, 0.7), color=colour, edgecolor="white", linewidth=0.6
                    )
            axes.set_yticks([-lane for lane in range(len(_LANES))], _LANES)
            axes.set_xlim(0, _SHOWN_US / 1e3)
            axes.set_title(way, **_HEADING)
        axes.set_xlabel("ms")
        row = content["row"]
        figure.suptitle(
            f"{row['method']}, k = {row['window']}, M = {row['num_skips']}, {row['tokens']:,} tokens on "
            f"{row['world_size']} GPUs, {row['overlap']}, {row['exchange']}: "
            f"{row['exposed_share']:.1%} of the step is exposed"
        )
        save(figure, path)
        plt.close(figure)


def main(arguments: list[str]) -> int:
    """Write those of the definitions into the one directory that is named."""
    if len(arguments) != 1:
        print("usage: python -m pi_dist.measure.figures DIR", file=sys.stderr)
        return 2
    os.makedirs(arguments[0], exist_ok=True)
    draw_pattern(os.path.join(arguments[0], "pattern.svg"))
    draw_exchange(os.path.join(arguments[0], "exchange.svg"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
