"""`pi-dist bench kernel`: the operator beside its floor and beside other attention kernels, in one run."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from pi_dist.config import UserError
from pi_dist.measure.kernel_peers import FLEX, peers
from pi_dist.measure.profile import OURS
from pi_dist.measure.record import resume, write
from pi_dist.ops.pattern import PiPattern
from pi_dist.ops.spec import AttentionSpec, KeyBlock, Run

TOTAL_TOKENS = 131072  # batch times context of a measurement, more where one context is longer
CONTEXTS = (131072, 8192, 1048576)
PEER_CONTEXTS = (8192, 131072)
HEADS = {64: 12, 128: 8}  # query heads by head_dim, as in models of width 768 and 1024
TILE = 64  # a window costs tensor cores k + 64 pairs a query
SEED = 0  # of all inputs


@dataclass(frozen=True)
class Case:
    """One shape and pattern, in bf16 with a gate; `per_head`: strides π·2^(h mod 8) instead of one π."""

    head_dim: int
    tokens: int
    window: int
    num_skips: int
    per_head: bool = False

    @property
    def batch(self) -> int:
        return max(1, TOTAL_TOKENS // self.tokens)

    @property
    def heads(self) -> int:
        return HEADS[self.head_dim]

    @property
    def pattern(self) -> PiPattern:
        stride = max(16, 2 * self.window)
        strides = tuple(stride << (h % 8) for h in range(self.heads)) if self.per_head else stride
        return PiPattern(self.window, strides, num_skips=self.num_skips)


def cases() -> Iterator[Case]:
    """Every case of the record."""
    for tokens in CONTEXTS:
        for head_dim in HEADS:
            for window in (4, 16, 64, 256, 512):
                for num_skips in (0, 1, 16, 64):
                    for per_head in (False, True) if num_skips else (False,):
                        yield Case(head_dim, tokens, window, num_skips, per_head)


def inputs(case: Case) -> tuple[torch.Tensor, ...]:
    """q, k, v as views of one fused projection, the gate as the model lays it out, dout."""
    shape, heads, dim = (case.batch, case.tokens), case.heads, case.head_dim
    torch.manual_seed(SEED)
    fused = torch.randn(*shape, 3 * heads, dim, dtype=torch.bfloat16, device="cuda")
    q, k, v = fused.split(heads, dim=2)
    gate = torch.rand(case.batch, heads, case.tokens, device="cuda").transpose(1, 2)
    return q, k, v, gate, torch.randn(*shape, heads, dim, dtype=torch.bfloat16, device="cuda")


def timed(function: Callable[[], Any], milliseconds: int = 40) -> float:
    """Median time in ms, by CUDA events, the cache flushed before each."""
    from triton.testing import do_bench

    function()
    torch.cuda.synchronize()
    return do_bench(function, warmup=10, rep=milliseconds, return_mode="median")


def ceilings() -> tuple[float, float]:
    """(copy bandwidth in bytes/s, read and write counted; bf16 matmul rate in FLOP/s on random data)."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda").random_(0, 256)
    target = torch.empty_like(source)
    copy = 2 * source.numel() / timed(lambda: target.copy_(source)) * 1e3
    matrix = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    product = torch.empty_like(matrix)
    return copy, 2 * 8192**3 / timed(lambda: torch.mm(matrix, matrix, out=product)) * 1e3


def floor(case: Case, direction: str, copy: float, matmul: float) -> dict[str, float]:
    """What no kernel with tiles of 64 can beat: bytes, the floor in ms, and what bounds it.

    Bytes: q, k, v, out and the fp32 gate and lse once; backward also dout and the gradients. FLOP: 4·D a pair
    forward, 10·D backward; pairs are skips and the window, which counts k + 64 where it needs tensor cores.
    Exponentials: one a pair, 16 a clock and multiprocessor.
    """
    rows = case.batch * case.tokens * case.heads
    forward = direction == "forward"
    moved = rows * ((4 if forward else 8) * case.head_dim * 2 + (8 if forward else 12))
    pairs = case.window + (TILE if case.window > 16 else 1) + case.num_skips
    flop = rows * pairs * case.head_dim * (4 if forward else 10)
    properties = torch.cuda.get_device_properties(0)
    clock = getattr(properties, "clock_rate", 1.98e6) * 1e3  # Hz
    exponentials = rows * pairs / (properties.multi_processor_count * 16 * clock)
    times = {"bytes": moved / copy, "matmul": flop / matmul, "exponentials": exponentials}
    bound = max(times, key=times.__getitem__)
    return {"bytes": moved, "flop": flop, "floor_ms": times[bound] * 1e3, "bound": bound}


