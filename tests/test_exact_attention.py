"""Exact attention by ring and by Ulysses on real ranks: equal to dense attention, gradients included."""

import functools
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from distributed import Ranks

import pi_dist.parallel.ring_attention
from pi_dist.ops.exact_attention import ExactBlock, exact_attention_bwd, exact_attention_fwd, merge
from pi_dist.parallel.balance import balanced_columns, rebalance
from pi_dist.parallel.exchange_plan import shard_starts
from pi_dist.parallel.ring_attention import ring_attention
from pi_dist.parallel.ulysses import ulysses_attention

HEADS, HEAD_DIM, SHARD = 4, 4, 6


def draw_inputs(length, kv_heads, with_labels):
    """([q, k, v] fp64, dout, labels): documents of any length, padding between them."""
    generator = torch.Generator().manual_seed(length + kv_heads)
    heads = (HEADS, kv_heads, kv_heads, HEADS)
    q, k, v, dout = (torch.randn(2, length, h, HEAD_DIM, generator=generator).double() for h in heads)
    labels = None
    if with_labels:
        labels = torch.randint(0, 3, (2, length), generator=generator).sort(dim=1).values.int()
        labels[0, 2:5] = -1
    return [q, k, v], dout, labels


def dense(tensors, dout, labels):
    """[out, dq, dk, dv] by the formula."""
    q, k, v = (x.clone().requires_grad_() for x in tensors)
    keys, values = (x.repeat_interleave(HEADS // k.shape[2], dim=2) for x in (k, v))
    seen = torch.ones(1, q.shape[1], q.shape[1], dtype=torch.bool).tril()
    if labels is not None:
        seen = seen & (labels[:, :, None] == labels[:, None]) & (labels >= 0)[:, :, None]
    scores = torch.einsum("bihd,bjhd->bhij", q, keys) * HEAD_DIM**-0.5
    weights = torch.softmax(scores.masked_fill(~seen[:, None], -1e30), dim=-1) * seen[:, None]
    out = torch.einsum("bhij,bjhd->bihd", weights, values)
    return [out.detach(), *torch.autograd.grad((out * dout).sum(), (q, k, v))]


def positions(num_ranks, rank, balanced):
    """The positions that a rank holds."""
    starts = shard_starts(SHARD * num_ranks, num_ranks, rank, balanced)
    return [start + t for start in starts for t in range(SHARD // len(starts))]


def on_a_rank(function, kv_heads, with_labels, balanced=False):
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {}  # as the trainer does, lest a shared-memory op is compiled
    deepspeed.init_distributed("gloo", dist_init_required=False, verbose=False)
    size = dist.get_world_size()
    tensors, dout, labels = draw_inputs(SHARD * size, kv_heads, with_labels)
    mine = positions(size, dist.get_rank(), balanced)
    if labels is not None:
        labels = labels[:, [p for rank in range(size) for p in positions(size, rank, balanced)]]
    leaves = [x[:, mine].clone().requires_grad_() for x in tensors]
    out = function(*leaves, dist.group.WORLD, labels=labels)
    return [out.detach(), *torch.autograd.grad((out * dout[:, mine]).sum(), leaves)]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_equals_dense_attention(num_ranks):
    """With and without documents and padding; grouped-query heads where the method can have them."""
    with Ranks(num_ranks) as ranks:
        for function, kv_heads, balanced in (
            (ring_attention, 4, False),
            (ring_attention, 2, False),
            (functools.partial(ring_attention, balanced=True), 2, True),
            (functools.partial(ring_attention, balanced=True), 4, True),
            (ulysses_attention, 4, False),
        ):
            if function is ulysses_attention and kv_heads % num_ranks:
                continue
            for with_labels in (False, True):
                found = ranks.run(on_a_rank, function, kv_heads, with_labels, balanced)
                expected = dense(*draw_inputs(SHARD * num_ranks, kv_heads, with_labels))
                held = [p for rank in range(num_ranks) for p in positions(num_ranks, rank, balanced)]
                for parts, whole in zip(zip(*found, strict=True), expected, strict=True):
                    torch.testing.assert_close(
                        torch.cat(parts, dim=1), whole[:, held], rtol=1e-12, atol=1e-12
                    )


def bf16_on_a_rank(with_labels):
    """What `on_a_rank` returns, of bf16, of contiguous shards."""
    tensors, dout, labels = draw_inputs(SHARD * dist.get_world_size(), 2, with_labels)
    mine = positions(dist.get_world_size(), dist.get_rank(), False)
    leaves = [x[:, mine].bfloat16().requires_grad_() for x in tensors]
    out = ring_attention(*leaves, dist.group.WORLD, labels=labels)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout[:, mine].bfloat16())]


@pytest.mark.parametrize("with_labels", [False, True])
def test_contiguous_shards_in_bf16_keep_their_dtype(with_labels):
    with Ranks(3) as ranks:
        found = ranks.run(bf16_on_a_rank, with_labels)
    for parts, whole in zip(
        zip(*found, strict=True), dense(*draw_inputs(3 * SHARD, 2, with_labels)), strict=True
    ):
        assert {part.dtype for part in parts} == {torch.bfloat16}
        assert (torch.cat(parts, dim=1).double() - whole).norm() < 0.02 * whole.norm()


def pairs_on_a_rank(balanced):
    """(what `rebalance` makes of a rank's positions, the same back, pairs of queries and keys looked at)."""
    size, rank = dist.get_world_size(), dist.get_rank()
    looked_at = []

    def counting(block, q, k, v):
        queries, keys = q.shape[1], k.shape[1]
        looked_at.append(queries * (queries + 1) // 2 if block.causal else queries * keys)
        return exact_attention_fwd(block, q, k, v)

    held = torch.tensor([positions(size, rank, False)])
    moved = rebalance(held, dist.group.WORLD)
    back = rebalance(moved, dist.group.WORLD, back=True)
    x = torch.zeros(1, SHARD, 2, HEAD_DIM)
    with patch.object(pi_dist.parallel.ring_attention, "exact_attention_fwd", counting):
        ring_attention(x, x, x, dist.group.WORLD, balanced=balanced)
    return moved[0].tolist(), back.equal(held), sum(looked_at)


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 5])
def test_every_rank_has_the_same_work(num_ranks):
    with Ranks(num_ranks) as ranks:
        contiguous, balanced = (ranks.run(pairs_on_a_rank, balanced) for balanced in (False, True))
    assert contiguous == balanced
    moved, back, pairs = zip(*contiguous, strict=True)
    assert list(moved) == [positions(num_ranks, rank, True) for rank in range(num_ranks)] and all(back)
    assert max(pairs) == min(pairs)
    columns = balanced_columns(torch.arange(SHARD * num_ranks)[None], num_ranks)
    assert columns[0].tolist() == [position for piece in moved for position in piece]


def test_blocks_merge_where_one_is_empty():
    tensors, _, labels = draw_inputs(8, 4, True)
    q, k, v = tensors
    whole = exact_attention_fwd(ExactBlock(True, labels, labels, 0.5), q, k, v)
    halves = [x[:, 4:] for x in (q, k, v)]
    near = exact_attention_fwd(ExactBlock(True, labels[:, 4:], labels[:, 4:], 0.5), *halves)
    far = exact_attention_fwd(
        ExactBlock(False, labels[:, 4:], labels[:, :4], 0.5), halves[0], k[:, :4], v[:, :4]
    )
    out, lse = merge(*near, *far)
    assert (far[1] == float("-inf")).any() and (near[1][0, 0] == float("-inf")).all()
    torch.testing.assert_close((out, lse), (whole[0][:, 4:], whole[1][:, 4:]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gpu_kernels_equal_the_formula(dtype, head_dim):
    """Both blocks of a ring of two: the queries' own keys, and other keys, as many and fewer."""
    generator = torch.Generator("cuda").manual_seed(head_dim)
    for heads, kv_heads, queries, keys, causal in ((2, 2, 192, 192, True), (4, 2, 192, 96, False)):
        q, k, v, dout = (
            torch.randn(2, length, h, head_dim, generator=generator, device="cuda").to(dtype)
            for length, h in ((queries, heads), (keys, kv_heads), (keys, kv_heads), (queries, heads))
        )
        block = ExactBlock(causal, None, None, head_dim**-0.5)
        out, lse = exact_attention_fwd(block, q, k, v)
        found = [out, lse, *exact_attention_bwd(block, q, k, v, out, lse, dout)]
        q, k, v = (x.double().requires_grad_() for x in (q, k, v))
        shared = [x.repeat_interleave(heads // kv_heads, dim=2) for x in (k, v)]
        scores = torch.einsum("bihd,bjhd->bhij", q, shared[0]) * block.scale
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
        out = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), shared[1])
        expected = [out, scores.logsumexp(-1).transpose(1, 2)]
        expected += torch.autograd.grad((out * dout.double()).sum(), (q, k, v))
        for a, b in zip(found, expected, strict=True):
            error = (a.double() - b).norm() / b.norm()
            assert error < (1e-2 if dtype != torch.float32 else 1e-5), error.item()


def odd_heads_on_two_ranks():
    x = torch.zeros(1, 4, 1, 4)
    with pytest.raises(ValueError, match=r"num_kv_heads \(1\) % ranks \(2\) == 0 does not hold"):
        ulysses_attention(x, x, x, dist.group.WORLD)


def odd_shards_on_two_ranks():
    x = torch.zeros(1, 3, 1, 4)
    with pytest.raises(ValueError, match=r"tokens of a shard \(3\) % 2 == 0 does not hold"):
        ring_attention(x, x, x, dist.group.WORLD)


def test_what_cannot_be_split_is_refused():
    x = torch.zeros(1, 4, 2, 4)
    with pytest.raises(ValueError, match=r"labels \(1, 3\) == \[B, n\] \(1, 4\) does not hold"):
        ring_attention(x, x, x, None, labels=torch.zeros(1, 3, dtype=torch.int32))
    with Ranks(2) as ranks:
        ranks.run(odd_heads_on_two_ranks)
        ranks.run(odd_shards_on_two_ranks)
