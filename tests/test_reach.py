"""pi_dist.measure.reach against a brute-force search for paths, and against what is known in closed form."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pi_dist.config import ModelConfig
from pi_dist.measure import reach
from pi_dist.ops.pattern import PiPattern, layer_patterns, total_reach

PAPER = ModelConfig(num_layers=12, window=4, stride=16)


def neighbours(i: int, n: int, pattern: PiPattern) -> set[int]:
    """Positions that i attends to, from the definition and not from the pattern's own offsets."""
    strides = {pattern.strides} if isinstance(pattern.strides, int) else set(pattern.strides)
    found = {j for j in range(n) if abs(i - j) <= pattern.window and (j != i or pattern.include_self)}
    for stride in strides:
        for m in range(1, pattern.num_skips + 1):
            found |= {i - m * stride, i + m * stride}
    return {j for j in found if 0 <= j < n and (j <= i or not pattern.causal)}


def paths(patterns: tuple[PiPattern, ...], n: int) -> set[int]:
    """Distances from which the last of n tokens is influenced: position by position, layer by layer."""
    seen = {n - 1}
    for pattern in reversed(patterns):
        seen |= {j for i in seen for j in neighbours(i, n, pattern)}
    return {n - 1 - j for j in seen}


def members(bits: int) -> set[int]:
    return {d for d in range(bits.bit_length()) if bits >> d & 1}


@st.composite
def stacks(draw) -> tuple[PiPattern, ...]:
    """One to five layers of different strides, all causal or all bidirectional."""
    causal = draw(st.booleans())
    layer = st.builds(
        PiPattern,
        window=st.integers(0, 4),
        strides=st.one_of(st.integers(1, 12), st.tuples(st.integers(1, 12), st.integers(1, 12))),
        causal=st.just(causal),
        include_self=st.booleans(),
        num_skips=st.integers(0, 3),
    )
    return tuple(draw(st.lists(layer, min_size=1, max_size=5)))


@given(patterns=stacks(), n=st.integers(1, 60))
def test_reachable_is_what_a_search_for_paths_finds(patterns, n):
    assert members(reach.reachable(patterns, n)) == paths(patterns, n)


@given(patterns=stacks())
def test_total_reach_is_the_farthest_distance_in_a_context_that_has_room(patterns):
    total = total_reach(patterns)
    assert reach.reachable(patterns, total + 20).bit_length() - 1 == total


def test_bidirectional_paths_may_turn_round_and_causal_ones_may_not():
    def skip_then_window(causal: bool) -> tuple[PiPattern, ...]:
        return (PiPattern(1, 5, causal, num_skips=0), PiPattern(0, 5, causal))

    assert members(reach.reachable(skip_then_window(True), 10)) == {0, 1, 5, 6}
    assert members(reach.reachable(skip_then_window(False), 10)) == {0, 1, 4, 5, 6}


def test_no_path_leaves_the_sequence():
    # Distance 2 needs 5 back and 3 forward, or 3 forward and 5 back: both leave a sequence of 5 tokens.
    patterns = (PiPattern(0, (3, 5), causal=False), PiPattern(0, (3, 5), causal=False))
    assert 2 in members(reach.reachable(patterns, 6))
    assert 2 not in members(reach.reachable(patterns, 5))


def test_an_empty_context_is_refused():
    with pytest.raises(ValueError, match=r"context \(0\) >= 1"):
        reach.reachable((PiPattern(1, 2),), 0)


def test_the_papers_own_configuration():
    r = reach.report(PAPER, 32768)
    assert (r.reach, r.reach_in_context) == (192, 192)
    # 172 of the offsets 0..192 can be reached; the token's own is one of them.
    assert r.reached_offsets == 171
    assert r.covered_share == 171 / 32767
    assert r.first_hole == min(set(range(193)) - paths(layer_patterns(PAPER, 32768), 250)) == 157
    assert (r.proposition_1_bound, r.proposition_1_violated) == (112, True)


def test_proposition_1_is_violated_by_a_single_layer():
    r = reach.report(ModelConfig(num_layers=1), 100)
    assert (r.reach, r.proposition_1_bound, r.proposition_1_violated) == (16, 4, True)


def test_proposition_1_holds_where_the_window_is_at_least_the_stride():
    r = reach.report(ModelConfig(num_layers=5, window=8, stride=3), 100)
    assert (r.reach, r.proposition_1_bound, r.proposition_1_violated) == (40, 49, False)


