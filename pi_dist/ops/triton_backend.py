"""The Triton kernels as a backend: which bands a call needs, and a launch for each.

A band is a set of neighbours that one launch looks at; results of several are merged by lse, gradients added.
The keys of a shard and each run of received rows are bands of their own, so nothing is concatenated.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, wraps
from typing import Any

import torch
import triton

from pi_dist.kernels import tiles
from pi_dist.kernels.block_sizes import Blocks, blocks, launch_options
from pi_dist.kernels.pi_attention_bwd import _keys_kernel, _queries_kernel, _queries_once_kernel
from pi_dist.kernels.pi_attention_bwd_fused import _fused_kernel
from pi_dist.kernels.pi_attention_fwd import _pi_attention_fwd_kernel
from pi_dist.kernels.tiles import Dropout, Options, Rows, Scores, Sizes
from pi_dist.ops.pattern import PiPattern
from pi_dist.ops.spec import GATE_EPSILON, AttentionSpec, KeyBlock, nothing_arrives, nothing_to_send

RING, SKIP, BOTH = (kind.value for kind in (tiles.RING, tiles.SKIP, tiles.BOTH))
# decided when a kernel is decorated; asked here, since torch.compile cannot look at a kernel's type
INTERPRETED = not isinstance(_pi_attention_fwd_kernel, triton.runtime.jit.JITFunction)
LONGEST = 2**29  # tokens that a call may span, and its skips; see `tiles.NOWHERE`
NEAR_SKIPS = 32  # skips that lie no farther than the window or this join its band
SHIFTED_SKIPS = 1  # so few farther skips are done row by row; more, by residue class in a launch of their own
NARROW = 32  # steps on both sides up to which the backward is one tile (of 64)
WALKED = 64  # steps back, of a causal window, up to which it is a walk from tile to tile
FEW_WALKS = 768  # programs below which walks are shorter
NARROW_BYTES = 512  # of a row up to which one tile fits into a multiprocessor
WALKED_BYTES = 128  # of a row up to which the tiles of a walk fit into a multiprocessor
LARGEST_FIXED_TOP = 40.0  # exp(-2·cap) must be a normal number


def check_usable(q: torch.Tensor) -> None:
    """Raise ValueError with the reason unless the kernels can run on tensors like `q` [B, T, H, D]."""
    if not q.is_cuda and not INTERPRETED:
        raise ValueError(
            f"backend 'triton' needs a GPU: q.device.type ({q.device.type}) == 'cuda' does not hold"
        )
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"backend 'triton': q.dtype ({q.dtype}) in (float32, float16, bfloat16) does not hold"
        )
    if INTERPRETED and q.dtype == torch.bfloat16:
        raise ValueError("backend 'triton': Triton's interpreter computes bfloat16 wrongly")
    if not 1 <= q.shape[3] <= 256:
        raise ValueError(f"backend 'triton': 1 <= head_dim ({q.shape[3]}) <= 256 does not hold")


@dataclass(frozen=True)
class _Band:
    """Neighbours that one launch looks at: `left` and `right` steps of a query, and `shifts` far skips."""

    kind: int
    left: int
    right: int
    shifts: int = 0


@dataclass(frozen=True)
class _Part:
    """Queries [start, stop), as indices, that look at a block of keys by one band."""

    band: _Band
    block: KeyBlock
    start: int
    stop: int
    strides: tuple[int, ...]  # of all query heads
    local: bool  # whether the keys lie at the queries' own positions

    def span(self, query_start: int) -> int:
        """Tokens from the first query or key to the last."""
        queries, keys = (query_start + self.start, query_start + self.stop), self.block.run
        return max(queries[1], keys.stop) - min(queries[0], keys.start)


def _bands(pattern: PiPattern, strides: tuple[int, ...], span: int, local: bool) -> list[_Band]:
    """The bands of heads with these strides, of queries and keys within `span` tokens.

    local: the keys lie at the queries' own positions.
    """
    window = min(pattern.window, span)
    chain = triton.cdiv(span, min(strides))  # the longest: nothing lies farther than its end
    skips = min(pattern.num_skips, max(16, triton.next_power_of_2(chain))) if chain > 1 else 0
    far = skips * max(strides)

    def band(kind: int, steps: int, shifts: int = 0) -> _Band:
        return _Band(kind, steps, 0 if pattern.causal else steps, shifts)

    if far <= window:
        return [band(RING, window)]
    if far <= max(window, NEAR_SKIPS):
        return [band(BOTH, far)]
    if local and skips <= SHIFTED_SKIPS:
        return [band(RING, window, skips)]
    if window == 0 and not pattern.include_self:
        return [band(SKIP, skips)]
    return [band(RING, window), band(SKIP, skips)]


@lru_cache(maxsize=1024)
def _parts(
    pattern: PiPattern,
    blocks_: tuple[KeyBlock, ...],
    num_heads: int,
    num_kv_heads: int,
    query_start: int,
    q_len: int,
) -> tuple[_Part, ...]:
    """The launches of a call, in order; the first covers all queries, and the rest those that need it."""
    share, all_strides = num_heads // num_kv_heads, pattern.head_strides(num_heads)
    far = max(all_strides) * max(1, pattern.num_skips)
    if far >= LONGEST:
        raise ValueError(f"backend 'triton': num_skips · stride ({far}) < 2^29 does not hold")
    if blocks_[0].heads != tuple(range(num_kv_heads)):
        raise ValueError(f"heads of the first block ({blocks_[0].heads}) == all heads does not hold")
    parts = []
    for block in blocks_:
        local = block.run == (query_start, query_start + q_len)
        strides = tuple(all_strides[head * share + s] for head in block.heads for s in range(share))
        span = max(block.run.stop, query_start + q_len) - min(block.run.start, query_start)
        if span >= LONGEST:
            raise ValueError(
                f"backend 'triton': queries and keys within ({span}) < 2^29 tokens does not hold"
            )
        for band in _bands(pattern, strides, span, local):
            back = band.left if band.kind != SKIP else pattern.num_skips * max(strides)
            start = max(0, block.run.start - (0 if pattern.causal else back) - query_start)
            stop = min(q_len, block.run.stop + back - query_start)
            if band.shifts or not parts:
                start, stop = 0, q_len
            if start < stop:
                parts.append(_Part(band, block, start, stop, all_strides, local))
    return tuple(parts)


@lru_cache(maxsize=1024)
def _table(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def _rows(tensor: torch.Tensor | None, like: torch.Tensor) -> Rows:
    """A [B, T, H, D], [B, T, H] or [B, T] tensor as the kernels take it; None becomes any pointer."""
    if tensor is None:
        return Rows(like, 0, 0, 0)
    return Rows(tensor, tensor.stride(0), tensor.stride(1), tensor.stride(2) if tensor.dim() > 2 else 0)


def _dense_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself unless its last dimension is strided."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _signed(value: int) -> int:
    """The low 32 bits of `value` as a signed integer, so that the kernel's argument type never changes."""
    low = value & 0xFFFFFFFF
    return low - (1 << 32) if low >> 31 else low


