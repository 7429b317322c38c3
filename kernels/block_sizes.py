"""Tile sizes of the kernels, looked up here.

`pi-dist bench blocks` measures every entry of the table. What has none takes that of a wider band; heads
wider than 128, and fp32, sizes that fit.
"""

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

TABLE = Path(__file__).with_name("block_sizes.json")
KERNELS = ("fwd", "keys", "queries", "narrow", "walk")
KINDS = ("ring", "near", "far", "skip")  # window; near skips in its band; far ones beside it; skips alone
FP32_WARPS = 16
BANDS = (16, 32, 64, 512)  # steps; a wider band uses the last


@dataclass(frozen=True)
class Blocks:
    """block_m: rows of a program; block_n: rows of the other side at a time; halo: see `tiles.Options`.

    Of a walk: block_m rows at a time, block_n in all.

    max_registers: of a thread, so that more programs fit on a multiprocessor; None leaves it to the compiler.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    halo: int = 0
    max_registers: int | None = None


@lru_cache
def table() -> dict[str, Blocks]:
    """Every entry, by `key`."""
    entries = json.loads(TABLE.read_text("utf-8"))
    return {key: Blocks(**entry) for key, entry in entries.items()}


def name(kernel: str, kind: str, size: int, head_dim: int) -> str:
    """Of the entry for a size of BANDS and head_dim up to 128: `fwd.ring.64.512`."""
    return f"{kernel}.{kind}.{64 if head_dim <= 64 else 128}.{size}"


def key(kernel: str, kind: str, band: int, head_dim: int) -> str:
    """Name of the entry that a band uses: the least of its kind, or else of a window, that is as wide."""
    sizes = [size for size in BANDS if min(band, BANDS[-1]) <= size]
    names = (name(kernel, of_kind, size, head_dim) for of_kind in (kind, "ring") for size in sizes)
    return next(found for found in names if found in table())


@lru_cache(maxsize=1024)
def blocks(kernel: str, kind: str, band: int, head_dim: int, element_bytes: int) -> Blocks:
    """Tile sizes for 16-bit elements as measured, and smaller ones for fp32, which needs twice the room.

    fp32 products are unrolled over a thread's elements: many warps make a third of the code to compile.
    """
    if head_dim > 128:
        entry = Blocks(64, 64 if kernel == "narrow" else 32, 8, 1)
    else:
        entry = table()[key(kernel, kind, band, head_dim)]
    if element_bytes == 2:
        return entry
    small = 64 if head_dim <= 64 else 32
    if kernel in ("narrow", "walk"):  # a tile of 64 holds the widest band
        return Blocks(64, entry.block_n, FP32_WARPS, 1)
    return Blocks(small, 32, FP32_WARPS, 1, entry.halo if head_dim <= 64 else 0)


def save(entries: dict[str, Blocks], path: str | Path = TABLE) -> None:
    """Write a table."""
    lines = [f"  {json.dumps(name)}: {json.dumps(asdict(entry))}" for name, entry in sorted(entries.items())]
    Path(path).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def launch_options(sizes: Blocks) -> dict[str, int]:
    """Keyword arguments of a launch."""
    options = {"num_warps": sizes.num_warps, "num_stages": sizes.num_stages}
    return options if sizes.max_registers is None else {**options, "maxnreg": sizes.max_registers}
