"""π-attention by shifted slices, forward and backward: the CPU default, and the reference of every kernel.

A neighbour at offset o is the key axis shifted by o, so the whole operator is a loop over the few offsets of
the pattern, with O(T · offsets) work and no T×T mask. Runs on any device and floating dtype; sums are in fp32
(fp64 for fp64 inputs).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from pi_dist.ops.dropout import keep_bits, position_hash
from pi_dist.ops.spec import GATE_EPSILON, AttentionSpec, KeyGroup


class _Piece(NamedTuple):
    """Queries [start, stop) whose neighbours at one offset are key rows [key, key + stop - start)."""

    start: int
    stop: int
    key: int


class _Unit(NamedTuple):
    """Query heads with one stride in one key group: `kv` and `slots` index [H_kv, G], `heads` are [h, g]."""

    group: int
    kv: torch.Tensor | slice
    slots: torch.Tensor | slice
    heads: torch.Tensor
    stride: int


def _units(spec: AttentionSpec, num_heads: int, num_kv_heads: int, device: torch.device) -> Iterator[_Unit]:
    """The largest blocks of heads that one loop over offsets serves; one stride gives one unit, of views."""
    share = num_heads // num_kv_heads
    for index, group in enumerate(spec.groups):
        kv = torch.tensor(group.heads.kv_heads, device=device)
        for stride in dict.fromkeys(group.heads.strides):
            slots = torch.tensor(
                [s for s, value in enumerate(group.heads.strides) if value == stride], device=device
            )
            yield _Unit(
                index,
                slice(None) if len(kv) == num_kv_heads else kv,
                slice(None) if len(slots) == share else slots,
                kv[:, None] * share + slots[None, :],
                stride,
            )


def _pieces(group: KeyGroup, query_start: int, q_len: int, offset: int) -> list[_Piece]:
    """Where the neighbour at `offset` of every query lies; queries without one appear in no piece."""
    pieces, row = [], 0
    for run in group.runs:
        low = max(run.start, query_start - offset)
        high = min(run.stop, query_start + q_len - offset)
        if low < high:
            pieces.append(
                _Piece(low + offset - query_start, high + offset - query_start, row + low - run.start)
            )
        row += run.stop - run.start
    return pieces


class _Scores(NamedTuple):
    logits: torch.Tensor  # [B, T, h, g, O] clamped, -inf where there is no neighbour
    unclamped: torch.Tensor | None  # [B, T, h, g, O] True where the clamp passes the gradient
    keep: torch.Tensor | None  # [B, T, h, g, O] dropout's keep bits
    pieces: list[list[_Piece]]  # of each offset
    num_ring: int  # offsets [0, num_ring) are the ring's


def _scores(spec, unit, q, k, gate, q_labels, k_labels) -> _Scores:
    """Logits of one unit: q [B, T, h, g, D], k [B, R, h, D], gate [B, T, h, g], labels [B, T] and [B, R]."""
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
        pieces.append(_pieces(spec.groups[unit.group], spec.query_start, q_len, offset))
        for start, stop, key in pieces[-1]:
            rows = slice(key, key + stop - start)
            scores = (q[:, start:stop] * k[:, rows, :, None]).sum(-1) * spec.softmax_scale  # [B, t, h, g]
            if gate is not None:
                scores = scores + (log_ring if index < len(ring) else log_skip)[:, start:stop]
            if spec.logit_cap is not None:
                unclamped[:, start:stop, ..., index] = scores.abs() <= spec.logit_cap
                scores = scores.clamp(-spec.logit_cap, spec.logit_cap)
            if q_labels is not None:
                same = (q_labels[:, start:stop] == k_labels[:, rows]) & (q_labels[:, start:stop] >= 0)
                scores = scores.masked_fill(~same[:, :, None, None], float("-inf"))
            logits[:, start:stop, ..., index] = scores
            if keep is not None:
                keep[:, start:stop, ..., index] = keep_bits(hashed[:, start:stop], offset, spec.dropout_p)
    return _Scores(logits, unclamped, keep, pieces, len(ring))


def _accumulate_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _select(
    tensor: torch.Tensor | None, unit: _Unit, num_kv_heads: int, dtype: torch.dtype
) -> torch.Tensor | None:
    """The unit's heads of a [B, T, H, ...] tensor, as [B, T, h, g, ...] in the accumulation dtype."""
    if tensor is None:
        return None
    split = tensor.unflatten(2, (num_kv_heads, -1))
    return split[:, :, unit.kv][:, :, :, unit.slots].to(dtype)


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward: (out [B, T, H, D] in q's dtype, lse [B, T, H] in the accumulation dtype).

    Where a query has no neighbour, lse is -inf.

    Args:
        q: [B, T, H, D].
        keys, values: one [B, R_g, H_g, D] per `spec.groups`, its rows those of the group's runs in order.
        gate: [B, T, H] or None.
        q_labels: [B, T] document of each query, negative for padding; None: one document, no padding.
        k_labels: one [B, R_g] per group.
    """
    dtype, num_heads = _accumulate_dtype(q), q.shape[2]
    num_kv_heads = sum(len(group.heads.kv_heads) for group in spec.groups)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=dtype, device=q.device)
    for unit in _units(spec, num_heads, num_kv_heads, q.device):
        k, v = keys[unit.group].to(dtype), values[unit.group].to(dtype)
        unit_q = _select(q, unit, num_kv_heads, dtype)
        unit_gate = _select(gate, unit, num_kv_heads, dtype)
        scores = _scores(spec, unit, unit_q, k, unit_gate, q_labels, k_labels[unit.group])
        unit_lse = torch.logsumexp(scores.logits, dim=-1)  # [B, T, h, g]
        weights = _drop(scores, _softmax(scores, unit_lse), spec.dropout_p)
        unit_out = torch.zeros_like(unit_q)
        for index, pieces in enumerate(scores.pieces):
            for start, stop, key in pieces:
                unit_out[:, start:stop] += (
                    weights[:, start:stop, ..., index, None] * v[:, key : key + stop - start, :, None]
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
    lse: torch.Tensor,
    dout: torch.Tensor,
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor], torch.Tensor | None]:
    """Backward: (dq, dkeys, dvalues, dgate) in the accumulation dtype, shaped as q, keys, values and gate.

    With P the probabilities after dropout, `dl = P·(dout·v) - softmax·Σ P·(dout·v)`, which is zero where the
    clamp is active; the gate takes `(1-2ε)·[Σ_ring dl / α - Σ_skip dl / (1-α)]`, α squeezed.
    """
    dtype, num_heads = _accumulate_dtype(q), q.shape[2]
    num_kv_heads = sum(len(group.heads.kv_heads) for group in spec.groups)
    dq = torch.empty(q.shape, dtype=dtype, device=q.device)
    dgate = None if gate is None else torch.empty(gate.shape, dtype=dtype, device=q.device)
    dkeys = [torch.zeros(k.shape, dtype=dtype, device=q.device) for k in keys]
    dvalues = [torch.zeros(v.shape, dtype=dtype, device=q.device) for v in values]
    for unit in _units(spec, num_heads, num_kv_heads, q.device):
        k, v = keys[unit.group].to(dtype), values[unit.group].to(dtype)
        dk, dv = dkeys[unit.group], dvalues[unit.group]
        unit_q, unit_dout = (_select(x, unit, num_kv_heads, dtype) for x in (q, dout))
        unit_gate, unit_lse = (_select(x, unit, num_kv_heads, dtype) for x in (gate, lse))
        scores = _scores(spec, unit, unit_q, k, unit_gate, q_labels, k_labels[unit.group])
        softmax = _softmax(scores, unit_lse)
        weights = _drop(scores, softmax, spec.dropout_p)
        dlogits = torch.zeros_like(scores.logits)  # first dout·v, then the gradient of the logits
        for index, pieces in enumerate(scores.pieces):
            for start, stop, key in pieces:
                rows = slice(key, key + stop - start)
                dlogits[:, start:stop, ..., index] = (unit_dout[:, start:stop] * v[:, rows, :, None]).sum(-1)
                dv[:, rows] += (weights[:, start:stop, ..., index, None] * unit_dout[:, start:stop]).sum(3)
        dlogits = weights * dlogits
        dlogits -= softmax * dlogits.sum(-1, keepdim=True)
        if scores.unclamped is not None:
            dlogits = dlogits * scores.unclamped
        unit_dq = torch.zeros_like(unit_q)
        scaled = dlogits * spec.softmax_scale
        for index, pieces in enumerate(scores.pieces):
            for start, stop, key in pieces:
                rows = slice(key, key + stop - start)
                weight = scaled[:, start:stop, ..., index, None]  # [B, t, h, g, 1]
                unit_dq[:, start:stop] += weight * k[:, rows, :, None]
                dk[:, rows] += (weight * unit_q[:, start:stop]).sum(3)
        _store(dq, unit, num_kv_heads, unit_dq)
        if gate is not None:
            alpha = (1 - 2 * GATE_EPSILON) * unit_gate + GATE_EPSILON
            ring, skip = dlogits[..., : scores.num_ring].sum(-1), dlogits[..., scores.num_ring :].sum(-1)
            _store(dgate, unit, num_kv_heads, (1 - 2 * GATE_EPSILON) * (ring / alpha - skip / (1 - alpha)))
    return dq, dkeys, dvalues, dgate