def _sum_dtype(q: torch.Tensor, parts: tuple[_Part, ...]) -> torch.dtype:
    """What launches add to: 16 bits would be rounded as often as there are launches."""
    return q.dtype if len(parts) <= 2 else torch.float32


class _Launch:
    """The arguments that the launches of one call share."""

    def __init__(
        self,
        spec: AttentionSpec,
        tensors: list[torch.Tensor],
        gate: torch.Tensor | None,
        q_labels: torch.Tensor | None,
    ) -> None:
        q = tensors[0]
        self.spec, self.gate = spec, gate
        self.num_heads, self.head_dim = q.shape[2:]
        self.share = self.num_heads // spec.num_kv_heads
        self.element_bytes = q.element_size()
        strided = [x.stride(1) for x in (*tensors, gate, q_labels) if x is not None]
        self.token_stride = max(self.num_heads * self.head_dim, *strided)
        self.dropout = Dropout(
            _signed(spec.seed),
            _signed(spec.seed >> 32),
            spec.row_start,
            spec.query_start,
            _signed(min(round(spec.dropout_p * 2**32), 2**32 - 1)),
            1 / (1 - spec.dropout_p),
        )
        self.fixed_top = (
            q.dtype == torch.bfloat16 and spec.logit_cap is not None and spec.logit_cap <= LARGEST_FIXED_TOP
        )
        self.fast_log = q.is_cuda and q.element_size() == 2
        self.has_labels = q_labels is not None

    def strides_of(self, part: _Part) -> tuple[int, ...]:
        """Strides of the query heads that look at the part's block."""
        return tuple(part.strides[h * self.share + s] for h in part.block.heads for s in range(self.share))

    def alike(self, part: _Part) -> bool:
        """Whether a program can do all query heads of a key/value head.

        Heads whose skips differ in stride lie in different residue classes: one at a time.
        """
        strides, heads = self.strides_of(part), range(0, len(part.block.heads) * self.share, self.share)
        return part.band.kind != SKIP or all(len(set(strides[h : h + self.share])) == 1 for h in heads)

    def shares(self, part: _Part) -> list[tuple[int, int]]:
        """(first, number of) query heads of a key/value head, for each launch of a wide band."""
        return [(0, self.share)] if self.alike(part) else [(first, 1) for first in range(self.share)]

    def scores(self, part: _Part) -> Scores:
        pattern, spec = self.spec.pattern, self.spec
        stride = self.strides_of(part)[0]
        window = min(pattern.window, part.span(spec.query_start))
        return Scores(window, stride, pattern.num_skips, spec.softmax_scale, spec.logit_cap or 0.0)

    def options(
        self,
        part: _Part,
        sizes: Blocks,
        *,
        merge: bool,
        shares: int,
        parts: bool = False,
        walk: bool = False,
    ) -> Options:
        band, pattern, spec = part.band, self.spec.pattern, self.spec
        tile = sizes.block_m + sizes.block_n + band.left + band.right  # more tokens than a tile spans
        tokens = part.span(self.spec.query_start) if band.kind == SKIP else tile
        return Options(
            kind=band.kind,
            left=band.left,
            right=band.right,
            halo=sizes.halo,
            walk=walk,
            long_steps=tokens * self.token_stride >= 2**31,
            shifts=band.shifts,
            causal=pattern.causal,
            include_self=pattern.include_self,
            one_skip=pattern.num_skips == 1,
            uniform=len(set(self.strides_of(part))) == 1,
            share=self.share,
            shares=shares,
            has_gate=self.gate is not None,
            has_labels=self.has_labels,
            has_cap=spec.logit_cap is not None,
            dropout=spec.dropout_p > 0,
            merge=merge,
            parts=parts,
            fixed_top=self.fixed_top,
            fast_log=self.fast_log,
            heads_first=band.kind != SKIP and band.shifts == 0,  # else a head's far rows stay in the L2 cache
            head_dim=self.head_dim,
            block_d=max(16, triton.next_power_of_2(self.head_dim)),
            block_m=sizes.block_m,
            block_n=sizes.block_n,
            epsilon=GATE_EPSILON,
        )

    def block_sizes(self, kernel: str, part: _Part) -> Blocks:
        """Tile sizes of one of the kernels."""
        band = part.band
        kind = "far" if band.shifts else ("ring", "skip", "near")[band.kind]
        return blocks(kernel, kind, band.left, self.head_dim, self.element_bytes)

    def num_tiles(self, part: _Part, owned: int, length: int) -> int:
        """Programs a head, each of `owned` slots, for `length` tokens: enough for the head with the most."""
        if part.band.kind != SKIP:
            return triton.cdiv(length, owned)
        span = part.span(self.spec.query_start)
        slots = max(min(stride, span) * triton.cdiv(span, stride) for stride in set(self.strides_of(part)))
        return triton.cdiv(slots, owned)

    def dropout_from(self, start: int) -> Dropout:
        return self.dropout._replace(query_start=self.spec.query_start + start)

    def shift(self, part: _Part) -> int:
        return self.spec.query_start + part.start - part.block.run.start


