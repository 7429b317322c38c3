"""Rotary positions on the way out of a fused projection, and the way of gradients back into it.

A row of the projection is one token: its queries, keys and values, then what other columns there are. One
launch turns queries and keys; one turns their gradients back, and lays these and the other columns' side by
side: every number is read and written once.
"""

from math import prod

import torch
import triton
import triton.language as tl

ROWS, HEADS = 16, 8  # tokens and heads that a program looks at together
WARPS = 8


@triton.jit
def _turn(
    source, source_row, target, target_row, cos, sin, rows, length, num_rows, first, num_heads,
    HALF: tl.constexpr, BLOCK: tl.constexpr, SIGN: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Turn HEADS heads from `first` on by the angles of their rows' positions, times SIGN."""
    heads = (first + tl.arange(0, HEADS))[None, :, None]
    pair = tl.arange(0, BLOCK)[None, None, :]
    table_ok = (rows < num_rows)[:, None, None] & (pair < HALF)
    ok = table_ok & (heads < num_heads)
    rows = rows.to(tl.int64)
    at = (rows % length)[:, None, None] * HALF + pair
    c = tl.load(cos + at, mask=table_ok, other=0.0)
    s = tl.load(sin + at, mask=table_ok, other=0.0) * SIGN
    inside = heads * (2 * HALF) + pair
    read, written = rows[:, None, None] * source_row + inside, rows[:, None, None] * target_row + inside
    x = tl.load(source + read, mask=ok, other=0.0).to(tl.float32)
    y = tl.load(source + read + HALF, mask=ok, other=0.0).to(tl.float32)
    tl.store(target + written, (x * c - y * s).to(target.dtype.element_ty), mask=ok)
    tl.store(target + written + HALF, (x * s + y * c).to(target.dtype.element_ty), mask=ok)


@triton.jit
def _copy(source, source_row, target, target_row, rows, num_rows, first, width, COLUMNS: tl.constexpr):
    columns = (first + tl.arange(0, COLUMNS))[None, :]
    ok = (rows < num_rows)[:, None] & (columns < width)
    rows = rows.to(tl.int64)[:, None]
    tl.store(target + rows * target_row + columns, tl.load(source + rows * source_row + columns, mask=ok), ok)


@triton.jit
def _rotary_kernel(
    source, target, cos, sin, source_row, target_row, length, num_rows, num_heads, HALF: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    _turn(
        source, source_row, target, target_row, cos, sin, rows, length, num_rows, tl.program_id(1) * HEADS,
        num_heads, HALF, BLOCK, 1, HEADS,
    )  # fmt: skip


@triton.jit
def _joining_kernel(
    dq, dk, dv, rest, target, cos, sin, q_row, k_row, v_row, rest_row, target_row, length, num_rows,
    num_heads, num_kv_heads, rest_width, HALF: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """Programs along the second axis: those of dq, of dk, of dv, and of the rest."""
    DIM: tl.constexpr = 2 * HALF
    COLUMNS: tl.constexpr = 2 * BLOCK * HEADS
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    of_q, of_k = tl.cdiv(num_heads, HEADS), tl.cdiv(num_kv_heads, HEADS)
    of_v = tl.cdiv(num_kv_heads * DIM, COLUMNS)
    if part < of_q:
        _turn(
            dq, q_row, target, target_row, cos, sin, rows, length, num_rows, part * HEADS, num_heads, HALF,
            BLOCK, -1, HEADS,
        )  # fmt: skip
    elif part < of_q + of_k:
        _turn(
            dk, k_row, target + num_heads * DIM, target_row, cos, sin, rows, length, num_rows,
            (part - of_q) * HEADS, num_kv_heads, HALF, BLOCK, -1, HEADS,
        )  # fmt: skip
    elif part < of_q + of_k + of_v:
        _copy(
            dv, v_row, target + (num_heads + num_kv_heads) * DIM, target_row, rows, num_rows,
            (part - of_q - of_k) * COLUMNS, num_kv_heads * DIM, COLUMNS,
        )  # fmt: skip
    else:
        _copy(
            rest, rest_row, target + (num_heads + 2 * num_kv_heads) * DIM, target_row, rows, num_rows,
            (part - of_q - of_k - of_v) * COLUMNS, rest_width, COLUMNS,
        )  # fmt: skip


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """x [B, T, ...] as [B·T, columns], copied only if tokens do not lie at one distance, or are not dense."""
    rows = x.reshape(x.shape[0] * x.shape[1], prod(x.shape[2:]))
    return rows if rows.stride(1) == 1 else rows.contiguous()


def turn_heads(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, num_heads: int) -> torch.Tensor:
    """The first heads of x [B, T, columns] with their pairs (d, d + D/2) turned: new, [B, T, num_heads, D].

    Args:
        cos, sin: fp32 [T, D/2], of the positions of the T tokens.
    """
    (batch, length), half = x.shape[:2], cos.shape[1]
    source, target = rows_of(x), x.new_empty(batch, length, num_heads, 2 * half)
    grid = (triton.cdiv(len(source), ROWS), triton.cdiv(num_heads, HEADS))
    with torch.cuda.device_of(x):
        _rotary_kernel[grid](
            source, target, cos, sin, source.stride(0), num_heads * 2 * half, length, len(source), num_heads,
            half, triton.next_power_of_2(half), ROWS, HEADS, num_warps=WARPS,
        )  # fmt: skip
    return target


def join_gradients(
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    rest: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> torch.Tensor:
    """The gradient [B, T, columns] of the projection: dq and dk turned back, dv and the rest as they are.

    Args:
        dq: [B, T, H, D]. dk, dv: [B, T, H_kv, D]. rest: [B, T, w]. cos, sin: as in `turn_heads`.
    """
    (batch, length, num_heads, dim), num_kv_heads = dq.shape, dk.shape[2]
    parts = [rows_of(x) for x in (dq, dk, dv, rest)]
    columns = sum(part.shape[1] for part in parts)
    target, half = dq.new_empty(batch, length, columns), dim // 2
    block = triton.next_power_of_2(half)
    wide = 2 * block * HEADS
    programs = sum(triton.cdiv(n, HEADS) for n in (num_heads, num_kv_heads))
    programs += sum(triton.cdiv(part.shape[1], wide) for part in parts[2:])
    with torch.cuda.device_of(dq):
        _joining_kernel[triton.cdiv(batch * length, ROWS), programs](
            *parts, target, cos, sin, *(part.stride(0) for part in parts), columns, length, batch * length,
            num_heads, num_kv_heads, rest.shape[2], half, block, ROWS, HEADS,
            num_warps=WARPS,
        )  # fmt: skip
    return target