def runner(case: Case, tensors: tuple[torch.Tensor, ...]) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """(forward, backward) of the Triton backend on these tensors."""
    from pi_dist.ops.triton_backend import pi_attention_bwd, pi_attention_fwd

    q, k, v, gate, dout = tensors
    block = KeyBlock(tuple(range(case.heads)), Run(0, case.tokens))
    spec = AttentionSpec(case.pattern, case.heads, (block,), case.head_dim**-0.5, 20.0, 0.0, 0, 0, 0)
    out, lse = pi_attention_fwd(spec, q, [k], [v], gate, None, [None])
    return (
        partial(pi_attention_fwd, spec, q, [k], [v], gate, None, [None]),
        partial(pi_attention_bwd, spec, q, [k], [v], gate, None, [None], out, lse, dout),
    )


def _row(
    case: Case, method: str, direction: str, ms: float | None, copy: float, matmul: float
) -> dict[str, Any]:
    limits = floor(case, direction, copy, matmul)
    row = {
        "method": method,
        "direction": direction,
        "batch": case.batch,
        "tokens": case.tokens,
        "heads": case.heads,
        "head_dim": case.head_dim,
        "window": case.window,
        "strides": "per_head" if case.per_head else "one",
        "num_skips": case.num_skips,
        "dtype": "bfloat16",
        "bytes": limits["bytes"],
        "floor_ms": round(limits["floor_ms"], 4),
        "floor": limits["bound"],
    }
    if ms is None:
        return row | dict.fromkeys(("ms", "times_floor", "copy_share", "matmul_share"))
    return row | {
        "ms": round(ms, 4),
        "times_floor": round(ms / limits["floor_ms"], 3),
        "copy_share": round(limits["bytes"] / copy / ms * 1e3, 4),
        "matmul_share": round(limits["flop"] / matmul / ms * 1e3, 4),
    }


