"""Sequence parallelism on real ranks: equal to one device, gradients included, with the planned bytes."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from pi_dist.config import OVERLAPS
from pi_dist.measure.timeline import counted_bytes
from pi_dist.ops import PiPattern
from pi_dist.ops.oracle import pi_attention_oracle
from pi_dist.parallel.collectives import ring_exchange
from pi_dist.parallel.exchange_plan import count_rows, make_plan
from pi_dist.parallel.pi_attention import sequence_parallel_pi_attention


def draw_inputs(seed, batch, length, heads, kv_heads, gated, labels_kind):
    """The same whole sequence on every rank."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(batch, length, h, 4, generator=generator, dtype=torch.float64)
        for h in (heads, kv_heads, kv_heads)
    )
    gate = torch.rand(batch, length, heads, generator=generator, dtype=torch.float64) if gated else None
    dout = torch.randn(q.shape, generator=generator, dtype=torch.float64)
    labels = None
    if labels_kind != "none":
        labels = torch.randint(0, 3, (batch, length), generator=generator).sort(dim=1).values.int()
    if labels_kind == "padded":
        labels[torch.rand(batch, length, generator=generator) < 0.2] = -1
        labels[0, length // 2 :] = -1  # whole shards of padding
    return q, k, v, gate, dout, labels


def oracle(inputs, pattern, options):
    q, k, v, gate, dout, labels = inputs
    tensors = [x if x is None else x.clone().requires_grad_() for x in (q, k, v, gate)]
    out = pi_attention_oracle(
        *tensors, pattern, segment_ids=labels, padding_mask=None if labels is None else labels >= 0, **options
    )
    wanted = [x for x in tensors if x is not None]
    return [out.detach(), *torch.autograd.grad((out * dout).sum(), wanted)]


def on_a_rank(
    pattern, options, input_arguments, fused, device="cpu", dtype=torch.float64, overlap="interior"
):
    """(this shard's output and gradients, rows sent forward and backward in elements by way)."""
    q, k, v, gate, dout, labels = (None if x is None else x.to(device) for x in draw_inputs(*input_arguments))
    rank, size = dist.get_rank(), dist.get_world_size()
    m = q.shape[1] // size
    mine = slice(rank * m, (rank + 1) * m)
    tensors = [x[:, mine].to(dtype, copy=True).requires_grad_() for x in (q, k, v)]
    tensors.append(None if gate is None else gate[:, mine].clone().requires_grad_())
    with counted_bytes() as sent:
        out = sequence_parallel_pi_attention(
            *tensors,
            pattern,
            dist.group.WORLD,
            labels=labels,
            fused_exchange=fused,
            overlap=overlap,
            **options,
        )
        gradients = torch.autograd.grad((out * dout[:, mine]).sum(), [x for x in tensors if x is not None])
    return [x.cpu() for x in (out.detach(), *gradients)], sent


def check_equal(pool, pattern, options, input_arguments, fused=False, device="cpu", overlap="interior"):
    found = pool.run(on_a_rank, pattern, options, input_arguments, fused, device, torch.float64, overlap)
    expected = oracle(draw_inputs(*input_arguments), pattern, options)
    for index, whole in enumerate(expected):
        parts = torch.cat([shard[index] for shard, _ in found], dim=1)
        torch.testing.assert_close(parts, whole, rtol=1e-11, atol=1e-11)
    return [sent for _, sent in found]


@st.composite
def cases(draw):
    heads, kv_heads = draw(st.sampled_from([(1, 1), (4, 2), (3, 3), (4, 1)]))
    strides = draw(
        st.integers(1, 20) | st.lists(st.integers(1, 20), min_size=heads, max_size=heads).map(tuple)
    )
    pattern = PiPattern(
        draw(st.integers(0, 12)), strides, draw(st.booleans()), draw(st.booleans()), draw(st.integers(0, 4))
    )
    options = {"logit_cap": draw(st.sampled_from([20.0, 0.7]))}
    if draw(st.booleans()):
        options |= {"dropout_p": 0.3, "seed": draw(st.integers(0, 2**62)), "row_start": 3}
    labels_kind = draw(st.sampled_from(["none", "documents", "padded"]))
    return pattern, options, (heads, kv_heads), draw(st.booleans()), labels_kind, draw(st.integers(0, 99))


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
def test_equals_the_dense_oracle_for_any_split(ranks, num_ranks):
    """Any n, window, stride, heads, documents, padding; shards down to one token; every form of exchange."""

    @settings(max_examples=25)
    @given(cases(), st.integers(1, 9), st.booleans(), st.sampled_from(OVERLAPS))
    def check(case, shard_length, fused, overlap):
        pattern, options, heads, gated, labels_kind, seed = case
        arguments = (seed, 2, shard_length * num_ranks, *heads, gated, labels_kind)
        check_equal(ranks(num_ranks), pattern, options, arguments, fused, overlap=overlap)

    check()


@pytest.mark.parametrize("causal", [True, False])
def test_two_ranks_do_not_swap_their_halos(ranks, causal):
    """Bidirectional on two ranks: the left and the right neighbour are the same rank."""
    check_equal(ranks(2), PiPattern(3, 5, causal=causal, num_skips=2), {}, (0, 1, 16, 2, 2, True, "none"))


def rows_by_brute_force(pattern, strides, shard, seq_len):
    """Positions outside the shard that some query in it attends to (ring, skip), from the definition."""
    halo, skip = set(), set()
    for i in range(*shard):
        for j in range(seq_len):
            if shard[0] <= j < shard[1] or (pattern.causal and j > i):
                continue
            if abs(i - j) <= pattern.window:
                halo.add(j)
            if any(abs(i - j) % s == 0 and 1 <= abs(i - j) // s <= pattern.num_skips for s in strides):
                skip.add(j)
    return halo, skip


@settings(max_examples=60)
@given(cases(), st.integers(1, 6), st.integers(1, 9), st.booleans())
def test_plan_moves_the_rows_of_the_definition_and_no_others(case, num_ranks, shard_length, fused):
    pattern, _, (heads, kv_heads), *_ = case
    seq_len = num_ranks * shard_length
    plans = [
        make_plan(pattern, heads, kv_heads, seq_len, num_ranks, rank, fused) for rank in range(num_ranks)
    ]
    for rank, plan in enumerate(plans):
        shard = (rank * shard_length, (rank + 1) * shard_length)
        for index, group in enumerate(plan.groups):
            halo, skip = rows_by_brute_force(pattern, group.strides, shard, seq_len)
            assert {p for run in plan.received[index] for p in range(*run)} == halo | skip
            received = [
                p
                for m in (*plan.halo_receives, *plan.skip_receives)
                for run in m.rows[index]
                for p in range(*run)
            ]
            assert sorted(received) == sorted(halo | skip)  # each row once
        for kind in ("halo", "skip"):  # what one sends is what the other expects
            for message in getattr(plan, f"{kind}_sends"):
                back = [m for m in getattr(plans[message.peer], f"{kind}_receives") if m.peer == rank]
                assert [m.rows for m in back] == [message.rows]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "pattern",
    [
        PiPattern(4, 6),  # stride inside the shard
        PiPattern(4, 6, num_skips=2, causal=False),
        PiPattern(3, 40, num_skips=3),  # strides beyond the shard
        PiPattern(20, 33, num_skips=2),  # window beyond the shard
        PiPattern(2, (5, 5, 9, 9), num_skips=1),  # strides per head
        PiPattern(5, 8, num_skips=0),  # window only
    ],
)
def test_bytes_sent_equal_the_formula(ranks, pattern, fused):
    """Forward `2·B·D·Σ_g rows_g` elements of K and V over all ranks, backward as many (fp64 here)."""
    num_ranks, shard_length, batch, head_dim, heads, kv_heads = 4, 16, 2, 4, 4, 2
    sent = check_equal(
        ranks(num_ranks),
        pattern,
        {},
        (1, batch, num_ranks * shard_length, heads, kv_heads, True, "none"),
        fused,
    )
    share = heads // kv_heads
    strides = pattern.head_strides(heads)
    halo_rows = union_rows = 0
    for rank in range(num_ranks):
        for kv_head in range(kv_heads):
            mine = strides[kv_head * share : (kv_head + 1) * share]
            halo, skip = rows_by_brute_force(
                pattern, mine, (rank * shard_length, (rank + 1) * shard_length), num_ranks * shard_length
            )
            halo_rows += len(halo)
            union_rows += len(halo | skip)
    volume = 2 * batch * head_dim * 8  # bytes of one row's K and V, fp64
    by_ring = sum(sum(s["isend"]) for s in sent)
    by_all_to_all = sum(sum(s["all_to_all_single"]) for s in sent)
    assert by_ring + by_all_to_all == 2 * volume * union_rows  # there and back
    assert by_ring == (0 if fused else 2 * volume * halo_rows)
    for s in sent:  # one collective a layer and direction, the same on every rank
        assert len(s["all_to_all_single"]) == 2 * (by_all_to_all > 0)


def test_gradients_of_bf16_keys_return_in_fp32(ranks):
    """Twice the bytes of the way there, by ring and by all_to_all."""
    pattern, arguments = PiPattern(3, 9, num_skips=2), (1, 1, 32, 2, 2, True, "none")
    both = [sent for _, sent in ranks(2).run(on_a_rank, pattern, {}, arguments, False, "cpu", torch.bfloat16)]
    for way in ("all_to_all_single", "isend"):
        forward, backward = (sum(sent[way][direction] for sent in both) for direction in (0, 1))
        assert backward == 2 * forward > 0


def test_interior_rank_skip_rows_are_equation_8():
    """For k < Mπ <= m an interior rank needs M·min(π, m) rows: eq. (8), the window halo among them."""
    for pattern, expected in (
        (PiPattern(4, 16), 16),
        (PiPattern(4, 16, num_skips=3), 48),
        (PiPattern(0, 64), 64),
    ):
        plan = make_plan(pattern, 2, 2, 256, 4, 2)
        rows = sum(count_rows(m.rows[0]) for m in (*plan.halo_receives, *plan.skip_receives))
        assert rows == expected
    assert not make_plan(PiPattern(4, 16), 2, 2, 256, 1, 0).any_halo


def test_plan_is_flat_in_the_context():
    """128M tokens and strides of millions: a plan is a handful of intervals, 64-bit and beyond."""
    plan = make_plan(PiPattern(64, (2**22, 2**26 + 1), num_skips=64), 2, 2, 2**37, 64, 63)
    assert plan.shard.stop == 2**37 and max(len(runs) for runs in plan.received) <= 65


def both_messages_of_a_pair():
    buffer = torch.zeros(1)
    with pytest.raises(ValueError, match="one send per other rank"):
        ring_exchange([(1 - dist.get_rank(), buffer), (1 - dist.get_rank(), buffer)], [], dist.group.WORLD)
    with pytest.raises(ValueError, match="one receive per other rank"):
        ring_exchange([], [(dist.get_rank(), buffer)], dist.group.WORLD)


def test_ring_exchange_refuses_what_could_swap(ranks):
    ranks(2).run(both_messages_of_a_pair)


def test_impossible_splits_are_refused():
    with pytest.raises(ValueError, match=r"seq_len \(10\) % num_ranks \(4\) == 0 does not hold"):
        make_plan(PiPattern(1, 2), 1, 1, 10, 4, 0)
    q = torch.zeros(1, 4, 1, 2)
    with pytest.raises(ValueError, match=r"of the whole sequence|labels"):
        sequence_parallel_pi_attention(
            q, q, q, None, PiPattern(1, 2), None, labels=torch.zeros(1, 3, dtype=torch.int32)
        )
