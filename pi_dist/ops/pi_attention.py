"""The operator for users: validation, autograd, choice of backend."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from pi_dist.ops.pattern import PiPattern
from pi_dist.ops.spec import AttentionSpec, KeyBlock, Run, accumulate_dtype

Pair = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def _resolve(backend: str, q: torch.Tensor) -> str:
    """The backend that "auto" stands for."""
    if backend != "auto":
        return backend
    return "triton" if q.is_cuda and q.dtype != torch.float64 else "reference"


def backend_functions(backend: str, q: torch.Tensor) -> tuple[Any, Any]:
    """(forward, backward) of a backend for queries like `q`.

    Args:
        backend: "triton" (fused kernels), "reference" (shifted slices in plain PyTorch, any device and
        dtype),
            or "auto": triton for bf16, fp16 and fp32 on a GPU, else reference.

    Raises:
        ValueError: no such backend, or it cannot be used here; says why.
    """
    match _resolve(backend, q):
        case "triton":
            from pi_dist.ops.triton_backend import check_usable, pi_attention_bwd, pi_attention_fwd

            check_usable(q)
        case "reference":
            from pi_dist.ops.reference import pi_attention_bwd, pi_attention_fwd
        case _:
            raise ValueError(f"backend ({backend!r}) in ('auto', 'triton', 'reference') does not hold")
    return pi_attention_fwd, pi_attention_bwd


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


def check_labels(labels: torch.Tensor | None, batch: int, seq_len: int) -> None:
    """Raise ValueError unless labels are [B, n], those of the whole sequence, or None."""
    if labels is not None and labels.shape != (batch, seq_len):
        raise ValueError(f"labels {tuple(labels.shape)} == [B, n] ({batch}, {seq_len}) does not hold")


def check_options(
    softmax_scale: float | None, logit_cap: float | None, dropout_p: float, seed: int | None
) -> None:
    """Raise ValueError unless the scalar options make sense."""
    if softmax_scale == 0:
        raise ValueError("softmax_scale (0) != 0 does not hold")
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


def _check_ids(ids: Pair) -> None:
    """Raise ValueError unless segment ids are integers that 64 bits with a sign hold."""
    for x in ids:
        if x.dtype.is_floating_point or x.dtype.is_complex or x.dtype in (torch.bool, torch.uint64):
            raise ValueError(f"segment_ids.dtype ({x.dtype}) is an integer type up to int64 does not hold")


def _check_mask(mask: Pair) -> None:
    """Raise ValueError unless a padding mask is of booleans."""
    for x in mask:
        if x.dtype != torch.bool:
            raise ValueError(f"padding_mask.dtype ({x.dtype}) == bool does not hold")


def token_labels(segment_ids: torch.Tensor | None, padding_mask: torch.Tensor | None) -> torch.Tensor | None:
    """One label a token: its document, or -1 for padding; int32, or int64 for ids that may be hashes.

    Tokens see each other iff their labels agree and are >= 0.
    """
    if segment_ids is None and padding_mask is None:
        return None
    if segment_ids is None:
        labels = torch.zeros_like(padding_mask, dtype=torch.int32)
    else:
        wide = segment_ids.dtype in (torch.int64, torch.uint32)
        labels = segment_ids.to(torch.int64 if wide else torch.int32)
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
        backend: "auto", "triton" or "reference", see `backend_functions`.

    Returns:
        [B, Tq, H, D] in q's dtype.

    Raises:
        ValueError: shapes, dtypes or options that do not fit, or an unknown backend; prints the failing
            equation.
    """
    check_shapes(q, k, v, gate)
    check_options(softmax_scale, logit_cap, dropout_p, seed)
    segments = _pair(segment_ids, "segment_ids", q.shape[:2], k.shape[:2])
    if segments is not None:
        _check_ids(segments)
    padding = _pair(padding_mask, "padding_mask", q.shape[:2], k.shape[:2])
    if padding is not None:
        _check_mask(padding)
    q_labels, k_labels = (
        token_labels(segments and segments[side], None if padding is None else padding[side])
        for side in (0, 1)
    )
    backend_functions(backend, q)  # refuses what cannot be used, before any work
    registered = torch.compiler.is_compiling() or not torch.is_grad_enabled()
    out, _ = (torch.ops.pi_dist.pi_attention_fwd if registered else _PiAttentionFunction.apply)(
        q,
        k,
        v,
        gate,
        q_labels,
        k_labels,
        pattern.window,
        list(pattern.head_strides(q.shape[2])),
        pattern.causal,
        pattern.include_self,
        pattern.num_skips,
        q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale,
        logit_cap,
        dropout_p,
        (seed or 0) if dropout_p > 0 else 0,  # else calls of different steps would not be alike
        query_start,
        key_start,
        row_start if dropout_p > 0 else 0,
        backend,
    )
    return out


