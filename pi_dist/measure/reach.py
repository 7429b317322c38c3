"""How far a stack of π-attention layers sees: reach, coverage of the context, fewest layers to a distance.

A set of distances is one Python integer: bit d is set when the token d places before the last one can
influence the output at the last token. A layer shifts that integer by its offsets, so a million tokens take
milliseconds.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass, field

from pi_dist.config import LONGEST_CONTEXT, ConfigError, ModelConfig
from pi_dist.ops.pattern import PiPattern, default_num_strides, layer_patterns, total_reach

MAX_LAYERS = 1024
"""Depth at which `fewest_layers_covering` gives up."""

_QUICK = 2**31  # layers times tokens for which it is found out within seconds
_GRID_ROWS = 8
_GRID_SPAN = 16
_BAR_CELLS = 48


def _dilate(bits: int, step: int, count: int) -> int:
    """Union of `bits` shifted by 0, step, …, count·step (left; a negative step shifts right)."""
    covered = 1  # shifts 0 … (covered - 1)·step are in `bits`
    while covered <= count:
        hop = min(covered, count + 1 - covered)
        bits |= bits << hop * step if step > 0 else bits >> hop * -step
        covered += hop
    return bits


def _through_layer(bits: int, pattern: PiPattern, context: int) -> int:
    """The distances that `bits`, all below `context`, become through one layer and its residual."""
    reached = bits
    for direction in (1,) if pattern.causal else (1, -1):
        reached |= _dilate(bits, direction, min(pattern.window, context - 1))
        for stride in pattern.distinct_strides():
            reached |= _dilate(bits, direction * stride, min(pattern.num_skips, (context - 1) // stride))
    return reached & ((1 << context) - 1)


def reachable(patterns: tuple[PiPattern, ...], context: int) -> int:
    """Distances from which the last token of a sequence is influenced, as a bit set.

    The offsets of all heads of a layer are united. The residual connection keeps every distance that is
    already there, 0 included. No path leaves the sequence.

    Args:
        patterns: one per layer, first layer first.
        context: n, tokens of the sequence.

    Returns:
        An integer below 2^n whose bit d is set when token n-1-d can influence the output at token n-1.

    Raises:
        ValueError: the context is empty.
    """
    if context < 1:
        raise ValueError(f"reachable: context ({context}) >= 1 does not hold")
    bits = 1
    for pattern in reversed(patterns):
        bits = _through_layer(bits, pattern, context)
    return bits


@dataclass(frozen=True)
class ReachReport:
    """What the last token of a context can be influenced by. Distances are in tokens."""

    num_layers: int
    window: int
    """k of the layers (0 where the model has no ring)."""
    num_skips: int
    """M of the layers (0 where the model has no skips)."""
    schedule: str
    """fixed, doubling, per_head, or explicit where the model lists its strides."""
    strides: tuple[int | tuple[int, ...], ...]
    """π of every layer: one for all heads, or one per head."""
    context: int
    reach: int
    """Σ over layers of max(k, M·π): the farthest distance if the context had no end."""
    reach_in_context: int
    """The farthest distance that is reachable inside the context."""
    covered_share: float
    """Share of the context-1 earlier tokens that can influence the last one; 1 where there are none."""
    reached_offsets: int
    """Number of those earlier tokens; the last token itself is not counted."""
    first_hole: int | None
    """The smallest distance that is not reachable; None when all of the context is."""
    proposition_1_bound: int | None
    """kL + π·ceil(log2 L), the paper's bound on the reach; None unless causal, fixed stride, M = 1."""
    proposition_1_violated: bool | None
    """Whether `reach` is larger than that bound."""
    model: ModelConfig = field(repr=False)
    """The configuration that the report is about."""
    reached: int = field(repr=False)
    """The bit set of `reachable`."""


def report(model: ModelConfig, context: int) -> ReachReport:
    """Measure what the last of `context` tokens can be influenced by in this model.

    Raises:
        ValueError: the context is empty, or (ConfigError) too long, or the model's strides do not fit its
            layers.
    """
    if context > LONGEST_CONTEXT:
        raise ConfigError(f"context: context ({context}) <= 2^31 does not hold")
    patterns = layer_patterns(model, context)
    reached = reachable(patterns, context)
    reach = total_reach(patterns)
    reached_offsets = reached.bit_count() - 1
    first_hole = (~reached & (reached + 1)).bit_length() - 1
    window = model.window if model.ring else 0
    num_skips = model.num_skips if model.skip else 0
    bound = None
    if model.causal and model.ring and num_skips == 1 and model.schedule == "fixed" and model.strides is None:
        bound = window * model.num_layers + model.stride * (model.num_layers - 1).bit_length()
    return ReachReport(
        num_layers=model.num_layers,
        window=window,
        num_skips=num_skips,
        schedule=model.schedule if model.strides is None else "explicit",
        strides=tuple(pattern.strides for pattern in patterns),
        context=context,
        reach=reach,
        reach_in_context=reached.bit_length() - 1,
        covered_share=reached_offsets / (context - 1) if context > 1 else 1.0,
        reached_offsets=reached_offsets,
        first_hole=first_hole if first_hole < context else None,
        proposition_1_bound=bound,
        proposition_1_violated=None if bound is None else reach > bound,
        model=model,
        reached=reached,
    )


