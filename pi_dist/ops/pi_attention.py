"""The operator for users: validation, autograd, choice of backend."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from pi_dist.ops.pattern import HeadGroup, PiPattern
from pi_dist.ops.spec import AttentionSpec, KeyGroup, Run

Pair = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def backend_functions(backend: str) -> tuple[Any, Any]:
    """(forward, backward) of a backend; "auto" is the fastest that there is for the tensors' device.

    Raises:
        ValueError: no such backend.
    """
    match backend:
        case "auto" | "reference":
            from pi_dist.ops.reference import pi_attention_bwd, pi_attention_fwd

            return pi_attention_fwd, pi_attention_bwd
        case _:
            raise ValueError(f"backend ({backend!r}) in ('auto', 'reference') does not hold")


def check_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: torch.Tensor | None) -> None:
    """Raise ValueError unless q [B, Tq, H, D], k and v [B, Tk, H_kv, D] and gate [B, Tq, H] fit together."""
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(
            f"q.dim() ({q.dim()}) == k.dim() ({k.dim()}) == 4 does not hold; the layout is [B, T, H, D]"
        )
    if k.shape != v.shape:
        raise ValueError(f"k.shape {tuple(k.shape)} == v.shape {tuple(v.shape)} does not hold")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"batch and head_dim of q {tuple(q.shape)} == those of k {tuple(k.shape)} does not hold"
        )
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"num_heads ({q.shape[2]}) % num_kv_heads ({k.shape[2]}) == 0 does not hold")
    if not (q.dtype == k.dtype == v.dtype) or not q.dtype.is_floating_point:
        raise ValueError(
            f"dtypes of q ({q.dtype}), k ({k.dtype}), v ({v.dtype}) equal and floating does not hold"
        )
    if gate is not None and gate.shape != q.shape[:3]:
        raise ValueError(f"gate.shape {tuple(gate.shape)} == q.shape[:3] {tuple(q.shape[:3])} does not hold")
    if gate is not None and gate.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"gate.dtype ({gate.dtype}) in (float32, float64) does not hold; bf16 rounds α to 1")


def check_options(
    softmax_scale: float | None, logit_cap: float | None, dropout_p: float, seed: int | None
) -> None:
    """Raise ValueError unless the scalar options make sense."""
    if logit_cap is not None and not logit_cap > 0:
        raise ValueError(f"logit_cap ({logit_cap}) > 0 does not hold")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"0 <= dropout_p ({dropout_p}) < 1 does not hold")
    if dropout_p > 0 and seed is None:
        raise ValueError("dropout_p > 0 needs a seed, derived from run seed, step, micro-step and layer")


def _pair(value: Pair | None, name: str, q_shape: torch.Size, k_shape: torch.Size) -> Pair | None:
    """`value` as ([B, Tq], [B, Tk]); one tensor serves both where the lengths agree."""
    if value is None:
        return None
    query, key = value if isinstance(value, tuple) else (value, value)
    for tensor, shape, axis in ((query, q_shape, "q"), (key, k_shape, "k")):
        if tensor.shape != shape:
            raise ValueError(f"{name} {tuple(tensor.shape)} == [B, T] of {axis} {tuple(shape)} does not hold")
    return query, key


def token_labels(segment_ids: torch.Tensor | None, padding_mask: torch.Tensor | None) -> torch.Tensor | None:
    """One int32 label a token: its document, or -1 for padding.

    Tokens see each other iff their labels agree and are >= 0.
    """
    if segment_ids is None and padding_mask is None:
        return None
    labels = (
        torch.zeros_like(padding_mask, dtype=torch.int32)
        if segment_ids is None
        else segment_ids.to(torch.int32)
    )
    return labels if padding_mask is None else labels.masked_fill(~padding_mask, -1)


def pi_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate: torch.Tensor | None,
    pattern: PiPattern,
    *,
    segment_ids: Pair | None = None,
    padding_mask: Pair | None = None,
    softmax_scale: float | None = None,
    logit_cap: float | None = 20.0,
    dropout_p: float = 0.0,
    seed: int | None = None,
    query_start: int = 0,
    key_start: int = 0,
    row_start: int = 0,
    backend: str = "auto",
) -> torch.Tensor:
    """π-attention, one softmax over ring and skip neighbours (arXiv 2511.10696, eq. 5 and 6), differentiable.

    `l_ij = clamp(q_i·k_j·softmax_scale + log w_ij, -logit_cap, logit_cap)` with w = α on ring and 1-α on skip
    targets, α = (1-2ε)·gate + ε, ε = 1e-4; `out_i = Σ_j softmax_j(l_ij)·v_j`. A query without neighbours gets
    exactly 0.

    Args:
        q: [B, Tq, H, D]. k, v: [B, Tk, H_kv, D], H_kv divides H.
        gate: [B, Tq, H], fp32 (or fp64), after the sigmoid; None adds no prior.
        segment_ids: [B, T] integers, tokens see only their own document; negative: padding. A pair
            ([B, Tq], [B, Tk]) where the lengths differ.
        padding_mask: [B, T] booleans, True for real tokens; or a pair.
        softmax_scale: default D^-0.5.
        logit_cap: L_c; None switches the clamp off. Its gradient passes inside and at the edges.
        dropout_p: dropout on the probabilities, keyed by (seed, row, global position, head, neighbour).
        seed: derived from run seed, step, micro-step and layer; needed if dropout_p > 0.
        query_start, key_start: global positions of the first query and key; row_start: global number of
            batch row 0.
        backend: "auto" or "reference".

    Returns:
        [B, Tq, H, D] in q's dtype.

    Raises:
        ValueError: shapes, dtypes or options that do not fit, or an unknown backend; prints the failing
            equation.
    """
    check_shapes(q, k, v, gate)
    check_options(softmax_scale, logit_cap, dropout_p, seed)
    segments = _pair(segment_ids, "segment_ids", q.shape[:2], k.shape[:2])
    padding = _pair(padding_mask, "padding_mask", q.shape[:2], k.shape[:2])
    q_labels, k_labels = (
        token_labels(segments and segments[side], None if padding is None else padding[side])
        for side in (0, 1)
    )
    run = Run(key_start, key_start + k.shape[1])
    spec = AttentionSpec(
        pattern=pattern,
        groups=tuple(KeyGroup(heads, (run,)) for heads in pattern.head_groups(q.shape[2], k.shape[2])),
        softmax_scale=q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale,
        logit_cap=logit_cap,
        dropout_p=dropout_p,
        seed=seed or 0,
        query_start=query_start,
        row_start=row_start,
    )
    return _PiAttentionFunction.apply(q, k, v, gate, q_labels, k_labels, spec, backend_functions(backend))


def split_heads(groups: tuple[HeadGroup, ...], tensor: torch.Tensor) -> list[torch.Tensor]:
    """A [B, R, H_kv, D] tensor as one tensor per head group; the tensor itself where there is one group."""
    if len(groups) == 1:
        return [tensor]
    return [tensor[:, :, list(group.kv_heads)] for group in groups]


def merge_heads(groups: tuple[HeadGroup, ...], tensors: list[torch.Tensor]) -> torch.Tensor:
    """The inverse of `split_heads`."""
    if len(tensors) == 1:
        return tensors[0]
    order = [head for group in groups for head in group.kv_heads]
    merged = tensors[0].new_empty((*tensors[0].shape[:2], len(order), tensors[0].shape[3]))
    merged[:, :, order] = torch.cat(tensors, dim=2)
    return merged


class _PiAttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, gate, q_labels, k_labels, spec, functions):
        forward, ctx.backward_function = functions
        keys, values = split_heads(spec.head_groups, k), split_heads(spec.head_groups, v)
        out, lse = forward(spec, q, keys, values, gate, q_labels, [k_labels] * len(keys))
        ctx.save_for_backward(q, k, v, gate, q_labels, k_labels, lse)
        ctx.spec = spec
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, gate, q_labels, k_labels, lse = ctx.saved_tensors
        spec, groups = ctx.spec, ctx.spec.head_groups
        keys, values = split_heads(groups, k), split_heads(groups, v)
        dq, dkeys, dvalues, dgate = ctx.backward_function(
            spec, q, keys, values, gate, q_labels, [k_labels] * len(keys), lse, dout
        )
        dk, dv = merge_heads(groups, dkeys).to(k.dtype), merge_heads(groups, dvalues).to(v.dtype)
        dgate = None if dgate is None else dgate.to(gate.dtype)
        return dq.to(q.dtype), dk, dv, dgate, None, None, None, None