def resources(compiled: Any, limits: Any) -> dict[str, Any]:
    """What a compiled kernel takes of a multiprocessor; spills in bytes a thread, occupancy a share of warps.

    Args:
        limits: the device's properties.
    """
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    registers = -(-compiled.n_regs // 8) * 8 * 32 * warps  # as they are handed out
    most_warps = limits.max_threads_per_multi_processor // 32
    resident = min(
        most_warps // warps,
        limits.regs_per_multiprocessor // registers,
        limits.shared_memory_per_multiprocessor // (shared + 1024),  # of which the driver takes 1024
    )
    return {
        "kernel": compiled.metadata.name.removeprefix("_").removesuffix("_kernel"),
        "warps": warps,
        "registers": compiled.n_regs,
        "spills": compiled.n_spills * 4,
        "shared_bytes": shared,
        "occupancy": round(resident * warps / most_warps, 3),
    }


def launches_of(function: Callable[..., Any]) -> dict[str, list[Any]]:
    """The `resources` of the launches of a call, in order; lists, so that a row stays flat.

    Args:
        function: `pi_attention_fwd` or `_bwd` but for their `run`.
    """
    limits, found = torch.cuda.get_device_properties(0), []

    def run(kernel: Any, programs: int, *arguments: Any, **keywords: Any) -> None:
        found.append(resources(kernel[(programs,)](*arguments, **keywords), limits))

    function(run=run)
    return {name: [launch[name] for launch in found] for name in found[0]}


def _warm_up(case: Case) -> None:
    """Compile the kernels of a case into Triton's cache, in a process of its own."""
    forward, backward = runner(case, inputs(case))
    forward()
    backward()
    torch.cuda.synchronize()


def compile_all(wanted: list[Any], warm_up: Callable[[Any], None]) -> None:
    """Compile for all of `wanted` on all processors; the kernels land in Triton's cache on disk."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, min(28, (os.cpu_count() or 2) - 1)), mp_context=context) as pool:
        list(pool.map(warm_up, wanted))


def peer_cases() -> Iterator[Case]:
    """What other kernels are timed on: windows, the paper's pattern, and windows with many skips."""
    patterns = ((4, 0), (4, 1), (4, 16), (16, 0), (16, 1), (64, 0), (64, 16), (64, 64), (256, 0), (512, 0))
    for head_dim in HEADS:
        for tokens in PEER_CONTEXTS:
            yield from (Case(head_dim, tokens, window, num_skips) for window, num_skips in patterns)


def _measure(case: Case, copy: float, matmul: float) -> Iterator[dict[str, Any]]:
    """Rows of the Triton backend."""
    for direction, function in zip(("forward", "backward"), runner(case, inputs(case)), strict=True):
        yield _row(case, OURS, direction, timed(function), copy, matmul) | launches_of(function)


def _measure_peers(case: Case, copy: float, matmul: float) -> Iterator[dict[str, Any]]:
    """Rows of the other kernels, without a time and with the reason of one that cannot run here."""
    for peer in peers(case.pattern, inputs(case)):
        reason = {}
        try:
            times = [timed(function) for function in peer.setup()]
        except (ImportError, RuntimeError) as error:
            times, reason = [None, None], {"note": str(error).splitlines()[0]}
        for direction, ms in zip(("forward", "backward"), times, strict=True):
            yield _row(case, peer.name, direction, ms, copy, matmul) | reason


def _jobs(
    record: dict[str, Any], head_dims: Sequence[int]
) -> list[tuple[Callable[..., Iterator[dict[str, Any]]], Case]]:
    """What the record does not have yet; the longest context last."""
    done = {_identity(row) for row in record["rows"]}
    jobs = [(_measure, case) for case in cases() if (OURS, "backward", case) not in done]
    jobs += [(_measure_peers, case) for case in peer_cases() if (FLEX, "backward", case) not in done]
    jobs = [(measure, case) for measure, case in jobs if case.head_dim in head_dims]
    return sorted(jobs, key=lambda job: job[1].tokens == max(CONTEXTS))


def bench(path: str, minutes: float = 8.0, head_dims: Sequence[int] = tuple(HEADS)) -> bool:
    """Measure what the record at `path` does not have yet, for about so many minutes; True if all is there.

    Raises:
        UserError: no GPU, an unknown head_dim, or a record of another device or of other versions.
    """
    if not torch.cuda.is_available():
        raise UserError("bench kernel: torch.cuda.is_available() does not hold; kernels are timed on a GPU")
    if not set(head_dims) <= set(HEADS):
        raise UserError(f"bench kernel: head_dim ({head_dims[0]}) in {tuple(HEADS)} does not hold")
    started = time.monotonic()
    settings = {"dtype": "bfloat16", "total_tokens": TOTAL_TOKENS, "gate": True, "logit_cap": 20.0}
    settings["seed"] = SEED
    record = resume(path, settings)
    jobs = _jobs(record, head_dims)
    ours = {replace(case, tokens=16384) for measure, case in jobs if measure is _measure}
    compile_all(sorted(ours, key=str), _warm_up)
    copy, matmul = ceilings()
    ceiling = {"copy_bytes_per_s": round(copy), "matmul_flop_per_s": round(matmul)}
    record["settings"].setdefault("slices", []).append(ceiling)  # a row's shares are of those of its slice
    for measure, case in jobs:
        if time.monotonic() - started > 60 * minutes:
            break
        rows = list(measure(case, copy, matmul))
        record["rows"] += rows
        print("\n".join(map(_line, rows)), flush=True)
        write(record, path)
    left = len(_jobs(record, head_dims))
    print(
        f"{len(record['rows'])} rows in {path}" + (f"; {left} cases are left: run it again" if left else "")
    )
    return left == 0


def _identity(row: dict[str, Any]) -> tuple[str, str, Case]:
    case = Case(row["head_dim"], row["tokens"], row["window"], row["num_skips"], row["strides"] == "per_head")
    return row["method"], row["direction"], case


def _line(row: dict[str, Any]) -> str:
    what = f"{row['method']:<38} {row['direction']:<8} D {row['head_dim']:<3} T {row['tokens']:>7,} "
    what += f"k {row['window']:<3} M {row['num_skips']:<2} {row['strides']:<8}"
    if row["ms"] is None:
        return f"{what} {row['note']}"
    return (
        f"{what} {row['ms']:9.3f} ms  "
        f"{row['times_floor']:6.2f} × floor ({row['floor']}), copy {row['copy_share']:.0%}, "
        f"matmul {row['matmul_share']:.0%}"
    )
