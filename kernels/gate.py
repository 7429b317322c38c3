"""The gate: α = sigmoid(W2·gelu(x + b1) + b2) of eq. (4), and its gradients, each in one pass over x.

Sums over tokens (the gradients of W2, b1 and b2) are formed by programs that walk over tiles of tokens in a
fixed order, then over the programs: no atomics, the same bits on every run.
"""

import torch
import triton
import triton.language as tl

from pi_dist.kernels.rotary import rows_of

# tokens of a tile, columns of the hidden layer that are looked at together, warps
FORWARD = (64, 64, 4)
BACKWARD = (16, 64, 4)  # larger tiles do not fit into registers
# of the products of a backward pass, whose factors are fp32: tf32 has 3 bits more than bf16, as many as fp16
PRECISIONS = {torch.float32: "ieee", torch.float16: "tf32x3", torch.bfloat16: "tf32"}
PROGRAMS = 264  # that share the tiles of a block of columns: two for each multiprocessor of an H100


@triton.jit
def _cumulative(x):
    """Φ(x) of the normal distribution."""
    return 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))


@triton.jit
def _for_product(x, PRECISION: tl.constexpr):
    """x, rounded to the 11 bits that a tf32 product would cut it to."""
    if PRECISION == "tf32":
        return (x.to(tl.int32, bitcast=True) + 0x1000).to(tl.float32, bitcast=True)
    return x


@triton.jit
def _tile(pointer, rows, columns, row_stride, ok):
    return tl.load(pointer + rows.to(tl.int64)[:, None] * row_stride + columns[None, :], mask=ok, other=0.0)


