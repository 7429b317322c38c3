"""Softmax cross-entropy over rows of logits, and its gradient in their place, in one kernel.

A program owns a row. It reads the row once, keeping of each column of its block a maximum and a sum, rescaled
as the maximum grows, which are reduced at the end; and once more, from the cache where the rows in flight fit
into it, to write the gradient.
"""

import torch
import triton
import triton.language as tl

BLOCK = 8192  # logits that a program looks at together
NUM_WARPS = 32  # two programs on a multiprocessor: their rows of 50k 16-bit logits fit into an H100's cache
LOWEST = tl.constexpr(-1e30)  # in place of -inf, whose difference with itself is not a number


@triton.jit
def _cross_entropy_kernel(
    logits_ptr,
    row_stride,
    targets_ptr,
    losses_ptr,
    vocab,
    ignore,
    WITH_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    target = tl.load(targets_ptr + row)
    columns = tl.arange(0, BLOCK)
    tops = tl.full((BLOCK,), LOWEST, tl.float32)
    totals = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        at = start + columns
        x = tl.load(logits_ptr + at, mask=at < vocab, other=LOWEST).to(tl.float32)
        higher = tl.maximum(tops, x)
        totals = totals * tl.exp(tops - higher) + tl.exp(x - higher)
        tops = higher
    top = tl.max(tops, 0)
    log_sum = top + tl.log(tl.sum(totals * tl.exp(tops - top), 0))
    counts = target != ignore
    # the row's own logit, read before its gradient takes its place
    own = tl.load(logits_ptr + tl.where(counts, target, 0)).to(tl.float32)
    tl.store(losses_ptr + row, tl.where(counts, log_sum - own, 0.0))
    if WITH_GRADIENT:
        tl.debug_barrier()
        for start in range(0, vocab, BLOCK):
            at = start + columns
            x = tl.load(logits_ptr + at, mask=at < vocab, other=LOWEST).to(tl.float32)
            gradient = tl.exp(x - log_sum) - tl.where(at == target, 1.0, 0.0)
            gradient = tl.where(counts, gradient, 0.0)
            tl.store(logits_ptr + at, gradient.to(logits_ptr.dtype.element_ty), mask=at < vocab)


def cross_entropy_(
    logits: torch.Tensor, targets: torch.Tensor, ignore: int, with_gradient: bool
) -> torch.Tensor:
    """-log softmax(logits)[target] of each row, 0 where the target is `ignore`: fp32 [N].

    With gradient, d(Σ losses)/d(logits) is written over `logits`.

    Args:
        logits: [N, V], rows contiguous, at most 32 bits an element. targets: int64 [N].
    """
    rows, vocab = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    block = min(BLOCK, triton.next_power_of_2(vocab))
    with torch.cuda.device_of(logits):
        _cross_entropy_kernel[(rows,)](
            logits, logits.stride(0), targets, losses, vocab, ignore, with_gradient, block,
            num_warps=NUM_WARPS,
        )  # fmt: skip
    return losses