def _deepened(model: ModelConfig, num_layers: int, context: int) -> tuple[PiPattern, ...]:
    """The model's layers continued to `num_layers`; explicit strides end where their list ends."""
    if model.strides is not None:
        return layer_patterns(model, context)
    return layer_patterns(dataclasses.replace(model, num_layers=num_layers), context)


def fewest_layers(model: ModelConfig, distance: int) -> int | None:
    """Fewest layers of this kind, counted from the first, whose total reach gets to `distance`.

    `num_strides`, where not given, is that of a context of distance + 1 tokens. Whether exactly that distance
    is reachable is another question: see `fewest_layers_covering`.

    Returns:
        The number of layers, or None when no depth (or an explicit list of strides) gets there.
    """
    period = model.num_strides or default_num_strides(model.stride, distance + 1)
    reaches = [pattern.reach() for pattern in _deepened(model, period, distance + 1)]
    cycle = sum(reaches)
    if distance > cycle and (cycle == 0 or model.strides is not None):
        return None
    full_cycles, rest = divmod(distance, cycle) if distance > cycle else (0, distance)
    layers = full_cycles * len(reaches)
    for reach in reaches:
        if rest <= 0:
            break
        rest -= reach
        layers += 1
    return layers


def fewest_layers_covering(model: ModelConfig, distance: int) -> int | None:
    """Fewest layers of this kind, counted from the first, through which exactly `distance` is reachable.

    The sequence has distance + 1 tokens.

    Returns:
        The number of layers, or None when `MAX_LAYERS` of them (or an explicit list of strides) do not get
        there.
    """
    context = distance + 1
    # Paths run through the layers from last to first. Causal shifts commute, and bidirectional patterns are
    # their own mirror image, so following the path from its other end, first layer first, finds the same.
    bits = 1
    for layers, pattern in enumerate(((), *_deepened(model, MAX_LAYERS, context))):
        if layers > 0:
            bits = _through_layer(bits, pattern, context)
        if bits >> distance & 1:
            return layers
    return None


def to_json(report: ReachReport) -> dict:
    """The report as plain JSON values: every field but the model and the bit set."""
    values = {f.name: getattr(report, f.name) for f in dataclasses.fields(report)}
    del values["model"], values["reached"]
    values["strides"] = [list(s) if isinstance(s, tuple) else s for s in report.strides]
    return values