@triton.jit
def _places(rows, heads, length, num_heads):
    """Where tokens of all batch rows lie in a tensor [B, H, T]."""
    rows = rows.to(tl.int64)[:, None]
    return (rows // length * num_heads + heads[None, :]) * length + rows % length


@triton.jit
def _gate_fwd_kernel(
    x_ptr, x_row, up_bias, weight, down_bias, alpha, length, num_rows, WIDTH: tl.constexpr,
    NUM_HEADS: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows, heads = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, HEADS)
    logits = tl.zeros((ROWS, HEADS), tl.float32)
    for start in range(0, WIDTH, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = columns < WIDTH
        x = _tile(x_ptr, rows, columns, x_row, (rows < num_rows)[:, None] & inside[None, :]).to(tl.float32)
        x += tl.load(up_bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
        ok = inside[:, None] & (heads < NUM_HEADS)[None, :]
        w = tl.load(weight + heads[None, :] * WIDTH + columns[:, None], mask=ok, other=0.0)
        logits = tl.dot((x * _cumulative(x)).to(w.dtype), w, logits, input_precision="ieee")
    logits += tl.load(down_bias + heads, mask=heads < NUM_HEADS, other=0.0).to(tl.float32)[None, :]
    ok = (rows < num_rows)[:, None] & (heads < NUM_HEADS)[None, :]
    tl.store(alpha + _places(rows, heads, length, NUM_HEADS), tl.sigmoid(logits), mask=ok)


@triton.jit
def _gate_bwd_kernel(
    x_ptr, x_row, up_bias, weight, alpha, dalpha, dx, sums, length, num_rows, WIDTH: tl.constexpr,
    NUM_HEADS: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dx, and this program's sums [HEADS + 1, WIDTH + 1]: dW2, below it db1, right of it db2."""
    program, heads = tl.program_id(0), tl.arange(0, HEADS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < WIDTH
    bias = tl.load(up_bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    ok = (heads < NUM_HEADS)[:, None] & inside[None, :]
    w = tl.load(weight + heads[:, None] * WIDTH + columns[None, :], mask=ok, other=0.0).to(tl.float32)
    w = _for_product(w, PRECISION)
    dweight = tl.zeros((HEADS, COLUMNS), tl.float32)
    dup_bias = tl.zeros((COLUMNS,), tl.float32)
    ddown_bias = tl.zeros((HEADS,), tl.float32)
    for tile in range(program, tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        rows = tile * ROWS + tl.arange(0, ROWS)
        mine = (rows < num_rows)[:, None]
        there = mine & (heads < NUM_HEADS)[None, :]
        places = _places(rows, heads, length, NUM_HEADS)
        a = tl.load(alpha + places, mask=there, other=0.0)
        dlogits = tl.load(dalpha + places, mask=there, other=0.0) * a * (1.0 - a)  # [ROWS, HEADS]
        x = _tile(x_ptr, rows, columns, x_row, mine & inside[None, :]).to(tl.float32) + bias
        share = _cumulative(x)
        factor, hidden = _for_product(dlogits, PRECISION), _for_product(x * share, PRECISION)
        dweight = tl.dot(tl.trans(factor), hidden, dweight, input_precision=PRECISION)
        slope = share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
        dx_tile = tl.dot(factor, w, input_precision=PRECISION) * slope
        dup_bias += tl.sum(dx_tile, 0)
        ddown_bias += tl.sum(dlogits, 0)
        target = dx + rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
        tl.store(target, dx_tile.to(dx.dtype.element_ty), mask=mine & inside[None, :])
    sums += program * (HEADS + 1) * (WIDTH + 1)
    tl.store(sums + heads[:, None] * (WIDTH + 1) + columns[None, :], dweight, mask=inside[None, :])
    tl.store(sums + HEADS * (WIDTH + 1) + columns, dup_bias, mask=inside)
    if tl.program_id(1) == 0:
        tl.store(sums + heads * (WIDTH + 1) + WIDTH, ddown_bias)


def _sizes(weight: torch.Tensor, tile: tuple[int, int, int]) -> tuple[int, ...]:
    """WIDTH, NUM_HEADS, HEADS, ROWS and COLUMNS: products have at least 16 columns."""
    num_heads, width = weight.shape
    heads, columns = (max(16, triton.next_power_of_2(size)) for size in (num_heads, width))
    return width, num_heads, heads, tile[0], min(tile[1], columns)


def gate_forward(
    x: torch.Tensor, up_bias: torch.Tensor, weight: torch.Tensor, down_bias: torch.Tensor
) -> torch.Tensor:
    """α, fp32 [B, H, T], of x [B, T, w]; W2 = `weight` [H, w]. Parameters are contiguous."""
    batch, length, _ = x.shape
    alpha = torch.empty(batch, len(weight), length, dtype=torch.float32, device=x.device)
    rows = rows_of(x)
    with torch.cuda.device_of(x):
        _gate_fwd_kernel[triton.cdiv(len(rows), FORWARD[0]),](
            rows, rows.stride(0), up_bias, weight, down_bias, alpha, length, len(rows),
            *_sizes(weight, FORWARD), num_warps=FORWARD[2],
        )  # fmt: skip
    return alpha


def gate_backward(
    x: torch.Tensor, up_bias: torch.Tensor, weight: torch.Tensor, alpha: torch.Tensor, dalpha: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx as x, contiguous; db1, dW2, db2 in fp32) for dα [B, H, T], fp32 and contiguous as α."""
    length, width = x.shape[1:]
    rows, dx = rows_of(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sizes = _sizes(weight, BACKWARD)
    heads, columns = sizes[2], sizes[4]
    programs = min(PROGRAMS, triton.cdiv(len(rows), BACKWARD[0]))
    sums = torch.empty(programs, heads + 1, width + 1, dtype=torch.float32, device=x.device)
    precision = PRECISIONS[x.dtype]
    with torch.cuda.device_of(x):
        _gate_bwd_kernel[programs, triton.cdiv(width, columns)](
            rows, rows.stride(0), up_bias, weight, alpha, dalpha, dx, sums, length, len(rows), *sizes,
            precision, num_warps=BACKWARD[2],
        )  # fmt: skip
    total = sums.sum(0)
    return dx, total[heads, :width], total[: len(weight), :width], total[: len(weight), width]
