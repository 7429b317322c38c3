"""The oracle: π-attention over a dense T×T mask, in plain PyTorch, straight from eq. (5) and (6).

Slow and obvious; nothing in training calls it. Tests compare every fast path with it, gradients included
(PyTorch's own autograd).
"""

from __future__ import annotations

import torch

from pi_dist.ops.dropout import keep_mask
from pi_dist.ops.pattern import PiPattern
from pi_dist.ops.spec import GATE_EPSILON


def neighbour_masks(
    pattern: PiPattern, stride: int, q_pos: torch.Tensor, k_pos: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Boolean [Tq, Tk] masks (ring, skip) for global positions `q_pos` [Tq] and `k_pos` [Tk]."""
    offset = q_pos[:, None] - k_pos[None, :]  # [Tq, Tk]
    ring = offset.abs() <= pattern.window
    multiple = offset.abs() // stride
    skip = (offset.abs() % stride == 0) & (multiple >= 1) & (multiple <= pattern.num_skips)
    if pattern.causal:
        ring &= offset >= 0
        skip &= offset > 0
    if not pattern.include_self:
        ring &= offset != 0
    return ring, skip & (offset.abs() > pattern.window)


def prior_logits(
    q: torch.Tensor,
    k: torch.Tensor,
    gate: torch.Tensor | None,
    pattern: PiPattern,
    scale: float,
    *,
    epsilon: float = GATE_EPSILON,
    query_start: int = 0,
    key_start: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits of eq. (5) [B, H, Tq, Tk], not clamped; who is a neighbour [1, H, Tq, Tk]).

    q [B, Tq, H, D], k [B, Tk, H, D], gate [B, Tq, H], kept `epsilon` away from 0 and 1.
    """
    q_pos = torch.arange(q.shape[1], device=q.device) + query_start
    k_pos = torch.arange(k.shape[1], device=q.device) + key_start
    masks = [neighbour_masks(pattern, stride, q_pos, k_pos) for stride in pattern.head_strides(q.shape[2])]
    ring = torch.stack([m[0] for m in masks])[None]
    skip = torch.stack([m[1] for m in masks])[None]
    logits = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    if gate is not None:
        alpha = ((1 - 2 * epsilon) * gate + epsilon).transpose(1, 2)[..., None]  # [B, H, Tq, 1]
        logits = logits + torch.where(ring, alpha.log(), (1 - alpha).log())
    return logits, ring | skip


def pi_attention_oracle(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate: torch.Tensor | None,
    pattern: PiPattern,
    *,
    segment_ids: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    logit_cap: float | None = 20.0,
    dropout_p: float = 0.0,
    seed: int | None = None,
    query_start: int = 0,
    key_start: int = 0,
    row_start: int = 0,
) -> torch.Tensor:
    """π-attention of q [B, Tq, H, D] over k, v [B, Tk, H_kv, D] with gate [B, Tq, H]; returns [B, Tq, H, D].

    `segment_ids` and `padding_mask` are [B, T] and need Tq == Tk. Arguments as in `pi_attention`.
    """
    batch, q_len, num_heads, head_dim = q.shape
    k_len, num_kv_heads = k.shape[1], k.shape[2]
    share = num_heads // num_kv_heads
    k = k.repeat_interleave(share, dim=2)  # [B, Tk, H, D]
    v = v.repeat_interleave(share, dim=2)
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    q_pos = torch.arange(q_len, device=q.device) + query_start
    logits, allowed = prior_logits(q, k, gate, pattern, scale, query_start=query_start, key_start=key_start)
    allowed = allowed.expand(batch, -1, -1, -1)
    if segment_ids is not None:
        allowed = allowed & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    if padding_mask is not None:
        allowed = allowed & (padding_mask[:, None, :, None] & padding_mask[:, None, None, :])
    if logit_cap is not None:
        logits = logits.clamp(-logit_cap, logit_cap)
    weights = torch.softmax(logits.masked_fill(~allowed, float("-inf")), dim=-1)
    weights = torch.where(allowed.any(-1, keepdim=True), weights, 0.0)  # [B, H, Tq, Tk]
    if dropout_p > 0:
        kept = torch.stack(
            [
                keep_mask(
                    dropout_p,
                    seed,
                    rows=torch.arange(batch, device=q.device) + row_start,
                    positions=q_pos,
                    heads=torch.arange(num_heads, device=q.device),
                    offsets=q_pos - (key + key_start),
                )
                for key in range(k_len)
            ],
            dim=-1,
        )  # [B, Tq, H, Tk]
        weights = weights * kept.transpose(1, 2) / (1 - dropout_p)
    return torch.einsum("bhij,bjhd->bihd", weights.to(v.dtype), v)