def _grid(pattern: PiPattern, context: int) -> list[str]:
    """Text picture of who attends to whom in one layer (in its first head, where the heads differ)."""
    stride = pattern.strides if isinstance(pattern.strides, int) else pattern.strides[0]
    skips = pattern.skip_offsets(stride)
    span = max(pattern.window, *skips) if skips else pattern.window
    sides = 1 if pattern.causal else 2
    scale = max(1, -(-span * sides // _GRID_SPAN))  # tokens of one cell's side
    before = -(-span // scale)
    cells = min(before * sides + _GRID_ROWS, -(-context // scale))
    first = min(before, max(0, cells - _GRID_ROWS))

    def mark(gap: int) -> str:
        """The cell `gap` cells to the left of the diagonal: is any of its offsets in use?"""
        nearest, farthest = gap * scale - scale + 1, gap * scale + scale - 1
        if gap == 0:
            return "o"
        if pattern.window >= (nearest if gap > 0 else -farthest) and (gap > 0 or not pattern.causal):
            return "k"
        return "π" if any(nearest <= offset <= farthest for offset in skips) else "·"

    rows = range(first, min(first + _GRID_ROWS, cells))
    lines = ["  " + " ".join(mark(row - column) for column in range(cells)) for row in rows]
    itself = "o the token itself" + ("" if pattern.include_self else " (not attended to)")
    legend = [itself]
    legend += ["k window"] if pattern.window else []
    legend += ["π skip"] if skips else []
    axis = (
        "one cell is one token"
        if scale == 1
        else f"one cell is {scale:,} × {scale:,} tokens, marked if any pair attends"
    )
    return [*lines, "  " + ", ".join(legend) + f"; {axis}."]


def _bar(report: ReachReport) -> list[str]:
    """Coverage by distance as one line of cells, equally wide in the logarithm of the distance."""
    last = report.context - 1
    edges = sorted({round(last ** (i / _BAR_CELLS)) for i in range(_BAR_CELLS)} | {last + 1})
    cells, marker = "", 0
    for low, high in itertools.pairwise(edges):
        share = (report.reached >> low & ((1 << high - low) - 1)).bit_count() / (high - low)
        cells += "█" if share == 1 else "▓" if share >= 0.5 else "░" if share > 0 else "·"
        marker += high <= report.reach_in_context
    lines = [f"  1 {cells} {last:,}"]
    if report.reach_in_context > 0:
        lines.append(" " * (4 + marker) + f"^ {report.reach_in_context:,}")
    return [
        *lines,
        "  █ all reached, ▓ half or more, ░ fewer, · none; equal steps are equal factors of distance.",
    ]


def _strides_in_words(report: ReachReport) -> str:
    if report.num_skips == 0:
        return "no skips"
    skips = "1 skip" if report.num_skips == 1 else f"{report.num_skips} skips"
    per_layer = [(s,) if isinstance(s, int) else s for s in report.strides]
    distinct = sorted({stride for layer in per_layer for stride in layer})
    if len(distinct) == 1:
        return f"{skips} with stride {distinct[0]:,} in every layer"
    where = "over the heads of every layer" if len(set(report.strides)) == 1 else "over the layers"
    return f"{skips} with strides {distinct[0]:,} to {distinct[-1]:,} {where} ({report.schedule})"


def _layers_to(model: ModelConfig, distance: int) -> str:
    """How many reach exactly so far, or at least, where that takes long to find; empty if none do."""
    least = fewest_layers(model, distance)
    if least is None:
        return ""
    found = fewest_layers_covering(model, distance) if least * distance < _QUICK else None
    return f"at least {least:,}" if found is None else f"{found:,}"


def describe(report: ReachReport) -> str:
    """The report in words, with a picture of one layer's attention and a bar of what the stack covers."""
    r = report
    last = r.context - 1
    layers = "1 layer" if r.num_layers == 1 else f"{r.num_layers} layers"
    kind = "causal" if r.model.causal else "bidirectional"
    share = (
        f"{100 * r.covered_share:.3g} %" if r.first_hole is None or r.covered_share < 0.999 else "over 99.9 %"
    )
    lines = [
        f"{layers}, {kind}, window {r.window:,}, {_strides_in_words(r)}.",
        f"Reach: {r.reach:,} tokens to the left. Context: {r.context:,}.",
    ]
    if last > 0:
        lines.append(
            f"{r.reached_offsets:,} of the {last:,} earlier tokens can influence the last one: {share}."
        )
    unseen = last - r.reach_in_context
    if unseen > 0:
        why = "the context exceeds the reach" if r.reach < last else "no path through the layers gets there"
        lines.append(f"WARNING: {why}: the last token cannot see the first {unseen:,} tokens.")
        if needed := _layers_to(r.model, last):
            lines.append(f"  Layers of this kind that it takes to reach the first token: {needed}.")
        if r.schedule == "fixed" and r.num_skips > 0:
            doubling = total_reach(
                layer_patterns(dataclasses.replace(r.model, schedule="doubling"), r.context)
            )
            if doubling > r.reach:
                lines.append(f"  With doubling strides, {layers} would reach {doubling:,} tokens.")
    if r.first_hole is not None and r.first_hole < r.reach_in_context:
        holes = r.reach_in_context - r.reached_offsets
        lines.append(f"Within the reach {holes:,} distances are left out, the nearest is {r.first_hole:,}.")
    if r.proposition_1_bound is not None:
        verdict = (
            f"the pattern reaches {r.reach:,}, so the bound is wrong"
            if r.proposition_1_violated
            else "it holds here"
        )
        lines.append(f"The paper's Proposition 1 bounds the reach by {r.proposition_1_bound:,}: {verdict}.")
    pattern = layer_patterns(r.model, r.context)[0]
    tokens = "the last tokens" if pattern.causal else "tokens in the middle"
    head = "" if isinstance(pattern.strides, int) else ", first head"
    lines += [
        "",
        f"The first layer{head}: rows are {tokens} of a sequence, columns the tokens they attend to.",
    ]
    lines += _grid(pattern, r.context)
    if last > 0:
        lines += ["", f"Through {layers}: distances that can influence the last token."]
        lines += _bar(r)
    return "\n".join(lines)
