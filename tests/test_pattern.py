"""pi_dist.ops.pattern: who attends to whom, against the definition written out."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pi_dist.config import ConfigError, ModelConfig
from pi_dist.ops.pattern import HeadGroup, PiPattern, default_num_strides, layer_patterns, total_reach


@given(
    window=st.integers(0, 8),
    stride=st.integers(1, 12),
    causal=st.booleans(),
    include_self=st.booleans(),
    skips=st.integers(0, 5),
)
def test_offsets_are_the_union_of_ring_and_skips(window, stride, causal, include_self, skips):
    pattern = PiPattern(window, stride, causal, include_self, skips)
    ring = {o for o in range(-window, window + 1) if o != 0 or include_self}
    jumps = {sign * m * stride for m in range(1, skips + 1) for sign in (1, -1)}
    if causal:
        ring, jumps = {o for o in ring if o >= 0}, {o for o in jumps if o > 0}
    assert set(pattern.ring_offsets()) == ring
    assert set(pattern.skip_offsets(stride)) == jumps - set(range(-window, window + 1))
    assert pattern.offsets() == tuple(sorted(ring | jumps))
    assert pattern.reach() == max(ring | jumps | {0})


@given(window=st.integers(0, 8), stride=st.integers(1, 12), skips=st.integers(0, 5), causal=st.booleans())
def test_no_target_is_both_ring_and_skip(window, stride, skips, causal):
    pattern = PiPattern(window, stride, causal, num_skips=skips)
    every = pattern.ring_offsets() + pattern.skip_offsets(stride)
    assert len(every) == len(set(every))


def test_order_of_the_offsets():
    pattern = PiPattern(2, 5, causal=False, num_skips=2)
    assert pattern.ring_offsets() == (2, 1, 0, -1, -2)
    assert pattern.skip_offsets(5) == (5, 10, -5, -10)
    assert PiPattern(2, 5).ring_offsets() == (2, 1, 0)
    assert PiPattern(2, 5, include_self=False).ring_offsets() == (2, 1)


def test_a_stride_within_the_window_is_no_skip():
    assert PiPattern(4, 4).skip_offsets(4) == ()
    assert PiPattern(4, 2, num_skips=3).skip_offsets(2) == (6,)
    assert PiPattern(4, 2, num_skips=3).offsets() == (0, 1, 2, 3, 4, 6)


def test_a_token_may_attend_to_nothing():
    pattern = PiPattern(0, 3, include_self=False, num_skips=0)
    assert pattern.offsets() == () and pattern.reach() == 0


def test_offsets_of_heads_are_united():
    pattern = PiPattern(1, (7, 3, 7))
    assert pattern.distinct_strides() == (3, 7)
    assert pattern.offsets() == (0, 1, 3, 7)
    assert pattern.reach() == 7
    assert pattern.head_strides(3) == (7, 3, 7)
    assert PiPattern(1, 5).head_strides(3) == (5, 5, 5)
    assert PiPattern(1, 5).distinct_strides() == (5,)


def test_strides_as_a_list_are_the_tuple():
    pattern = PiPattern(1, [3, 7])
    assert pattern == PiPattern(1, (3, 7)) and hash(pattern) == hash(PiPattern(1, (3, 7)))


def test_offsets_have_no_width():
    assert PiPattern(4, 2**40, num_skips=3).reach() == 3 * 2**40


@pytest.mark.parametrize(
    ("arguments", "equation"),
    [
        ({"window": -1, "strides": 4}, r"window \(-1\) >= 0"),
        ({"window": 1, "strides": 0}, r"strides \(0\) >= 1"),
        ({"window": 1, "strides": (4, 0)}, r"strides \(\(4, 0\)\) >= 1"),
        ({"window": 1, "strides": ()}, r"strides \(\(\)\) >= 1"),
        ({"window": 1, "strides": 4, "num_skips": -1}, r"num_skips \(-1\) >= 0"),
    ],
)
def test_impossible_sizes_are_refused_with_their_equation(arguments, equation):
    with pytest.raises(ValueError, match=equation):
        PiPattern(**arguments)


def test_heads_of_another_number_are_refused():
    with pytest.raises(ValueError, match=r"len\(strides\) \(2\) == num_heads \(4\)"):
        PiPattern(1, (3, 5)).head_strides(4)
    with pytest.raises(ValueError, match=r"num_heads \(4\) % num_kv_heads \(3\) == 0"):
        PiPattern(1, 3).head_groups(4, 3)


def test_head_groups_of_one_stride_are_one_group():
    assert PiPattern(1, 5).head_groups(4, 2) == (HeadGroup((0, 1), (5, 5)),)


def test_head_groups_join_equal_strides_in_order_of_the_first_head():
    pattern = PiPattern(1, (3, 5, 9, 9, 3, 5, 5, 3))
    assert pattern.head_groups(8, 4) == (
        HeadGroup((0, 2), (3, 5)),
        HeadGroup((1,), (9, 9)),
        HeadGroup((3,), (5, 3)),
    )


@given(st.data())
def test_head_groups_give_every_query_head_its_stride(data):
    kv_heads, share = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    heads = kv_heads * share
    strides = tuple(data.draw(st.lists(st.integers(1, 3), min_size=heads, max_size=heads)))
    groups = PiPattern(0, strides).head_groups(heads, kv_heads)
    found = {kv * share + s: g.strides[s] for g in groups for kv in g.kv_heads for s in range(share)}
    assert found == dict(enumerate(strides))
    assert sorted(kv for g in groups for kv in g.kv_heads) == list(range(kv_heads))
    assert len({g.strides for g in groups}) == len(groups)


@given(stride=st.integers(1, 100), context=st.integers(1, 10**6))
def test_default_num_strides_is_the_most_that_stay_below_the_context(stride, context):
    count = default_num_strides(stride, context)
    assert count == max(1, sum(stride * 2**layer < context for layer in range(30)))


def test_fixed_schedule_is_the_default():
    assert layer_patterns(ModelConfig(num_layers=3), 4096) == (PiPattern(4, 16),) * 3


def test_doubling_schedule_starts_again_after_num_strides():
    def strides(**keys) -> list:
        model = ModelConfig(num_layers=5, schedule="doubling", **keys)
        return [pattern.strides for pattern in layer_patterns(model, 100)]

    assert strides(num_strides=2) == [16, 32, 16, 32, 16]
    assert strides() == [16, 32, 64, 16, 32]  # 128 is not below a context of 100


def test_per_head_schedule_gives_every_layer_all_strides():
    model = ModelConfig(num_layers=2, num_heads=4, schedule="per_head", num_strides=3)
    assert layer_patterns(model, 4096) == (PiPattern(4, (16, 32, 64, 16)),) * 2


def test_explicit_strides_replace_the_schedule():
    model = ModelConfig(num_layers=2, num_heads=2, schedule="doubling", strides=[[3, 5], [7, 9]])
    assert [pattern.strides for pattern in layer_patterns(model, 100)] == [(3, 5), (7, 9)]
    with pytest.raises(ConfigError, match=r"len\(strides\) \(2\) == num_layers \(3\)"):
        layer_patterns(dataclasses.replace(model, num_layers=3), 100)


def test_layers_take_every_size_from_the_model():
    model = ModelConfig(num_layers=1, window=3, stride=7, num_skips=2, causal=False, include_self=False)
    assert layer_patterns(model, 100) == (PiPattern(3, 7, causal=False, include_self=False, num_skips=2),)


def test_ablations_remove_the_ring_or_the_skips():
    (no_ring,) = layer_patterns(ModelConfig(num_layers=1, ring=False), 100)
    assert no_ring.offsets() == (16,)
    (no_skip,) = layer_patterns(ModelConfig(num_layers=1, skip=False), 100)
    assert no_skip.offsets() == (0, 1, 2, 3, 4)


def test_total_reach_sums_the_larger_of_window_and_skips():
    assert total_reach(layer_patterns(ModelConfig(), 4096)) == 192
    assert total_reach(layer_patterns(ModelConfig(num_skips=3), 4096)) == 12 * 48
    assert total_reach(layer_patterns(ModelConfig(window=50), 4096)) == 12 * 50
    assert total_reach(layer_patterns(ModelConfig(schedule="doubling"), 65521)) == 65520
    assert total_reach((PiPattern(2, 9), PiPattern(5, 1, num_skips=0))) == 14
    assert total_reach(()) == 0
