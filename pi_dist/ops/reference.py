"""π-attention by shifted slices, forward and backward: the CPU default, and the reference of every kernel.

A neighbour at offset o is the key axis shifted by o, so the whole operator is a loop over the few offsets of
the pattern, with O(T · offsets) work and no T×T mask. Runs on any device and floating dtype; sums are in fp32
(fp64 for fp64 inputs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from pi_dist.ops.dropout import keep_bits, position_hash
from pi_dist.ops.spec import (
    GATE_EPSILON,
    AttentionSpec,
    accumulate_dtype,
    nothing_arrives,
    nothing_to_send,
)


class _Piece(NamedTuple):
    """Queries [start, stop) whose neighbours at one offset are rows [key, key + stop - start) of a block."""

    start: int
    stop: int
    block: int
    key: int


class _Unit(NamedTuple):
    """Query heads with one stride: `kv` and `slots` index [H_kv, G], `heads` are [h, g].

    `columns` are the unit's key/value heads in the tensor of each block, None where it holds none of them.
    """

    kv: torch.Tensor | slice
    slots: torch.Tensor | slice
    columns: tuple[torch.Tensor | slice | None, ...]
    heads: torch.Tensor
    stride: int


def _units(spec: AttentionSpec, num_heads: int, device: torch.device) -> Iterator[_Unit]:
    """The largest blocks of heads that one loop over offsets serves; one stride gives one unit, of views."""
    num_kv_heads = spec.num_kv_heads
    share = num_heads // num_kv_heads

    def index(wanted: tuple[int, ...], among: tuple[int, ...]) -> torch.Tensor | slice | None:
        if wanted == among:
            return slice(None)
        if not set(wanted) <= set(among):
            return None
        return torch.tensor([among.index(head) for head in wanted], device=device)

    for group in spec.pattern.head_groups(num_heads, num_kv_heads):
        kv = torch.tensor(group.kv_heads, device=device)
        for stride in dict.fromkeys(group.strides):
            slots = tuple(s for s, value in enumerate(group.strides) if value == stride)
            yield _Unit(
                index(group.kv_heads, tuple(range(num_kv_heads))),
                index(slots, tuple(range(share))),
                tuple(index(group.kv_heads, block.heads) for block in spec.blocks),
                kv[:, None] * share + torch.tensor(slots, device=device)[None, :],
                stride,
            )


def _pieces(spec: AttentionSpec, unit: _Unit, q_len: int, offset: int) -> list[_Piece]:
    """Where the neighbour at `offset` of every query lies; queries without one appear in no piece."""
    pieces = []
    for index, block in enumerate(spec.blocks):
        low = max(block.run.start, spec.query_start - offset)
        high = min(block.run.stop, spec.query_start + q_len - offset)
        if low < high and unit.columns[index] is not None:
            shift = offset - spec.query_start
            pieces.append(_Piece(low + shift, high + shift, index, low - block.run.start))
    return pieces


class _Scores(NamedTuple):
    logits: torch.Tensor  # [B, T, h, g, O] clamped, -inf where there is no neighbour
    unclamped: torch.Tensor | None  # [B, T, h, g, O] True where the clamp passes the gradient
    keep: torch.Tensor | None  # [B, T, h, g, O] dropout's keep bits
    pieces: list[list[_Piece]]  # of each offset
    num_ring: int  # offsets [0, num_ring) are the ring's


def _scores(spec, unit, q, keys, gate, q_labels, k_labels) -> _Scores:
    """Logits of one unit: q [B, T, h, g, D], gate [B, T, h, g], labels [B, T]; of each block k [B, R, h, D]
    and labels [B, R].
    """
    ring = spec.pattern.ring_offsets()
    offsets = (*ring, *spec.pattern.skip_offsets(unit.stride))
    batch, q_len = q.shape[:2]
    logits = q.new_full((*q.shape[:4], len(offsets)), float("-inf"))
    unclamped = None if spec.logit_cap is None else torch.zeros_like(logits, dtype=torch.bool)
    keep = hashed = None
    if spec.dropout_p > 0:
        keep = torch.zeros_like(logits, dtype=torch.bool)
        hashed = position_hash(
            spec.seed,
            torch.arange(batch, device=q.device) + spec.row_start,
            torch.arange(q_len, device=q.device) + spec.query_start,
            unit.heads.flatten(),
        ).unflatten(2, unit.heads.shape)
    if gate is not None:
        alpha = (1 - 2 * GATE_EPSILON) * gate + GATE_EPSILON
        log_ring, log_skip = alpha.log(), (1 - alpha).log()
    pieces = []
    for index, offset in enumerate(offsets):
        pieces.append(_pieces(spec, unit, q_len, offset))
        for start, stop, block, key in pieces[-1]:
            rows = slice(key, key + stop - start)
            scores = (q[:, start:stop] * keys[block][:, rows, :, None]).sum(
                -1
            ) * spec.softmax_scale  # [B, t, h, g]
            if gate is not None:
                scores = scores + (log_ring if index < len(ring) else log_skip)[:, start:stop]
            if spec.logit_cap is not None:
                unclamped[:, start:stop, ..., index] = scores.abs() <= spec.logit_cap
                scores = scores.clamp(-spec.logit_cap, spec.logit_cap)
            if q_labels is not None:
                same = (q_labels[:, start:stop] == k_labels[block][:, rows]) & (q_labels[:, start:stop] >= 0)
                scores = scores.masked_fill(~same[:, :, None, None], float("-inf"))
            logits[:, start:stop, ..., index] = scores
            if keep is not None:
                keep[:, start:stop, ..., index] = keep_bits(hashed[:, start:stop], offset, spec.dropout_p)
    return _Scores(logits, unclamped, keep, pieces, len(ring))


def _select(
    tensor: torch.Tensor | None, unit: _Unit, num_kv_heads: int, dtype: torch.dtype
) -> torch.Tensor | None:
    """The unit's heads of a [B, T, H, ...] tensor, as [B, T, h, g, ...] in the accumulation dtype."""
    if tensor is None:
        return None
    split = tensor.unflatten(2, (num_kv_heads, -1))
    return split[:, :, unit.kv][:, :, :, unit.slots].to(dtype)


