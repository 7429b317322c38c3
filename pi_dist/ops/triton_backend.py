"""The Triton kernels as a backend: the launches of a call, planned once for all that are alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property, lru_cache, wraps
from typing import Any, NamedTuple

import torch
import triton

from pi_dist.kernels.block_sizes import Blocks, blocks, launch_options
from pi_dist.kernels.pi_attention_bwd import _keys_kernel, _queries_kernel, _queries_once_kernel
from pi_dist.kernels.pi_attention_bwd_fused import _fused_kernel
from pi_dist.kernels.pi_attention_fwd import _pi_attention_fwd_kernel
from pi_dist.kernels.tiles import Dropout, Options, Rows, Scores, Sizes
from pi_dist.ops.spec import GATE_EPSILON, AttentionSpec, Run, nothing_arrives, nothing_to_send
from pi_dist.ops.triton_bands import RING, SKIP, Band, Part, parts_of

# decided when a kernel is decorated; asked here, since torch.compile cannot look at a kernel's type
INTERPRETED = not isinstance(_pi_attention_fwd_kernel, triton.runtime.jit.JITFunction)
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


@lru_cache(maxsize=1024)
def _table(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def _rows(tensor: torch.Tensor) -> Rows:
    """A [B, T, H, D], [B, T, H] or [B, T] tensor as the kernels take it."""
    strides = tensor.stride()
    return Rows(tensor, strides[0], strides[1], strides[2] if len(strides) > 2 else 0)


def _dense_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself unless its last dimension is strided."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _length(run: Run) -> int:
    return run.stop - run.start


def _signed(value: int) -> int:
    """The low 32 bits of `value` as a signed integer, so that the kernel's argument type never changes."""
    low = value & 0xFFFFFFFF
    return low - (1 << 32) if low >> 31 else low


class _Step(NamedTuple):
    """A launch but for its tensors.

    programs: of a batch row. rest: the arguments that follow the tensors. keywords: of the launch.
    """

    kernel: str
    part: Part
    programs: int
    rest: tuple[Any, ...]
    keywords: dict[str, Any]


