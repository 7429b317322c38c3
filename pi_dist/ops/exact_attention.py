"""Exact softmax attention of a block of queries over a block of keys, by kernels that others keep.

Results come with their lse, so that blocks merge, and the backward takes the lse of all blocks: what ring
attention is made of. On GPUs PyTorch's flash attention where no documents need telling apart, else this
project's own kernels with a window as long as the sequence; on CPUs PyTorch's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pi_dist.ops.pattern import PiPattern
from pi_dist.ops.spec import AttentionSpec, KeyBlock, Run

_ATEN = torch.ops.aten


@dataclass(frozen=True)
class ExactBlock:
    """Where a block of queries and one of keys lie: keys at the queries' own positions, or all before them.

    q_labels [B, Tq], k_labels [B, Tk]: documents, negative for padding; None: one document. scale: of logits.
    """

    causal: bool
    q_labels: torch.Tensor | None
    k_labels: torch.Tensor | None
    scale: float


def exact_attention_fwd(
    block: ExactBlock, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, Tq, H, D], k and v [B, Tk, H_kv, D] to (out [B, Tq, H, D], lse [B, Tq, H]).

    lse is fp32 (fp64 for fp64 inputs), -inf, and out 0, where a query has no key.
    """
    if not q.is_cuda:
        keys, values = (_as_many_heads(x, q) for x in (k, v))
        mask, empty = _mask(block, q, k)
        out, lse = _ATEN._scaled_dot_product_flash_attention_for_cpu(
            q.transpose(1, 2), keys, values, attn_mask=mask, scale=block.scale
        )
        lse = lse.transpose(1, 2).masked_fill(empty[:, :, None], float("-inf"))
        return out.transpose(1, 2).masked_fill(empty[:, :, None, None], 0.0), lse
    if _kept_library(block, q):
        tensors = q.transpose(1, 2), _as_many_heads(k, q), _as_many_heads(v, q)
        if _cudnn(q):
            out, lse, *_ = _ATEN._scaled_dot_product_cudnn_attention(
                *tensors, None, True, 0.0, block.causal, scale=block.scale
            )
            lse = lse.view(out.shape[:3])
        else:
            out, lse, *_ = _ATEN._scaled_dot_product_flash_attention(
                *tensors, 0.0, block.causal, scale=block.scale
            )
        return out.transpose(1, 2), lse.transpose(1, 2)
    from pi_dist.ops.triton_backend import pi_attention_fwd

    return pi_attention_fwd(_spec(block, q, k), q, [k], [v], None, block.q_labels, [block.k_labels])


def exact_attention_bwd(
    block: ExactBlock,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv) from this block; out and lse are those of all blocks of keys."""
    if not q.is_cuda:
        keys, values = (_as_many_heads(x, q) for x in (k, v))
        mask, _ = _mask(block, q, k)
        nobody = lse == float("-inf")  # exp(x - inf) is 0
        gradients = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
            dout.transpose(1, 2), q.transpose(1, 2), keys, values, out.transpose(1, 2),
            lse.masked_fill(nobody, float("inf")).transpose(1, 2), 0.0, False, attn_mask=mask,
            scale=block.scale,
        )  # fmt: skip
    elif _kept_library(block, q):
        dout_h, q_h, out_h, lse_h = (x.transpose(1, 2) for x in (dout, q, out, lse))
        tensors = dout_h, q_h, _as_many_heads(k, q), _as_many_heads(v, q), out_h
        lse_h, sizes = lse_h.contiguous(), (q.shape[1], k.shape[1])
        if _cudnn(q):
            empty = torch.zeros((), dtype=torch.int64, device=q.device)  # of a generator that draws nothing
            gradients = _ATEN._scaled_dot_product_cudnn_attention_backward(
                *tensors, lse_h[..., None], empty, empty, None, None, None, *sizes, 0.0, block.causal,
                scale=block.scale,
            )  # fmt: skip
        else:
            empty = torch.zeros(2, dtype=torch.int64)
            gradients = _ATEN._scaled_dot_product_flash_attention_backward(
                *tensors, lse_h, None, None, *sizes, 0.0, block.causal, empty, empty, scale=block.scale
            )
    else:
        from pi_dist.ops.triton_backend import pi_attention_bwd

        spec = _spec(block, q, k)
        dq, dk, dv, _ = pi_attention_bwd(
            spec, q, [k], [v], None, block.q_labels, [block.k_labels], out, lse, dout
        )
        return dq, dk, dv
    dq, dk, dv = (x.transpose(1, 2) for x in gradients)
    share = q.shape[2] // k.shape[2]
    if share > 1:
        dk, dv = (x.unflatten(2, (-1, share)).sum(3) for x in (dk, dv))
    return dq, dk, dv


def merge(
    out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) over the keys of both, in lse's dtype."""
    total = torch.logaddexp(lse, other_lse)
    known = total.masked_fill(total == float("-inf"), 0.0)
    parts = ((out, lse), (other, other_lse))
    return sum(x.to(total.dtype) * torch.exp(part - known)[..., None] for x, part in parts), total


def _kept_library(block: ExactBlock, q: torch.Tensor) -> bool:
    """Whether PyTorch has kernels for it."""
    return block.q_labels is None and q.dtype in (torch.float16, torch.bfloat16)


def _cudnn(q: torch.Tensor) -> bool:
    """Whether cuDNN's kernels are for such heads, and faster than flash attention on this GPU."""
    fits = q.shape[3] % 8 == 0 and q.shape[3] <= 128
    return (
        fits and torch.backends.cudnn.is_available() and torch.cuda.get_device_capability(q.device) >= (9, 0)
    )


def _as_many_heads(k: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """[B, Tk, H_kv, D] to [B, H, Tk, D], each key/value head once for every query head."""
    return k.repeat_interleave(q.shape[2] // k.shape[2], dim=2).transpose(1, 2)


def _mask(block: ExactBlock, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(what is added to logits, [B or 1, 1, Tq, Tk]; queries without a key [B or 1, Tq])."""
    seen = torch.ones(1, q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
    if block.causal:
        seen = seen.tril()
    if block.q_labels is not None:
        same = block.q_labels[:, :, None] == block.k_labels[:, None, :]
        seen = seen & same & (block.q_labels >= 0)[:, :, None]
    added = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill(~seen, float("-inf"))
    return added[:, None], ~seen.any(dim=2)


def _spec(block: ExactBlock, q: torch.Tensor, k: torch.Tensor) -> AttentionSpec:
    """As our own operator would have it: a window over everything, without clamp and gate."""
    start = 0 if block.causal else k.shape[1]
    pattern = PiPattern(start + q.shape[1], 1, num_skips=0)
    keys = KeyBlock(tuple(range(k.shape[2])), Run(0, k.shape[1]))
    return AttentionSpec(pattern, k.shape[2], (keys,), block.scale, None, 0.0, 0, start, 0)