@pytest.mark.parametrize(
    "model",
    [
        ModelConfig(schedule="doubling"),
        ModelConfig(num_skips=2),
        ModelConfig(causal=False),
        ModelConfig(skip=False),
        ModelConfig(num_layers=2, strides=[16, 16]),
    ],
)
def test_proposition_1_is_not_applied_to_what_it_does_not_speak_of(model):
    r = reach.report(model, 500)
    assert r.proposition_1_bound is None and r.proposition_1_violated is None


def test_doubling_strides_cover_nearly_all_of_65520():
    r = reach.report(ModelConfig(schedule="doubling"), 65521)
    assert (r.reach, r.reach_in_context, r.first_hole) == (65520, 65520, 8189)
    assert round(100 * (r.reached_offsets + 1) / 65521, 1) == 98.1
    assert round(100 * r.covered_share, 1) == 98.1
    assert r.strides == tuple(16 << layer for layer in range(12))


@given(st.data())
def test_doubling_covers_everything_iff_the_windows_fill_a_stride(data):
    window = data.draw(st.integers(1, 6))
    stride = data.draw(st.integers(window, 20))
    depth, extra = data.draw(st.integers(1, 6)), data.draw(st.integers(0, 5))
    doubling = tuple(PiPattern(window, stride << layer) for layer in range(depth))
    patterns = doubling + (PiPattern(window, 1, num_skips=0),) * extra
    goal = stride * (2**depth - 1)
    bits = reach.reachable(patterns, goal + 1)
    covered = bits == (1 << goal + 1) - 1
    assert covered == ((extra + 1) * window >= stride - 1)
    windows = -(-(stride - 1) // window)
    if extra == 0 and not covered and windows <= depth:
        hole = min(set(range(goal + 1)) - members(bits))
        assert hole == stride * (2 ** (depth - windows + 1) - 1) + window * (windows - 1) + 1


@given(st.data())
def test_growing_strides_of_several_skips_cover_everything(data):
    window, skips = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    stride, depth = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 4))
    extra = -(-(stride - 1) // window)
    growing = tuple(
        PiPattern(window, stride * (skips + 1) ** layer, num_skips=skips) for layer in range(depth)
    )
    goal = stride * ((skips + 1) ** depth - 1)
    bits = reach.reachable(growing + (PiPattern(window, 1, num_skips=0),) * extra, goal + 1)
    assert bits == (1 << goal + 1) - 1


@given(
    causal=st.booleans(),
    window=st.integers(0, 3),
    stride=st.integers(1, 9),
    skips=st.integers(0, 2),
    schedule=st.sampled_from(["fixed", "doubling", "per_head"]),
    distance=st.integers(0, 40),
)
def test_fewest_layers_are_enough_and_one_less_is_not(causal, window, stride, skips, schedule, distance):
    def stack(layers: int) -> tuple[PiPattern, ...]:
        model = ModelConfig(
            num_layers=layers,
            num_heads=3,
            window=window,
            stride=stride,
            num_skips=skips,
            schedule=schedule,
            causal=causal,
        )
        return layer_patterns(model, distance + 1)

    model = ModelConfig(
        num_heads=3, window=window, stride=stride, num_skips=skips, schedule=schedule, causal=causal
    )
    by_reach = reach.fewest_layers(model, distance)
    exactly = reach.fewest_layers_covering(model, distance)
    if by_reach is None:
        assert window == 0 and skips == 0 and distance > 0 and exactly is None
        return
    assert total_reach(stack(by_reach)) >= distance
    assert by_reach == 0 or total_reach(stack(by_reach - 1)) < distance
    tried = [layers for layers in range(42) if distance in paths(stack(layers), distance + 1)]
    assert exactly == (tried[0] if tried else None)
    assert exactly is None or exactly >= by_reach


def test_fewest_layers_of_known_stacks():
    assert reach.fewest_layers(PAPER, 192) == 12
    assert reach.fewest_layers(PAPER, 193) == 13
    assert reach.fewest_layers(PAPER, 1_000_000) == 62_500
    assert reach.fewest_layers_covering(PAPER, 157) == 13
    doubling = ModelConfig(schedule="doubling", num_strides=12)
    assert reach.fewest_layers(doubling, 65520) == 12
    assert reach.fewest_layers(ModelConfig(window=0, num_skips=0), 1) is None


def test_fewest_layers_of_explicit_strides_end_with_the_list():
    model = ModelConfig(num_layers=3, window=2, strides=[10, 20, 40])
    assert reach.fewest_layers(model, 30) == 2
    assert reach.fewest_layers(model, 70) == 3
    assert reach.fewest_layers(model, 71) is None
    assert reach.fewest_layers_covering(model, 45) is None


def test_a_context_of_one_token_is_covered():
    r = reach.report(PAPER, 1)
    assert (r.covered_share, r.reached_offsets, r.first_hole, r.reach_in_context) == (1.0, 0, None, 0)


def test_reach_without_a_ring_or_without_skips():
    no_ring = reach.report(ModelConfig(num_layers=3, ring=False), 100)
    assert members(no_ring.reached) == {0, 16, 32, 48} and no_ring.window == 0
    no_skip = reach.report(ModelConfig(num_layers=3, skip=False), 100)
    assert members(no_skip.reached) == set(range(13)) and no_skip.num_skips == 0


def test_the_union_over_heads_counts():
    model = ModelConfig(num_layers=1, num_heads=2, window=1, strides=[[5, 9]])
    r = reach.report(model, 20)
    assert members(r.reached) == {0, 1, 5, 9}
    assert r.reach == 9 and r.schedule == "explicit" and r.strides == ((5, 9),)


def test_a_million_tokens_and_many_skips_take_seconds_at_most():
    model = ModelConfig(num_layers=32, num_heads=16, window=512, stride=64, num_skips=64, schedule="per_head")
    start = time.perf_counter()
    r = reach.report(model, 1 << 20)
    assert time.perf_counter() - start < 30
    assert r.covered_share == 1.0


def test_json_is_plain_and_complete():
    values = reach.to_json(reach.report(ModelConfig(num_layers=1, num_heads=2, strides=[[5, 9]]), 20))
    assert json.loads(json.dumps(values)) == values
    assert values["reach"] == 9 and values["covered_share"] == 6 / 19 and values["strides"] == [[5, 9]]
    assert "model" not in values and "reached" not in values


def test_description_warns_when_the_context_exceeds_the_reach():
    text = reach.describe(reach.report(PAPER, 32768))
    assert "WARNING" in text and "cannot see the first 32,575 tokens" in text
    assert "171 of the 32,767 earlier tokens" in text
    assert "Proposition 1 bounds the reach by 112: the pattern reaches 192" in text
    assert "WARNING" not in reach.describe(reach.report(PAPER, 100))
    holes = reach.describe(reach.report(ModelConfig(schedule="doubling"), 32768))
    assert "no path through the layers gets there: the last token cannot see the first 11 tokens" in holes
    assert "takes to reach the first token: 15." in holes


def picture(model: ModelConfig, context: int) -> list[str]:
    """The rows of the grid, blanks between the cells removed."""
    lines = reach.describe(reach.report(model, context)).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("The first layer")) + 1
    end = next(i for i, line in enumerate(lines) if line.startswith("  o the token itself"))
    return [line.replace(" ", "") for line in lines[start:end]]