class _Launch:
    """The launches of calls that are alike: planned once, and then only given their tensors.

    Args:
        shape: of q. device: of the tensors. token_stride: the most elements between tokens of a tensor.
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
        self.spec, self.device = spec, device
        self.has_gate, self.has_labels, self.token_stride = has_gate, has_labels, token_stride
        self.batch, self.q_len, self.num_heads, self.head_dim = shape
        self.share = self.num_heads // spec.num_kv_heads
        self.padded_dim = 1 << (self.head_dim - 1).bit_length()  # a power of two
        self.element_bytes = dtype.itemsize
        self.dropout = Dropout(
            _signed(spec.seed),
            _signed(spec.seed >> 32),
            spec.row_start,
            spec.query_start,
            _signed(min(round(spec.dropout_p * 2**32), 2**32 - 1)),
            1 / (1 - spec.dropout_p),
        )
        self.fixed_top = (
            dtype == torch.bfloat16 and spec.logit_cap is not None and spec.logit_cap <= LARGEST_FIXED_TOP
        )
        self.fast_log = not INTERPRETED and self.element_bytes == 2
        self.strides = spec.pattern.head_strides(self.num_heads)
        self.parts = parts_of(spec, self.num_heads, self.q_len)
        self.dtype = dtype
        self.sum_dtype = self._dtype_of_sum(len(self.parts))  # of out and dq

    def _dtype_of_sum(self, launches: int) -> torch.dtype:
        """What so many launches add to: 16 bits would be rounded as often."""
        return self.dtype if launches <= 2 else torch.float32

    @cached_property
    def forward(self) -> tuple[_Step, ...]:
        """The launches of a forward call, in order."""
        steps = []
        for part in self.parts:
            sizes, heads = self.block_sizes("fwd", part), len(part.block.heads) * self.share
            options = self.options(part, sizes, merge=bool(steps), shares=self.share)
            num_tiles = self.num_tiles(part, sizes.block_m, _length(part.queries))
            steps.append(self._step("fwd", part, heads, num_tiles, options, sizes))
        return tuple(steps)

    @cached_property
    def backward(self) -> tuple[tuple[_Step, ...], tuple[_Step, ...], frozenset[int]]:
        """The launches for gradients that travel, those for the rest, and the blocks that no query sees.

        The first part's, of the first block, store what others add to.
        """
        touched: set[int] = set()
        sent = tuple(step for part in self.parts if part.index for step in self._keys_of(part, touched))
        rest: list[_Step] = []
        for part in self.parts:
            fused = None if part.index else self._fused(part)
            if fused is not None:
                touched.add(0)
                rest.append(fused)
                continue
            if not part.index:
                rest += self._keys_of(part, touched)
            rest += self._queries_of(part)
        return sent, tuple(rest), frozenset(range(len(self.spec.blocks))) - touched

    @cached_property
    def keys_dtype(self) -> torch.dtype:
        """Of the first block's dk and dv, which many heads with a stride each may share."""
        return self._dtype_of_sum(
            sum(step.part.index == 0 and step.kernel != "queries" for step in self.backward[1])
        )

    @cached_property
    def once(self) -> _Step:
        """The launch that computes what the wide kernels need of queries."""
        sizes = Blocks(max(16, 4096 // self.padded_dim), 16, 4, 1)
        # the band does not matter: compiled once for all
        part = replace(self.parts[0], band=Band(RING, 0, 0))
        options = self.options(part, sizes, merge=False, shares=1)
        num_tiles = -(-self.q_len // sizes.block_m)
        scalars = (Sizes(self.q_len, self.q_len, self.num_heads, num_tiles, 0), self.scores(part))
        keywords = {"OPTIONS": options, "num_warps": sizes.num_warps}
        return _Step("once", part, num_tiles * self.num_heads, scalars, keywords)

    def _step(
        self,
        kernel: str,
        part: Part,
        heads: int,
        num_tiles: int,
        options: Options,
        sizes: Blocks,
        first_share: tuple[int, ...] = (),
    ) -> _Step:
        queries, keys = part.queries, part.block.run
        tables = (_table(values, self.device) for values in (self.strides, part.block.heads))
        scalars = (
            Sizes(_length(queries), _length(keys), heads, num_tiles, queries.start - keys.start),
            self.scores(part),
            self.dropout._replace(query_start=queries.start),
        )
        return _Step(
            kernel,
            part,
            num_tiles * heads,
            (*tables, *scalars, *first_share),
            {"OPTIONS": options, **launch_options(sizes)},
        )

    def _fused(self, part: Part) -> _Step | None:
        """The launch for all gradients of a part, if one can be."""
        if not (part.local and self.alike(part)):
            return None
        fused = _fused(self, part)
        if fused is None:
            return None
        merge = part != self.parts[0]
        part, sizes, owned, walk = fused
        num_tiles = self.num_tiles(part, owned, self.q_len)
        options = self.options(
            part, sizes, merge=merge, shares=self.share, parts=len(self.parts) > 1, walk=walk
        )
        return self._step("fused", part, self.spec.num_kv_heads, num_tiles, options, sizes)

    def _keys_of(self, part: Part, touched: set[int]) -> Iterator[_Step]:
        """The launches for dk and dv of a part's keys; `touched`: the blocks that have some already."""
        sizes, heads = self.block_sizes("keys", part), len(part.block.heads)
        num_tiles = self.num_tiles(part, sizes.block_m, _length(part.block.run))
        for first_share, shares in self.shares(part):
            options = self.options(part, sizes, merge=part.index in touched, shares=shares)
            touched.add(part.index)
            yield self._step("keys", part, heads, num_tiles, options, sizes, (first_share,))

    def _queries_of(self, part: Part) -> Iterator[_Step]:
        """The launches for dq and the gate's sums that a part's keys give its queries."""
        sizes, several = self.block_sizes("queries", part), len(self.parts) > 1
        num_tiles = self.num_tiles(part, sizes.block_m, _length(part.queries))
        for first_share, shares in self.shares(part):
            heads, merge = len(part.block.heads) * shares, part != self.parts[0]
            options = self.options(part, sizes, merge=merge, shares=shares, parts=several)
            yield self._step("queries", part, heads, num_tiles, options, sizes, (first_share,))

    def alike(self, part: Part) -> bool:
        """Whether a program can do all query heads of a key/value head.

        Heads whose skips differ in stride lie in different residue classes: one at a time.
        """
        strides, share = part.strides, self.share
        groups = (strides[first : first + share] for first in range(0, len(strides), share))
        return part.band.kind != SKIP or all(len(set(group)) == 1 for group in groups)

    def shares(self, part: Part) -> list[tuple[int, int]]:
        """(first, number of) query heads of a key/value head, for each launch of a wide band."""
        return [(0, self.share)] if self.alike(part) else [(first, 1) for first in range(self.share)]

    def scores(self, part: Part) -> Scores:
        pattern, spec = self.spec.pattern, self.spec
        window, stride = min(pattern.window, part.span), part.strides[0]
        return Scores(window, stride, pattern.num_skips, spec.softmax_scale, spec.logit_cap or 0.0)

    def options(
        self,
        part: Part,
        sizes: Blocks,
        *,
        merge: bool,
        shares: int,
        parts: bool = False,
        walk: bool = False,
    ) -> Options:
        band, pattern, spec = part.band, self.spec.pattern, self.spec
        tile = sizes.block_m + sizes.block_n + band.left + band.right  # more tokens than a tile spans
        tokens = part.span if band.kind == SKIP else tile
        return Options(
            kind=band.kind,
            left=band.left,
            right=band.right,
            halo=sizes.halo,
            walk=walk,
            # fp32 is not for speed, and its products are unrolled: less to compile
            one_stretch=band.kind == SKIP or self.element_bytes == 4,
            long_steps=tokens * self.token_stride >= 2**31,
            shifts=band.shifts,
            causal=pattern.causal,
            include_self=pattern.include_self,
            one_skip=pattern.num_skips == 1,
            uniform=len(set(part.strides)) == 1,
            share=self.share,
            shares=shares,
            has_gate=self.has_gate,
            has_labels=self.has_labels,
            has_cap=spec.logit_cap is not None,
            dropout=spec.dropout_p > 0,
            merge=merge,
            parts=parts,
            fixed_top=self.fixed_top,
            fast_log=self.fast_log,
            heads_first=band.kind != SKIP and band.shifts == 0,  # else a head's far rows stay in the L2 cache
            head_dim=self.head_dim,
            block_d=max(16, self.padded_dim),
            block_m=sizes.block_m,
            block_n=sizes.block_n,
            epsilon=GATE_EPSILON,
        )

    def block_sizes(self, kernel: str, part: Part) -> Blocks:
        """Tile sizes of one of the kernels."""
        band = part.band
        kind = "far" if band.shifts else ("ring", "skip", "near")[band.kind]
        return blocks(kernel, kind, band.left, self.head_dim, self.element_bytes)

    def num_tiles(self, part: Part, owned: int, length: int) -> int:
        """Programs a head, each of `owned` slots, for `length` tokens: enough for the head with the most."""
        if part.band.kind != SKIP:
            return -(-length // owned)
        slots = max(min(stride, part.span) * -(-part.span // stride) for stride in set(part.strides))
        return -(-slots // owned)


@lru_cache(maxsize=1024)
def _launch_of(*arguments: Any) -> _Launch:
    """A `_Launch` with these arguments."""
    return _Launch(*arguments)


def _run(kernel: Any, programs: int, *arguments: Any, **keywords: Any) -> None:
    """Launch a kernel."""
    kernel[(programs,)](*arguments, **keywords)


def _on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Launch on the GPU that holds q, whichever is current."""

    @wraps(function)
    def on_its_device(spec, q, *arguments, **keywords):
        if not q.is_cuda or q.device.index == torch.cuda.current_device():
            return function(spec, q, *arguments, **keywords)
        with torch.cuda.device(q.device):
            return function(spec, q, *arguments, **keywords)

    return on_its_device


class _Tensors:
    """The tensors of one call by their names in the kernels; an absent one becomes any pointer."""

    def __init__(self, q: torch.Tensor, **others: torch.Tensor | None) -> None:
        self._all = {"q": q, **others}
        self._absent = Rows(q, 0, 0, 0)
        self._rows = {name: self._absent if x is None else _rows(x) for name, x in self._all.items()}

    def add(self, **others: torch.Tensor | None) -> None:
        """Tensors that come later."""
        self._all |= others
        self._rows |= {name: self._absent if x is None else _rows(x) for name, x in others.items()}

    def token_stride(self) -> int:
        """The most elements between two tokens."""
        return max(rows.token for rows in self._rows.values())

    def of(self, step: _Step, *names: str) -> list[Rows]:
        """What belongs to the queries of a step."""
        rows = step.part.rows
        if rows is None:
            return [self._rows[name] for name in names]
        seen = (self._all[name] for name in names)
        return [self._absent if x is None else _rows(x[:, rows]) for x in seen]


def _launch_for(
    spec: AttentionSpec, q: torch.Tensor, gate: torch.Tensor | None, labels: torch.Tensor | None, stride: int
) -> _Launch:
    """What is planned for a call; `stride`: the most elements between two tokens."""
    stride = max(stride, q.shape[2] * q.shape[3])
    return _launch_of(spec, q.shape, q.dtype, q.device, gate is not None, labels is not None, stride)


@_on_its_device
def pi_attention_fwd(
    spec, q, keys, values, gate, q_labels, k_labels, arrive=nothing_arrives, run=_run
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `pi_dist.ops.reference.pi_attention_fwd`; lse is fp32. The first block holds all heads.

    Waits for the other blocks after the launches that need none of them.
    """
    q, keys, values = _dense_rows(q), [_dense_rows(keys[0])], [_dense_rows(values[0])]
    gate = None if gate is None else gate.float()
    tensors = _Tensors(q, gate=gate, q_labels=q_labels)
    pairs = [(_rows(keys[0]), _rows(values[0]))]
    stride = max(tensors.token_stride(), *(rows.token for rows in pairs[0]))
    launch = _launch_for(spec, q, gate, q_labels, stride)
    batch, q_len, num_heads, _ = q.shape
    out = torch.empty(q.shape, dtype=launch.sum_dtype, device=q.device)
    lse = torch.empty((batch, num_heads, q_len), dtype=torch.float32, device=q.device).transpose(1, 2)
    tensors.add(out=out, lse=lse)
    absent = Rows(q, 0, 0, 0)
    for step in launch.forward:
        index = step.part.index
        if index and len(pairs) == 1:
            pairs += [(_rows(k), _rows(v)) for k, v in zip(*arrive(), strict=True)]
        labels = k_labels[index]
        mine, of_gate, my_labels, *results = tensors.of(step, "q", "gate", "q_labels", "out", "lse")
        run(
            _pi_attention_fwd_kernel, step.programs * batch, mine, *pairs[index], of_gate, my_labels,
            absent if labels is None else _rows(labels), *results, *step.rest, **step.keywords,
        )  # fmt: skip
    return out.to(q.dtype), lse


@_on_its_device
def pi_attention_bwd(
    spec, q, keys, values, gate, q_labels, k_labels, out, lse, dout, send_back=nothing_to_send, run=_run
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """As `pi_dist.ops.reference.pi_attention_bwd`, but for the dtype of gradients.

    Those of q and of the first block are in q's, those of other blocks, which travel to their owners, fp32.
    They are computed before the rest, so as to travel meanwhile.
    """
    call = _Backward(spec, q, keys, values, gate, q_labels, k_labels, out, lse, dout, run)
    sent, rest, unseen = call.launch.backward
    for step in sent:
        call.run(step)
    for index in unseen:
        call.dkeys[index].zero_()
        call.dvalues[index].zero_()
    send_back(call.dkeys[1:], call.dvalues[1:])
    for step in rest:
        call.run(step)
    dq, dk, dv = (x.to(q.dtype) for x in (call.dq, call.dkeys[0], call.dvalues[0]))
    return dq, dk, dv, call.gradient_of_gate()


class _Backward:
    """The tensors of one backward call, and its launches."""

    def __init__(self, spec, q, keys, values, gate, q_labels, k_labels, out, lse, dout, run) -> None:
        q, gate = _dense_rows(q), None if gate is None else gate.float()
        self._run, self.batch, self.absent = run, q.shape[0], Rows(q, 0, 0, 0)
        self.tensors = _Tensors(q, dout=_dense_rows(dout), gate=gate, q_labels=q_labels)
        self.pairs = [
            (_rows(_dense_rows(k)), _rows(_dense_rows(v))) for k, v in zip(keys, values, strict=True)
        ]
        self.k_labels = [self.absent if labels is None else _rows(labels) for labels in k_labels]
        strides = (rows.token for pair in self.pairs for rows in pair)
        stride = max(self.tensors.token_stride(), *strides)
        self.launch = _launch_for(spec, q, gate, q_labels, stride)
        self.dkeys, self.dvalues = (
            [
                torch.empty(
                    x.shape, dtype=torch.float32 if index else self.launch.keys_dtype, device=q.device
                )
                for index, x in enumerate(tensors)
            ]
            for tensors in (keys, values)
        )
        self.dq = torch.empty(q.shape, dtype=self.launch.sum_dtype, device=q.device)
        # laid out as the gate; where several launches make it, in three summands
        self.apart = gate is not None and len(self.launch.parts) > 1
        self.dgate = None if gate is None else torch.empty_like(gate)
        self.weight, self.residual = (
            torch.empty_like(self.dgate) if self.apart else self.dgate for _ in range(2)
        )
        self.tensors.add(
            out=out, lse=lse, dq=self.dq, dgate=self.dgate, weight=self.weight, residual=self.residual
        )
        self._has_once = False

    def once(self) -> None:
        """Compute delta, and of a gate log2 α and log2(1-α), of all queries: [B, T, H] fp32, heads apart."""
        if self._has_once:
            return
        self._has_once = True
        launch = self.launch
        shape = (3 if launch.has_gate else 1, self.batch, launch.num_heads, launch.q_len)
        of_queries = torch.empty(shape, dtype=torch.float32, device=launch.device).transpose(2, 3).unbind()
        names = ("delta", "log_ring", "log_skip")
        self.tensors.add(**dict.fromkeys(names) | dict(zip(names, of_queries, strict=False)))
        step = launch.once
        tensors = self.tensors.of(step, "out", "dout", "gate", *names)
        self._run(_queries_once_kernel, step.programs * self.batch, *tensors, *step.rest, **step.keywords)

    def run(self, step: _Step) -> None:
        """Launch a step."""
        index, seen = step.part.index, self.tensors.of
        pair, k_labels = self.pairs[index], self.k_labels[index]
        match step.kernel:
            case "fused":
                kernel = _fused_kernel
                mine, *others = seen(step, "q", "gate", "q_labels")
                of_queries = seen(step, "out", "lse", "dout", "dq")
                own = [_rows(self.dkeys[0]), _rows(self.dvalues[0])]
                tensors = [mine, *pair, *others, k_labels, *of_queries, *own]
                tensors += seen(step, "dgate", "weight", "residual")
            case "keys":
                kernel = _keys_kernel
                self.once()
                mine, labels, *others = seen(
                    step, "q", "q_labels", "delta", "lse", "dout", "log_ring", "log_skip"
                )
                own = [_rows(self.dkeys[index]), _rows(self.dvalues[index])]
                tensors = [mine, *pair, labels, k_labels, *others, *own]
            case "queries":
                kernel = _queries_kernel
                self.once()
                mine, labels, *others = seen(
                    step, "q", "q_labels", "delta", "lse", "dout", "gate", "dq", "dgate", "weight", "residual"
                )
                tensors = [mine, *pair, labels, k_labels, *others]
        self._run(kernel, step.programs * self.batch, *tensors, *step.rest, **step.keywords)

    def gradient_of_gate(self) -> torch.Tensor | None:
        """dα, put together if several launches made it, see `store_gate`."""
        return self.dgate.addcmul_(self.residual, self.weight, value=-1) if self.apart else self.dgate


def _fused(launch: _Launch, part: Part) -> tuple[Part, Blocks, int, bool] | None:
    """A fused backward's part, tile sizes, tokens a program, and whether it walks; None if it is too wide."""
    band = part.band
    left, right = (-(-steps // 16) * 16 for steps in (band.left, band.right))
    row_bytes = launch.padded_dim * launch.element_bytes
    if left + right <= NARROW and row_bytes <= NARROW_BYTES:
        # margins of whole 16 steps: one kernel for windows from 1 to 16, and aligned tiles
        part = replace(part, band=replace(band, left=left, right=right))
        sizes = launch.block_sizes("narrow", part)
        return part, sizes, sizes.block_m - left - right, False
    walks = (band.shifts, right, launch.share) == (0, 0, 1) and left <= WALKED
    if walks and row_bytes <= WALKED_BYTES:
        sizes = launch.block_sizes("walk", part)
        owned, rows = sizes.block_n, launch.batch * launch.num_heads
        while owned > 4 * sizes.block_m and -(-launch.q_len // owned) * rows < FEW_WALKS:
            owned //= 2
        part = replace(part, band=replace(band, left=WALKED))
        return part, replace(sizes, block_n=owned), owned, True
    return None