@lru_cache(maxsize=1024)
def _spec(
    num_kv_heads, k_len, window, strides, causal, include_self, num_skips, softmax_scale, logit_cap,
    dropout_p, seed, query_start, key_start, row_start,
) -> AttentionSpec:  # fmt: skip
    """The call as the backends want it, from the arguments that a registered operator can have."""
    return AttentionSpec(
        pattern=PiPattern(window, _one_or_all(strides), causal, include_self, num_skips),
        num_kv_heads=num_kv_heads,
        blocks=(KeyBlock(tuple(range(num_kv_heads)), Run(key_start, key_start + k_len)),),
        softmax_scale=softmax_scale,
        logit_cap=logit_cap,
        dropout_p=dropout_p,
        seed=seed,
        query_start=query_start,
        row_start=row_start,
    )


def _spec_of(k: torch.Tensor, window: int, strides: list[int], *numbers: Any) -> AttentionSpec:
    return _spec(k.shape[2], k.shape[1], window, tuple(strides), *numbers)


def _one_or_all(strides: tuple[int, ...]) -> int | tuple[int, ...]:
    return strides[0] if len(set(strides)) == 1 else strides


# One registered operator for all backends: torch.compile and activation checkpointing see it as one node.
_OPTIONS = (
    "int window, int[] strides, bool causal, bool include_self, int num_skips, float softmax_scale, "
    "float? logit_cap, float dropout_p, SymInt seed, SymInt query_start, SymInt key_start, SymInt row_start, "
    "str backend"
)
_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor? gate, Tensor? q_labels, Tensor? k_labels"
_library = torch.library.Library("pi_dist", "DEF")
_RESULTS = "(Tensor dq, Tensor dk, Tensor dv, Tensor dgate)"
for _schema in (
    f"pi_attention_fwd({_TENSORS}, {_OPTIONS}) -> (Tensor out, Tensor lse)",
    f"pi_attention_bwd({_TENSORS}, Tensor out, Tensor lse, Tensor dout, {_OPTIONS}) -> {_RESULTS}",
):
    _library.define(_schema, tags=torch.Tag.pt2_compliant_tag)


def _forward(q, k, v, gate, q_labels, k_labels, *options):
    *numbers, backend = options
    forward, _ = backend_functions(backend, q)
    return forward(_spec_of(k, *numbers), q, [k], [v], gate, q_labels, [k_labels])


def _backward(q, k, v, gate, q_labels, k_labels, out, lse, dout, *options):
    *numbers, backend = options
    _, backward = backend_functions(backend, q)
    spec = _spec_of(k, *numbers)
    dq, dk, dv, dgate = backward(spec, q, [k], [v], gate, q_labels, [k_labels], out, lse, dout)
    dgate = lse.new_empty(0) if gate is None else dgate.to(gate.dtype)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dgate


def _forward_fake(q, k, v, gate, q_labels, k_labels, *options):
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=accumulate_dtype(q.dtype)).transpose(1, 2)
    if _resolve(options[-1], q) != "triton":
        lse = torch.empty_like(lse, memory_format=torch.contiguous_format)
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


def _backward_fake(q, k, v, gate, q_labels, k_labels, out, lse, dout, *options):
    dense = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    if gate is None:
        return *dense, lse.new_empty(0)
    layout = torch.preserve_format if _resolve(options[-1], q) == "triton" else torch.contiguous_format
    return *dense, torch.empty_like(gate, memory_format=layout)


def _save(ctx, inputs, output):
    tensors, ctx.options = inputs[:6], inputs[6:]
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, dout, _):
    saved = ctx.saved_tensors  # once: under activation checkpointing a second look is an error
    dq, dk, dv, dgate = torch.ops.pi_dist.pi_attention_bwd(*saved, dout, *ctx.options)
    dgate = None if saved[3] is None else dgate
    return dq, dk, dv, dgate, *[None] * (2 + len(ctx.options))


for _name, _function, _fake in (
    ("pi_attention_fwd", _forward, _forward_fake),
    ("pi_attention_bwd", _backward, _backward_fake),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pi_dist::{_name}", _fake, lib=_library)
torch.library.register_autograd("pi_dist::pi_attention_fwd", _gradients, setup_context=_save, lib=_library)


class _PiAttentionFunction(torch.autograd.Function):
    """The operator outside of torch.compile: the autograd of a registered one takes 100 µs more a call."""

    @staticmethod
    def forward(ctx, *inputs):
        output = torch.ops.pi_dist.pi_attention_fwd(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, _):
        return _gradients(ctx, dout, None)