@given(window=st.integers(0, 9), stride=st.integers(1, 16), skips=st.integers(0, 2), n=st.integers(1, 80))
def test_picture_of_one_token_a_cell_shows_each_rows_neighbours(window, stride, skips, n):
    model = ModelConfig(num_layers=1, window=window, stride=stride, num_skips=skips)
    pattern = layer_patterns(model, n)[0]
    assume(pattern.reach() <= 16)
    rows = picture(model, n)
    width = len(rows[0])
    assert width <= 24 and width <= n and 1 <= len(rows) <= 8
    for i, row in enumerate(rows, start=width - len(rows)):
        assert row[i] == "o"
        assert {j for j, cell in enumerate(row) if cell in "ok"} == {
            j for j in range(i + 1) if i - j <= window
        }
        assert {j for j, cell in enumerate(row) if cell != "·"} == neighbours(i, width, pattern) | {i}


@pytest.mark.parametrize("causal", [True, False])
def test_picture_of_a_long_stride_fits_by_merging_tokens(causal):
    rows = picture(ModelConfig(window=4, stride=1000, causal=causal), 32768)
    assert len(rows) == 8 and all(len(row) <= 26 for row in rows)
    assert all("π" in row and "k" in row for row in rows)
    assert all(("π" in row[row.index("o") :]) is not causal for row in rows)


def bar(model: ModelConfig, context: int) -> tuple[str, str]:
    lines = reach.describe(reach.report(model, context)).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("Through"))
    return lines[at + 1], lines[at + 2]


def test_bar_is_full_up_to_the_reach_and_empty_beyond():
    cells, marker = bar(ModelConfig(num_layers=5, window=10, num_skips=0), 2000)
    at = marker.index("^")
    assert marker.split() == ["^", "50"]
    assert set(cells[4:at]) == {"█"} and cells[at] in "█▓░"
    assert set(cells[at + 1 : cells.rindex(" ")]) == {"·"}


def test_bar_shows_holes_within_the_reach():
    cells, _ = bar(ModelConfig(num_layers=2, window=0), 100)
    assert "█" not in cells and "░" in cells