def _of_blocks(tensors: list[torch.Tensor], unit: _Unit, dtype: torch.dtype) -> list[torch.Tensor | None]:
    """The unit's heads of the keys or values of each block, [B, R, h, D] in the accumulation dtype."""
    return [
        None if columns is None else tensor[:, :, columns].to(dtype)
        for tensor, columns in zip(tensors, unit.columns, strict=True)
    ]


def _store(target: torch.Tensor, unit: _Unit, num_kv_heads: int, value: torch.Tensor) -> None:
    """Write [B, T, h, g, ...] to the unit's heads of a contiguous [B, T, H, ...] tensor."""
    split = target.unflatten(2, (num_kv_heads, -1))
    if isinstance(unit.kv, slice):
        split[:, :, :, unit.slots] = value.to(target.dtype)
    elif isinstance(unit.slots, slice):
        split[:, :, unit.kv] = value.to(target.dtype)
    else:
        split[:, :, unit.kv[:, None], unit.slots[None, :]] = value.to(target.dtype)


def pi_attention_fwd(
    spec: AttentionSpec,
    q: torch.Tensor,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    gate: torch.Tensor | None,
    q_labels: torch.Tensor | None,
    k_labels: list[torch.Tensor | None],
    arrive: Callable[[], tuple[list[torch.Tensor], list[torch.Tensor]]] = nothing_arrives,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward: (out [B, T, H, D] in q's dtype, lse [B, T, H] in the accumulation dtype).

    Where a query has no neighbour, lse is -inf.

    Args:
        q: [B, T, H, D].
        keys, values: those of the first of `spec.blocks`, [B, R, heads, D], in a list.
        gate: [B, T, H] or None.
        q_labels: [B, T] document of each query, negative for padding; None: one document, no padding.
        k_labels: one [B, R] per block.
        arrive: waits for keys and values of the other blocks; called when they are needed.
    """
    dtype, num_heads = accumulate_dtype(q.dtype), q.shape[2]
    num_kv_heads = spec.num_kv_heads
    keys, values = ([*own, *others] for own, others in zip((keys, values), arrive(), strict=True))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=dtype, device=q.device)
    for unit in _units(spec, num_heads, q.device):
        k, v = _of_blocks(keys, unit, dtype), _of_blocks(values, unit, dtype)
        unit_q = _select(q, unit, num_kv_heads, dtype)
        unit_gate = _select(gate, unit, num_kv_heads, dtype)
        scores = _scores(spec, unit, unit_q, k, unit_gate, q_labels, k_labels)
        unit_lse = torch.logsumexp(scores.logits, dim=-1)  # [B, T, h, g]
        weights = _drop(scores, _softmax(scores, unit_lse), spec.dropout_p)
        unit_out = torch.zeros_like(unit_q)
        for index, pieces in enumerate(scores.pieces):
            for start, stop, block, key in pieces:
                unit_out[:, start:stop] += (
                    weights[:, start:stop, ..., index, None] * v[block][:, key : key + stop - start, :, None]
                )
        _store(out, unit, num_kv_heads, unit_out)
        _store(lse, unit, num_kv_heads, unit_lse)
    return out, lse


def _softmax(scores: _Scores, lse: torch.Tensor) -> torch.Tensor:
    """Probabilities [B, T, h, g, O]; rows without neighbours are 0."""
    weights = torch.exp(scores.logits - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    # the rounding of lse is an error of up to 20 units in the last place, common to a row: divide it out
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


def _drop(scores: _Scores, softmax: torch.Tensor, dropout_p: float) -> torch.Tensor:
    """Probabilities after dropout."""
    return softmax if scores.keep is None else softmax * scores.keep / (1 - dropout_p)


def pi_attention_bwd(
    spec: AttentionSpec,
    q: torch.Tensor,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    gate: torch.Tensor | None,
    q_labels: torch.Tensor | None,
    k_labels: list[torch.Tensor | None],
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    send_back: Callable[[list[torch.Tensor], list[torch.Tensor]], None] = nothing_to_send,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Backward: (dq, dk, dv, dgate) in the accumulation dtype, dk and dv those of the first block.

    keys, values: one per `spec.blocks`. send_back takes dkeys and dvalues of the other blocks, once they are
    whole.
    `out` is not needed here: the sum below errs less than Σ out·dout would. With P the probabilities after
    dropout, `dl = P·(dout·v) - softmax·Σ P·(dout·v)`, which is zero where the
    clamp is active; the gate takes `(1-2ε)·[Σ_ring dl / α - Σ_skip dl / (1-α)]`, α squeezed.
    """
    dtype, num_heads = accumulate_dtype(q.dtype), q.shape[2]
    num_kv_heads = spec.num_kv_heads
    dq = torch.empty(q.shape, dtype=dtype, device=q.device)
    dgate = None if gate is None else torch.empty(gate.shape, dtype=dtype, device=q.device)
    dkeys = [torch.zeros(k.shape, dtype=dtype, device=q.device) for k in keys]
    dvalues = [torch.zeros(v.shape, dtype=dtype, device=q.device) for v in values]
    for unit in _units(spec, num_heads, q.device):
        k, v = _of_blocks(keys, unit, dtype), _of_blocks(values, unit, dtype)
        unit_q, unit_dout = (_select(x, unit, num_kv_heads, dtype) for x in (q, dout))
        unit_gate, unit_lse = (_select(x, unit, num_kv_heads, dtype) for x in (gate, lse))
        scores = _scores(spec, unit, unit_q, k, unit_gate, q_labels, k_labels)
        softmax = _softmax(scores, unit_lse)
        weights = _drop(scores, softmax, spec.dropout_p)
        dlogits = torch.zeros_like(scores.logits)  # first dout·v, then the gradient of the logits
        for index, pieces in enumerate(scores.pieces):
            for start, stop, block, key in pieces:
                rows = slice(key, key + stop - start)
                dout_rows = unit_dout[:, start:stop]
                dlogits[:, start:stop, ..., index] = (dout_rows * v[block][:, rows, :, None]).sum(-1)
                dvalues[block][:, rows, unit.columns[block]] += (
                    weights[:, start:stop, ..., index, None] * dout_rows
                ).sum(3)
        dlogits = weights * dlogits
        dlogits -= softmax * dlogits.sum(-1, keepdim=True)
        if scores.unclamped is not None:
            dlogits = dlogits * scores.unclamped
        unit_dq = torch.zeros_like(unit_q)
        scaled = dlogits * spec.softmax_scale
        for index, pieces in enumerate(scores.pieces):
            for start, stop, block, key in pieces:
                rows = slice(key, key + stop - start)
                weight = scaled[:, start:stop, ..., index, None]  # [B, t, h, g, 1]
                unit_dq[:, start:stop] += weight * k[block][:, rows, :, None]
                dkeys[block][:, rows, unit.columns[block]] += (weight * unit_q[:, start:stop]).sum(3)
        _store(dq, unit, num_kv_heads, unit_dq)
        if gate is not None:
            alpha = (1 - 2 * GATE_EPSILON) * unit_gate + GATE_EPSILON
            ring, skip = dlogits[..., : scores.num_ring].sum(-1), dlogits[..., scores.num_ring :].sum(-1)
            _store(dgate, unit, num_kv_heads, (1 - 2 * GATE_EPSILON) * (ring / alpha - skip / (1 - alpha)))
    send_back(dkeys[1:], dvalues[1:])
    return dq, dkeys[0], dvalues[0], dgate