def _on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Launch on the GPU that holds q, whichever is current."""

    @wraps(function)
    def on_its_device(spec, q, *arguments, **keywords):
        with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
            return function(spec, q, *arguments, **keywords)

    return on_its_device


@_on_its_device
def pi_attention_fwd(
    spec, q, keys, values, gate, q_labels, k_labels, arrive=nothing_arrives
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `pi_dist.ops.reference.pi_attention_fwd`; lse is fp32. The first block holds all heads.

    Waits for the other blocks after the launches that need none of them.
    """
    batch, q_len, num_heads, _ = q.shape
    parts = _parts(spec.pattern, spec.blocks, num_heads, spec.num_kv_heads, spec.query_start, q_len)
    out = torch.empty(q.shape, dtype=_sum_dtype(q, parts), device=q.device)
    lse = torch.empty((batch, num_heads, q_len), dtype=torch.float32, device=q.device).transpose(1, 2)
    q, keys, values = _dense_rows(q), [_dense_rows(keys[0])], [_dense_rows(values[0])]
    gate = None if gate is None else gate.float()
    launch = _Launch(spec, [q, *keys, *values], gate, q_labels)
    for number, part in enumerate(parts):
        index = spec.blocks.index(part.block)
        if index and len(keys) == 1:
            for tensors, others in zip((keys, values), arrive(), strict=True):
                tensors += others
        k, v, labels = keys[index], values[index], k_labels[index]
        view = slice(part.start, part.stop)
        length = part.stop - part.start
        sizes = launch.block_sizes("fwd", part)
        num_tiles = launch.num_tiles(part, sizes.block_m, length)
        heads = len(part.block.heads) * launch.share
        _pi_attention_fwd_kernel[(num_tiles * heads * batch,)](
            _rows(q[:, view], q),
            _rows(k, q),
            _rows(v, q),
            _rows(None if gate is None else gate[:, view], q),
            _rows(None if q_labels is None else q_labels[:, view], q),
            _rows(labels, q),
            _rows(out[:, view], q),
            _rows(lse[:, view], q),
            _table(part.strides, q.device),
            _table(part.block.heads, q.device),
            Sizes(length, k.shape[1], heads, num_tiles, launch.shift(part)),
            launch.scores(part),
            launch.dropout_from(part.start),
            OPTIONS=launch.options(part, sizes, merge=number > 0, shares=launch.share),
            **launch_options(sizes),
        )
    return out.to(q.dtype), lse


