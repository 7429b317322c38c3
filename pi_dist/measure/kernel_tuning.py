"""`pi-dist bench blocks`: times candidates for the kernels' tile sizes, writes the table of the fastest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from pi_dist.config import UserError
from pi_dist.kernels import block_sizes
from pi_dist.kernels.block_sizes import BANDS, Blocks, name
from pi_dist.measure.kernel_bench import HEADS, Case, compile_all, inputs, runner, timed

TOKENS = 131072


@dataclass(frozen=True)
class Trial:
    """One candidate for one entry of the table, and the case that it is timed on."""

    entry: str
    sizes: tuple[int, int, int, int, int, int | None]  # the fields of Blocks
    case: Case
    direction: str


def _candidates(
    kernel: str, band: int, head_dim: int
) -> Iterator[tuple[int, int, int, int, int, int | None]]:
    """Tile sizes worth timing; what does not fit into a multiprocessor is dropped when it fails."""
    wide = head_dim > 64
    if kernel == "narrow":
        yield from ((64, 64, 4, 1, 0, cap) for cap in ((None,) if wide else (None, 168, 160, 128)))
        yield (64, 64, 8, 1, 0, None)
    if kernel == "walk":
        yield from ((64, owned, 4, 2, 0, None) for owned in (512, 1024, 2048))
    if kernel == "fwd" and band <= 64:  # a tile and its halo at once
        yield from (
            (64, 64, 4, 1, max(16, band), cap) for cap in ((None, 128) if wide else (None, 128, 96, 80))
        )
        if wide:
            yield (64, 64, 8, 1, max(16, band), None)
    if kernel in ("keys", "queries") or (kernel == "fwd" and band > 32):  # tile after tile
        for block_n, stages in ((64, 2), (32, 2), (32, 3)):
            yield from ((64, block_n, 4, stages, 0, cap) for cap in ((None,) if wide else (None, 168, 128)))
        if wide:
            yield from ((128, 64, 8, 2, 0, None), (64, 64, 8, 2, 0, None), (64, 32, 8, 2, 0, None))


def trials(head_dim: int) -> list[Trial]:
    """All that there are; entries for windows come first, since patterns with skips use them too."""
    from pi_dist.ops.triton_launches import NARROW, WALKED, WALKED_BYTES

    timed_on = [("ring", band, Case(head_dim, TOKENS, band, 0)) for band in BANDS]
    timed_on += [
        ("near", 16, Case(head_dim, TOKENS, 4, 1)),
        ("near", 32, Case(head_dim, TOKENS, 16, 1)),
        ("far", 16, Case(head_dim, TOKENS, 4, 1, per_head=True)),
        ("far", 64, Case(head_dim, TOKENS, 64, 1)),
        ("far", 512, Case(head_dim, TOKENS, 512, 1)),
        ("skip", 16, Case(head_dim, TOKENS, 64, 16)),
        ("skip", 64, Case(head_dim, TOKENS, 64, 64)),
    ]
    found = []
    for kind, band, case in timed_on:
        walks = band <= WALKED and kind != "far" and 2 * head_dim <= WALKED_BYTES
        backward = ("narrow",) if band <= NARROW else ("walk",) if walks else ("keys", "queries")
        for kernel in ("fwd", *backward):
            entry = name(kernel, kind, band, head_dim)
            direction = "forward" if kernel == "fwd" else "backward"
            found += [Trial(entry, sizes, case, direction) for sizes in _candidates(kernel, band, head_dim)]
    return found


def use(entry: str, sizes: Blocks) -> None:
    """Let every launch from here on take these sizes for an entry of the table."""
    from pi_dist.ops.triton_launches import plan_of

    block_sizes.table()[entry] = sizes
    block_sizes.blocks.cache_clear()
    plan_of.cache_clear()


def _warm_up(trial: Trial) -> None:
    use(trial.entry, Blocks(*trial.sizes))
    small = replace(trial.case, tokens=16384)
    try:
        forward, backward = runner(small, inputs(small))
        backward() if trial.direction == "backward" else forward()
        torch.cuda.synchronize()
    except Exception as error:  # it is tried again, and reported, where it is timed
        print(f"{trial.entry} {trial.sizes}: {type(error).__name__}")


def tune(head_dim: int, entries: Sequence[str] | None = None, path: str | None = None) -> None:
    """Time the candidates for a head_dim on this GPU, of these entries or all.

    The table with the fastest is written to `path`, or where it lies.

    Raises:
        UserError: no GPU, or an entry that there is not.
    """
    from triton import OutOfResources
    from triton.runtime.errors import PTXASError

    if not torch.cuda.is_available():
        raise UserError(
            "bench blocks: torch.cuda.is_available() does not hold; tile sizes are timed on a GPU"
        )
    if head_dim not in HEADS:
        raise UserError(f"bench blocks: head_dim ({head_dim}) in {tuple(HEADS)} does not hold")
    wanted = [trial for trial in trials(head_dim) if entries is None or trial.entry in entries]
    if unknown := set(entries or ()) - {trial.entry for trial in wanted}:
        raise UserError(f"bench blocks: entries ({', '.join(unknown)}) of head_dim {head_dim} does not hold")
    compile_all(wanted, _warm_up)
    best: dict[str, tuple[float, Trial]] = {}
    tensors, current = None, None
    for trial in wanted:
        before = block_sizes.table()[trial.entry]
        if trial.case != current:
            tensors, current = None, trial.case
            tensors = inputs(trial.case)
        use(trial.entry, Blocks(*trial.sizes))
        try:
            forward, backward = runner(trial.case, tensors)
            ms = timed(backward if trial.direction == "backward" else forward, 40)
        except (OutOfResources, PTXASError) as error:
            print(f"{trial.entry:<20} {trial.sizes}: does not fit ({type(error).__name__})")
            ms = float("inf")
        else:
            print(f"{trial.entry:<20} {trial.sizes!s:<32} {ms:8.3f} ms", flush=True)
        if ms < best.get(trial.entry, (float("inf"), trial))[0]:
            best[trial.entry] = (ms, trial)
        chosen = best.get(trial.entry)
        use(trial.entry, Blocks(*chosen[1].sizes) if chosen else before)
    target = path or str(block_sizes.TABLE)
    block_sizes.save(block_sizes.table(), target)
    print(f"{len(best)} entries of {len(block_sizes.table())} timed anew, written to {target}")
