"""Counter-based dropout: a keep/drop bit is a hash of what it stands for, not of when it was drawn.

The bit of (seed, batch row, query position, head, neighbour) is the same on any number of ranks, in any
tiling, and in a recomputed forward pass.
"""

from __future__ import annotations

import hashlib
import struct

import torch

_LOW = 0xFFFFFFFF


def derive_seed(*counters: int) -> int:
    """A 63-bit seed from counters such as (run seed, step, micro-step, layer)."""
    packed = struct.pack(f"<{len(counters)}q", *counters)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A bijective 32-bit finalizer (multiply and xor-shift) on int64 tensors that hold 32-bit values."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _LOW
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _LOW
    return x ^ (x >> 16)


def _mix64(state: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Fold a 64-bit value into the 32-bit state."""
    return _mix(_mix(state ^ (value & _LOW)) ^ ((value >> 32) & _LOW))


def position_hash(
    seed: int, rows: torch.Tensor, positions: torch.Tensor, heads: torch.Tensor
) -> torch.Tensor:
    """32-bit hash [B, T, H] (int64) of seed, batch rows [B], global query positions [T] and heads [H]."""
    state = _mix64(torch.zeros_like(rows), torch.full_like(rows, seed))  # [B]
    state = _mix64(state, rows)[:, None]
    state = _mix64(state, positions[None, :])[:, :, None]  # [B, T, 1]
    return _mix64(state, heads[None, None, :])  # [B, T, H]


def keep_bits(hashed: torch.Tensor, offsets: int | torch.Tensor, dropout_p: float) -> torch.Tensor:
    """True where the neighbour at `offsets` (query minus key position) is kept; same shape as `hashed`."""
    offsets = torch.as_tensor(offsets, dtype=torch.int64, device=hashed.device)
    return _mix64(hashed, offsets) >= round(dropout_p * 2**32)


def keep_mask(
    dropout_p: float,
    seed: int,
    *,
    rows: torch.Tensor,
    positions: torch.Tensor,
    heads: torch.Tensor,
    offsets: torch.Tensor,
) -> torch.Tensor:
    """Keep bits [B, T, H] of one neighbour of each query, at offsets [T]."""
    return keep_bits(position_hash(seed, rows, positions, heads), offsets[None, :, None], dropout_p)