@_on_its_device
def pi_attention_bwd(
    spec, q, keys, values, gate, q_labels, k_labels, out, lse, dout, send_back=nothing_to_send
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """As `pi_dist.ops.reference.pi_attention_bwd`, but for the dtype of gradients.

    Those of q and of the first block are in q's, those of other blocks, which travel to their owners, fp32.
    They are computed before the rest, so as to travel meanwhile.
    """
    call = _Backward(spec, q, keys, values, gate, q_labels, k_labels, out, lse, dout)
    received = [part for part in call.parts if part.block != spec.blocks[0]]
    for part in received:
        call.keys_of(part)
    send_back(*call.gradients_of_received())
    for part in call.parts:
        if part in received:
            call.queries_of(part)
        elif not call.fused(part):
            call.keys_of(part)
            call.queries_of(part)
    return call.dq.to(q.dtype), call.dkeys[0], call.dvalues[0], call.gradient_of_gate()


class _Backward:
    """The launches of one backward call. The first part's, of the first block, store what others add to."""

    def __init__(self, spec, q, keys, values, gate, q_labels, k_labels, out, lse, dout) -> None:
        gate = None if gate is None else gate.float()
        self.dgate = None if gate is None else torch.empty_like(gate)  # laid out as the gate
        self.dkeys, self.dvalues = (
            [
                torch.empty(x.shape, dtype=torch.float32 if index else q.dtype, device=q.device)
                for index, x in enumerate(tensors)
            ]
            for tensors in (keys, values)
        )
        self.spec, self.gate, self.out, self.lse = spec, gate, out, lse
        self.q, self.dout = _dense_rows(q), _dense_rows(dout)
        self.keys, self.values = [_dense_rows(k) for k in keys], [_dense_rows(v) for v in values]
        self.q_labels, self.k_labels = q_labels, k_labels
        self.launch = _Launch(spec, [self.q, self.dout, *self.keys, *self.values], gate, q_labels)
        self.parts = _parts(
            spec.pattern, spec.blocks, q.shape[2], spec.num_kv_heads, spec.query_start, q.shape[1]
        )
        self.several = len(self.parts) > 1
        self.dq = torch.empty(q.shape, dtype=_sum_dtype(q, self.parts), device=q.device)
        apart = self.several and gate is not None
        self.weight, self.residual = (torch.empty_like(self.dgate) if apart else self.dgate for _ in range(2))
        self.touched: set[int] = set()  # blocks
        self._once: list[torch.Tensor | None] = []

    def once(self, part: _Part) -> list[torch.Tensor | None]:
        """delta, log2 α and log2(1-α) of all queries, [B, T, H]; the two are None without a gate."""
        if not self._once:
            self._once = _queries_once(self.launch, part, self.out, self.dout)
        return self._once

    def fused(self, part: _Part) -> bool:
        """Compute all gradients of a part in one launch, if that can be."""
        q, launch, batch = self.q, self.launch, self.q.shape[0]
        fused = _fused(launch, part, batch) if part.local and launch.alike(part) else None
        if fused is None:
            return False
        merge = part != self.parts[0]
        part, sizes, owned, walk = fused
        k, v, dk, dv = (x[0] for x in (self.keys, self.values, self.dkeys, self.dvalues))
        num_tiles, kv_heads = launch.num_tiles(part, owned, q.shape[1]), k.shape[2]
        _fused_kernel[(num_tiles * kv_heads * batch,)](
            _rows(q, q), _rows(k, q), _rows(v, q), _rows(self.gate, q), _rows(self.q_labels, q),
            _rows(self.k_labels[0], q), _rows(self.out, q), _rows(self.lse, q), _rows(self.dout, q),
            _table(part.strides, q.device), _rows(self.dq, q), _rows(dk, q), _rows(dv, q),
            _rows(self.dgate, q), _rows(self.weight, q), _rows(self.residual, q),
            Sizes(q.shape[1], q.shape[1], kv_heads, num_tiles, 0), launch.scores(part),
            launch.dropout_from(0),
            OPTIONS=launch.options(
                part, sizes, merge=merge, shares=launch.share, parts=self.several, walk=walk
            ),
            **launch_options(sizes),
        )  # fmt: skip
        self.touched.add(0)
        return True

    def keys_of(self, part: _Part) -> None:
        """dk and dv that a part's queries give its keys."""
        index, launch = self.spec.blocks.index(part.block), self.launch
        sizes, dk, dv = launch.block_sizes("keys", part), self.dkeys[index], self.dvalues[index]
        length, k_len, kv_heads = part.stop - part.start, dk.shape[1], len(part.block.heads)
        num_tiles = launch.num_tiles(part, sizes.block_m, k_len)
        logs = [self._seen(x, part) for x in self.once(part)[1:]]
        for first_share, shares in launch.shares(part):
            _keys_kernel[(num_tiles * kv_heads * self.q.shape[0],)](
                *self._common(part, index), *logs, _rows(dk, self.q), _rows(dv, self.q),
                Sizes(length, k_len, kv_heads, num_tiles, launch.shift(part)), launch.scores(part),
                launch.dropout_from(part.start), first_share,
                OPTIONS=launch.options(part, sizes, merge=index in self.touched, shares=shares),
                **launch_options(sizes),
            )  # fmt: skip
            self.touched.add(index)

    def queries_of(self, part: _Part) -> None:
        """dq and the gate's sums that a part's keys give its queries."""
        index, launch, q = self.spec.blocks.index(part.block), self.launch, self.q
        sizes = launch.block_sizes("queries", part)
        length, k_len, kv_heads = (
            part.stop - part.start,
            self.keys[index].shape[1],
            len(part.block.heads),
        )
        num_tiles = launch.num_tiles(part, sizes.block_m, length)
        of_gate = [self._seen(x, part) for x in (self.dgate, self.weight, self.residual)]
        merge = part != self.parts[0]
        for first_share, shares in launch.shares(part):
            _queries_kernel[(num_tiles * kv_heads * shares * q.shape[0],)](
                *self._common(part, index), self._seen(self.gate, part), self._seen(self.dq, part), *of_gate,
                Sizes(length, k_len, kv_heads * shares, num_tiles, launch.shift(part)), launch.scores(part),
                launch.dropout_from(part.start), first_share,
                OPTIONS=launch.options(part, sizes, merge=merge, shares=shares, parts=self.several),
                **launch_options(sizes),
            )  # fmt: skip

    def _seen(self, tensor: torch.Tensor | None, part: _Part) -> Rows:
        """What belongs to the queries of a part."""
        return _rows(None if tensor is None else tensor[:, part.start : part.stop], self.q)

    def _common(self, part: _Part, index: int) -> list[Rows | torch.Tensor]:
        """What the two kernels of a wide band read."""
        of_queries = (self.q, self.q_labels, self.once(part)[0], self.lse, self.dout)
        mine, labels, delta, lse, dout = (self._seen(x, part) for x in of_queries)
        k, v, k_labels = (_rows(x[index], self.q) for x in (self.keys, self.values, self.k_labels))
        tables = (_table(part.strides, self.q.device), _table(part.block.heads, self.q.device))
        return [mine, k, v, labels, k_labels, delta, lse, dout, *tables]

    def gradients_of_received(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """dk and dv of every block but the first; zeros where no query looks at one."""
        for index in set(range(1, len(self.keys))) - self.touched:
            self.dkeys[index].zero_()
            self.dvalues[index].zero_()
        return self.dkeys[1:], self.dvalues[1:]

    def gradient_of_gate(self) -> torch.Tensor | None:
        """dα, put together if several launches made it, see `store_gate`."""
        if not self.several or self.dgate is None:
            return self.dgate
        return (1 - 2 * GATE_EPSILON) * torch.addcmul(self.dgate, self.residual, self.weight, value=-1)


def _fused(launch: _Launch, part: _Part, batch: int) -> tuple[_Part, Blocks, int, bool] | None:
    """A fused backward's part, tile sizes, tokens a program, and whether it walks; None if it is too wide."""
    band = part.band
    left, right = (triton.cdiv(steps, 16) * 16 for steps in (band.left, band.right))
    row_bytes = triton.next_power_of_2(launch.head_dim) * launch.element_bytes
    if left + right <= NARROW and row_bytes <= NARROW_BYTES:
        # margins of whole 16 steps: one kernel for windows from 1 to 16, and aligned tiles
        part = replace(part, band=replace(band, left=left, right=right))
        sizes = launch.block_sizes("narrow", part)
        return part, sizes, sizes.block_m - left - right, False
    walks = (band.shifts, right, launch.share) == (0, 0, 1) and left <= WALKED
    if walks and row_bytes <= WALKED_BYTES:
        sizes = launch.block_sizes("walk", part)
        owned, rows = sizes.block_n, batch * launch.num_heads
        while owned > 4 * sizes.block_m and triton.cdiv(part.stop - part.start, owned) * rows < FEW_WALKS:
            owned //= 2
        part = replace(part, band=replace(band, left=WALKED))
        return part, replace(sizes, block_n=owned), owned, True
    return None


def _queries_once(
    launch: _Launch, part: _Part, out: torch.Tensor, dout: torch.Tensor
) -> list[torch.Tensor | None]:
    """Σ out·dout over D times the softmax scale, log2 α and log2(1-α), [B, T, H] fp32, heads apart."""
    batch, length, num_heads, head_dim = out.shape
    delta, ring, skip = (
        torch.empty((batch, num_heads, length), dtype=torch.float32, device=out.device).transpose(1, 2)
        if index == 0 or launch.gate is not None
        else None
        for index in range(3)
    )
    sizes = Blocks(max(16, 4096 // triton.next_power_of_2(head_dim)), 16, 4, 1)
    any_band = replace(part, band=_Band(RING, 0, 0))  # the band does not matter: compiled once for all
    num_tiles = triton.cdiv(length, sizes.block_m)
    _queries_once_kernel[(num_tiles * num_heads * batch,)](
        *(_rows(x, out) for x in (out, dout, launch.gate, delta, ring, skip)),
        Sizes(length, length, num_heads, num_tiles, 0),
        launch.scores(part),
        OPTIONS=launch.options(any_band, sizes, merge=False, shares=1),
        num_warps=4,
    )
    return [delta, ring, skip]
