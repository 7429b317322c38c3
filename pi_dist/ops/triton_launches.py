"""Plans a call of the Triton kernels: which are launched, in what order, with which options and grids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
import triton

from pi_dist.kernels import tiles
from pi_dist.kernels.block_sizes import Blocks, blocks, launch_options
from pi_dist.kernels.tiles import Dropout, Options, Scores, Sizes
from pi_dist.ops.spec import GATE_EPSILON, AttentionSpec, Run
from pi_dist.ops.triton_bands import RING, SKIP, Band, Part, parts_of

# decided when a kernel is decorated; asked here, since torch.compile cannot look at a kernel's type
INTERPRETED = not isinstance(tiles.zeros, triton.runtime.jit.JITFunction)
NARROW = 32  # steps on both sides up to which the backward is one tile (of 64)
WALKED = 64  # steps back, of a causal window, up to which it is a walk from tile to tile
FEW_WALKS = 768  # programs below which walks are shorter
NARROW_BYTES = 512  # of a row up to which one tile fits into a multiprocessor
WALKED_BYTES = 128  # of a row up to which the tiles of a walk fit into a multiprocessor
LARGEST_FIXED_TOP = 40.0  # exp(-2·cap) must be a normal number


class Launch(NamedTuple):
    """A launch but for its tensors.

    Attributes:
        kernel: "fwd", "once", "fused", "keys" or "queries".
        part: the queries and keys that it looks at.
        programs: how many it has for each batch row.
        arguments: those that follow the tensors.
        keywords: the options, warps, stages and registers.
    """

    kernel: str
    part: Part
    programs: int
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


class BackwardLaunches(NamedTuple):
    """The launches of a backward call, in order.

    Attributes:
        sent: for the gradients of received rows, which travel.
        rest: all others.
        unseen: blocks, by index, that no query sees: no launch writes their gradients.
    """

    sent: tuple[Launch, ...]
    rest: tuple[Launch, ...]
    unseen: frozenset[int]


class LaunchPlan:
    """The launches of all calls that are alike: planned once, when first asked for.

    Args:
        shape: of q [B, T, H, D].
        token_stride: the most elements between tokens of a tensor.

    Attributes:
        several_parts: whether the output, dq and the gradient of a gate are made by several launches.
        sum_dtype: of the output and dq.
        edge: queries, by their place, that look at received rows too. Their launches come last, and go on in
            fp32 with what the others have made. None: no fp32 is needed, or all is.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
        has_gate: bool,
        has_labels: bool,
        token_stride: int,
    ) -> None:
        self._spec, self._dtype, self._device = spec, dtype, device
        self._has_gate, self._has_labels, self._token_stride = has_gate, has_labels, token_stride
        self._batch, self._q_len, self._num_heads, self._head_dim = shape
        self._share = self._num_heads // spec.num_kv_heads  # query heads of a key/value head
        self._padded_dim = 1 << (self._head_dim - 1).bit_length()  # to a power of two
        self._dropout = Dropout(
            _signed(spec.seed),
            _signed(spec.seed >> 32),
            spec.row_start,
            spec.query_start,
            moved=0,
            threshold=_signed(min(round(spec.dropout_p * 2**32), 2**32 - 1)),
            keep_scale=1 / (1 - spec.dropout_p),
        )
        self._parts = parts_of(spec, self._num_heads, self._q_len)
        self.several_parts = len(self._parts) > 1
        self.sum_dtype, self.edge = self._dtype_of_sum(len(self._parts)), None
        edge = _edge(self._parts)
        if self.sum_dtype != dtype and edge is not None and 2 * (edge.stop - edge.start) <= self._q_len:
            whole = sum(part.view is None for part in self._parts)
            self.sum_dtype = self._dtype_of_sum(whole)
            self.edge = edge if self.sum_dtype == dtype else None

    def _dtype_of_sum(self, launches: int) -> torch.dtype:
        """What so many launches add to: 16 bits would be rounded as often."""
        return self._dtype if launches <= 2 else torch.float32

    @cached_property
    def forward(self) -> tuple[Launch, ...]:
        """The launches of a forward call, in order."""
        launches: list[Launch] = []
        for part in self._parts:
            sizes, heads = self._block_sizes("fwd", part), len(part.strides)
            num_tiles = self._num_tiles(part, sizes.block_m, _length(part.queries))
            options = self._options(part, sizes, merge=bool(launches), shares=self._share)
            launches.append(self._launch("fwd", part, heads, num_tiles, sizes, options))
        return tuple(launches)

    @cached_property
    def backward(self) -> BackwardLaunches:
        """The launches of a backward call; those of the first part store what later ones add to."""
        touched: set[int] = set()
        received = (part for part in self._parts if part.index)
        sent = tuple(launch for part in received for launch in self._keys(part, touched))
        rest: list[Launch] = []
        for part in self._parts:
            fused = None if part.index else self._fused(part)
            if fused is not None:
                touched.add(part.index)
                rest.append(fused)
                continue
            if not part.index:
                rest += self._keys(part, touched)
            rest += self._queries(part)
        return BackwardLaunches(sent, tuple(rest), frozenset(range(len(self._spec.blocks))) - touched)

    @cached_property
    def keys_dtype(self) -> torch.dtype:
        """Of the first block's dk and dv, which many heads with a stride each may share."""
        of_first = (launch.kernel for launch in self.backward.rest if launch.part.index == 0)
        return self._dtype_of_sum(sum(kernel != "queries" for kernel in of_first))

    @cached_property
    def once(self) -> Launch:
        """The launch that computes what the wide kernels need of the queries that they look at."""
        views = [part.view for part in self._parts if part.index or self._fused(part) is None]
        view = None if None in views else _union(views)
        length = self._q_len if view is None else view.stop - view.start
        sizes = Blocks(max(16, 4096 // self._padded_dim), 16, 4, 1)
        # the band does not matter: compiled once for all
        part = replace(self._parts[0], band=Band(RING, 0, 0), view=view)
        num_tiles = -(-length // sizes.block_m)
        scalars = (Sizes(length, length, self._num_heads, num_tiles, 0), self._scores(part))
        options = self._options(part, sizes, merge=False, shares=1)
        keywords = {"OPTIONS": options, "num_warps": sizes.num_warps}
        return Launch("once", part, num_tiles * self._num_heads, scalars, keywords)

    def _fused(self, part: Part) -> Launch | None:
        """The launch for all gradients of a part; None if its band is too wide for one."""
        if not (part.local and self._alike(part)):
            return None
        band, row_bytes = part.band, self._padded_dim * self._dtype.itemsize
        left, right = (-(-steps // 16) * 16 for steps in (band.left, band.right))
        if left + right <= NARROW and row_bytes <= NARROW_BYTES:
            # margins of whole 16 steps: one kernel for windows from 1 to 16, and aligned tiles
            widened, walk = replace(part, band=replace(band, left=left, right=right)), False
            sizes = self._block_sizes("narrow", widened)
            owned = sizes.block_m - left - right
        elif (band.shifts, right, self._share) == (0, 0, 1) and left <= WALKED and row_bytes <= WALKED_BYTES:
            widened, walk = replace(part, band=replace(band, left=WALKED)), True
            sizes = self._block_sizes("walk", part)
            owned, rows = sizes.block_n, self._batch * self._num_heads
            while owned > 4 * sizes.block_m and -(-self._q_len // owned) * rows < FEW_WALKS:
                owned //= 2
            sizes = replace(sizes, block_n=owned)
        else:
            return None
        num_tiles = self._num_tiles(widened, owned, self._q_len)
        options = self._options(
            widened,
            sizes,
            merge=part != self._parts[0],
            shares=self._share,
            several_parts=self.several_parts,
            walk=walk,
        )
        return self._launch("fused", widened, len(part.block.heads), num_tiles, sizes, options)

    def _keys(self, part: Part, touched: set[int]) -> Iterator[Launch]:
        """The launches for dk and dv of a part's keys; `touched`: the blocks that have some already."""
        sizes, heads = self._block_sizes("keys", part), len(part.block.heads)
        num_tiles = self._num_tiles(part, sizes.block_m, _length(part.keys))
        for first, shares in self._shares(part):
            options = self._options(part, sizes, merge=part.index in touched, shares=shares)
            touched.add(part.index)
            yield self._launch("keys", part, heads, num_tiles, sizes, options, first)

    def _queries(self, part: Part) -> Iterator[Launch]:
        """The launches for dq and the gate's sums that a part's keys give its queries."""
        sizes, merge = self._block_sizes("queries", part), part != self._parts[0]
        num_tiles = self._num_tiles(part, sizes.block_m, _length(part.queries))
        for first, shares in self._shares(part):
            heads = len(part.block.heads) * shares
            options = self._options(part, sizes, merge=merge, shares=shares, several_parts=self.several_parts)
            yield self._launch("queries", part, heads, num_tiles, sizes, options, first)

    def _alike(self, part: Part) -> bool:
        """Whether a program can do all query heads of a key/value head.

        Heads whose skips differ in stride lie in different residue classes: one at a time.
        """
        strides, share = part.strides, self._share
        groups = (strides[first : first + share] for first in range(0, len(strides), share))
        return part.band.kind != SKIP or all(len(set(group)) == 1 for group in groups)

    def _shares(self, part: Part) -> list[tuple[int, int]]:
        """(first, number of) query heads of a key/value head, for each launch of a wide band."""
        return [(0, self._share)] if self._alike(part) else [(first, 1) for first in range(self._share)]

    def _block_sizes(self, kernel: str, part: Part) -> Blocks:
        """Tile sizes of one of the kernels."""
        kind = "far" if part.band.shifts else ("ring", "skip", "near")[part.band.kind]
        return blocks(kernel, kind, part.band.left, self._head_dim, self._dtype.itemsize)

    def _num_tiles(self, part: Part, owned: int, length: int) -> int:
        """Programs a head, each of `owned` slots, for `length` tokens: enough for the head with the most."""
        if part.band.kind == SKIP:
            length = max(min(stride, part.span) * -(-part.span // stride) for stride in set(part.strides))
        return -(-length // owned)

    def _launch(
        self,
        kernel: str,
        part: Part,
        heads: int,
        num_tiles: int,
        sizes: Blocks,
        options: Options,
        *first_share: int,
    ) -> Launch:
        queries, keys = part.queries, part.keys
        arguments = (
            _table(self._spec.pattern.head_strides(self._num_heads), self._device),
            _table(part.block.heads, self._device),
            Sizes(_length(queries), _length(keys), heads, num_tiles, queries.start - keys.start),
            self._scores(part),
            self._dropout._replace(query_start=queries.start, moved=part.moved),
            *first_share,
        )
        keywords = {"OPTIONS": options, **launch_options(sizes)}
        return Launch(kernel, part, num_tiles * heads, arguments, keywords)

    def _scores(self, part: Part) -> Scores:
        pattern, spec = part.pattern, self._spec
        window, stride = min(pattern.window, part.span), part.strides[0]
        return Scores(window, stride, pattern.num_skips, spec.softmax_scale, spec.logit_cap or 0.0)

    def _options(
        self,
        part: Part,
        sizes: Blocks,
        *,
        merge: bool,
        shares: int,
        several_parts: bool = False,
        walk: bool = False,
    ) -> Options:
        band, pattern, spec = part.band, part.pattern, self._spec
        capped = spec.logit_cap is not None
        tile = sizes.block_m + sizes.block_n + band.left + band.right  # more tokens than a tile spans
        tokens = part.span if band.kind == SKIP else tile
        return Options(
            kind=band.kind,
            left=band.left,
            right=band.right,
            halo=sizes.halo,
            walk=walk,
            # fp32 is not for speed, and its products are unrolled: less to compile
            one_stretch=band.kind == SKIP or self._dtype.itemsize == 4,
            long_steps=tokens * self._token_stride >= 2**31,
            shifts=band.shifts,
            causal=pattern.causal,
            include_self=pattern.include_self,
            one_skip=pattern.num_skips == 1,
            uniform=len(set(part.strides)) == 1,
            share=self._share,
            shares=shares,
            has_gate=self._has_gate,
            has_labels=self._has_labels,
            has_cap=capped,
            dropout=spec.dropout_p > 0,
            merge=merge,
            parts=several_parts,
            fixed_top=capped and self._dtype == torch.bfloat16 and spec.logit_cap <= LARGEST_FIXED_TOP,
            fast_log=not INTERPRETED and self._dtype.itemsize == 2,
            heads_first=band.kind != SKIP and band.shifts == 0,  # else a head's far rows stay in the L2 cache
            head_dim=self._head_dim,
            block_d=max(16, self._padded_dim),
            block_m=sizes.block_m,
            block_n=sizes.block_n,
            epsilon=GATE_EPSILON,
        )


def _edge(parts: tuple[Part, ...]) -> slice | None:
    """The queries of the parts that do not cover all, if these come after all others."""
    views = [part.view for part in parts if part.view is not None]
    if not views or any(part.view is None for part in parts[-len(views) :]):
        return None
    return _union(views)


def _union(views: list[slice]) -> slice:
    return slice(min(view.start for view in views), max(view.stop for view in views))


@lru_cache(maxsize=1024)
def plan_of(*arguments: Any) -> LaunchPlan:
    """A `LaunchPlan` with these arguments: one for all calls that are alike."""
    return LaunchPlan(*arguments)


@lru_cache(maxsize=1024)
def _table(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def _length(run: Run) -> int:
    return run.stop - run.start


def _signed(value: int) -> int:
    """The low 32 bits of `value` as a signed integer, so that the kernel's argument type never changes."""
    low = value & 0xFFFFFFFF
    return low - (1 << 32) if low >> 31 else low
