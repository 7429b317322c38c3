"""What a kind of GPU and a network do, in numbers with their sources: the constants of the cost model."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pi_dist.config import UserError

_FOLDER = Path(__file__).parent / "profiles"
_MAY_BE_ZERO = ("overhead_mib", "block_moves", "gpu_layer_us", "host_layer_us", "block_copies", "fixed_mib",
                "window", "num_skips")  # fmt: skip


@dataclass(frozen=True)
class AttentionCost:
    """Time of our kernels, ns per token and head of 64 elements; it grows with head_dim."""

    window: int
    num_skips: int
    forward_ns: float
    backward_ns: float


OURS = "pi, triton"  # our attention kernels, in the record of `pi-dist bench kernel`

# Of what the allocator may reserve, that which is predicted to be lost between tensors: of 76.7 GiB of an
# H100, steps that needed 69.3 at their peak ran, and those of 73.3 and more did not.
FRAGMENTS = 0.06


@dataclass(frozen=True)
class Profile:
    """A GPU. Every number has a line in `sources`: the record that it was fitted to, or a data sheet.

    Attributes:
        device: start of the name that the driver gives to such a GPU.
        memory_mib: of the card. overhead_mib: of it, what no allocator gets: context and NCCL.
        copy_bytes_per_s, matmul_flops_per_s: ceilings, read + write, dense bf16.
        matmul_share: of the ceiling that the model's matrices reach.
        block_moves: how often a block reads or writes d elements of a token beside matrices and attention,
            forward, recomputation and backward together.
        gpu_layer_us: that a block takes on the GPU whatever its tokens, for its kernels begin and end.
        host_layer_us: of the host, to launch a block. Both: forward, recomputation and backward together.
        exact_forward_flops_per_s, exact_backward_flops_per_s: of the exact methods' flash attention.
        block_copies: tensors of [tokens, d] in the model's dtype that live while a block is recomputed and
            differentiated, its input not counted.
        fixed_mib: what a step holds whatever its tokens, beyond what the memory model counts.
        attention: by window and skips.
    """

    name: str
    device: str
    memory_mib: float
    overhead_mib: float
    copy_bytes_per_s: float
    matmul_flops_per_s: float
    matmul_share: float
    block_moves: float
    gpu_layer_us: float
    host_layer_us: float
    exact_forward_flops_per_s: float
    exact_backward_flops_per_s: float
    block_copies: float
    fixed_mib: float
    attention: tuple[AttentionCost, ...]
    sources: dict[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The name, and whether no such GPU was measured."""
        by_sheet = "data sheet" in self.sources.get("copy_bytes_per_s", "")
        return f"{self.name} (by its data sheet)" if by_sheet else self.name

    @property
    def usable_mib(self) -> float:
        """Memory that may be reserved for tensors."""
        return self.memory_mib - self.overhead_mib

    @property
    def tensors_mib(self) -> float:
        """Memory that tensors may take together, by prediction."""
        return self.usable_mib * (1 - FRAGMENTS)

    def attention_cost(self, window: int, num_skips: int) -> AttentionCost:
        """The cheapest entry that has at least this window and these skips.

        Beyond the table: that of its widest or most, in proportion to the neighbours that it lacks.
        """
        widest, most = max(a.window for a in self.attention), max(a.num_skips for a in self.attention)
        enough = [
            a
            for a in self.attention
            if a.window >= min(window, widest) and a.num_skips >= min(num_skips, most)
        ]
        best = min(enough or self.attention[-1:], key=lambda a: a.forward_ns + a.backward_ns)
        times = max(1.0, window / widest if widest else 1.0, num_skips / most if most else 1.0)
        return AttentionCost(window, num_skips, times * best.forward_ns, times * best.backward_ns)


@dataclass(frozen=True)
class Network:
    """What joins the GPUs of a job. Rates are one way, in bytes/s; latencies of a message, s.

    Attributes:
        node_bytes_per_s: of a GPU, within a node.
        fabric_bytes_per_s: of an adapter, between nodes; each node has `adapters_per_node`.
    """

    gpus_per_node: int = 8
    node_bytes_per_s: float = 296e9
    node_latency_s: float = 40e-6
    fabric_bytes_per_s: float = 40e9
    fabric_latency_s: float = 60e-6
    adapters_per_node: int = 8

    def of(self, num_ranks: int, all_at_once: bool = False) -> tuple[float, float]:
        """(bytes/s of a rank, latency) among so many ranks: the slowest link sets the pace.

        Of neighbours, as in a ring, one on each side of a node sends through an adapter; all_at_once: all do.
        """
        if num_ranks <= self.gpus_per_node:
            return self.node_bytes_per_s, self.node_latency_s
        share = min(1.0, self.adapters_per_node / self.gpus_per_node) if all_at_once else 1.0
        return self.fabric_bytes_per_s * share, self.fabric_latency_s

    def of_collective(self, num_ranks: int) -> tuple[float, float]:
        """(bytes/s of a rank, latency) of NCCL's own rings, one of which goes through each adapter."""
        if num_ranks <= self.gpus_per_node:
            return self.node_bytes_per_s, self.node_latency_s
        rings = min(self.adapters_per_node, self.gpus_per_node)
        return min(self.node_bytes_per_s, rings * self.fabric_bytes_per_s), self.fabric_latency_s


NETWORKS = {
    # within a node: K+V of 65,536 tokens of d = 768 took 680 µs on two H200 (NVLink), of 4 to 256 tokens
    # 27 to 67 µs; between nodes: data sheets, at 80 % of the line, of one adapter a GPU (InfiniBand NDR) or
    # one of 100 Gbit/s for a node
    "infiniband": Network(),
    "ethernet": Network(fabric_bytes_per_s=10e9, fabric_latency_s=150e-6, adapters_per_node=1),
}


def attention_costs(kernel_record: dict) -> tuple[AttentionCost, ...]:
    """The costs in a record of `pi-dist bench kernel`, head_dim 64, one stride, 131,072 tokens."""
    found: dict[tuple[int, int], dict[str, float]] = {}
    for row in kernel_record["rows"]:
        if (row["method"], row["head_dim"], row["strides"], row["tokens"]) == (OURS, 64, "one", 131072):
            per_token = 1e6 * row["ms"] / (row["batch"] * row["tokens"] * row["heads"])
            found.setdefault((row["window"], row["num_skips"]), {})[row["direction"]] = round(per_token, 5)
    return tuple(
        AttentionCost(*key, ways["forward"], ways["backward"]) for key, ways in sorted(found.items())
    )


def profile_names() -> list[str]:
    """GPUs that ship with the package."""
    return sorted(path.stem.upper() for path in _FOLDER.glob("*.json"))


def profile_from(values: dict[str, Any]) -> Profile:
    """A profile from what `asdict` made of it, and JSON of that.

    Raises:
        TypeError, KeyError or AttributeError: the values are not those of a profile.
    """
    costs = tuple(AttentionCost(**cost) for cost in values["attention"])
    profile = Profile(**values | {"attention": costs})
    parts = [constants(profile), *map(asdict, costs)]
    numbers = [item for part in parts for item in part.items()]
    for name, value in numbers:
        least = 0 if name in _MAY_BE_ZERO else math.ulp(0.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
            raise TypeError(f"{name} ({value!r}) {'>= 0' if least == 0 else '> 0'} does not hold")
    if not costs:
        raise TypeError("attention: entries (0) >= 1 does not hold")
    return profile


def load_profile(name: str) -> Profile:
    """A profile that ships (H100, …), or one that `pi-dist calibrate` wrote to a file of this name.

    Raises:
        UserError: there is neither, or the file is no profile.
    """
    path = _FOLDER / f"{name.lower()}.json"
    if not path.exists():
        path = Path(name)
    if not path.is_file():
        raise UserError(f"gpu: {name!r} in {profile_names()}, or the file of a profile, does not hold")
    try:
        return profile_from(json.loads(path.read_text("utf-8")))
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        said = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{path}: not a profile of this version's `pi-dist calibrate`: {said}") from error


def write_profile(profile: Profile, path: str) -> None:
    """Write it as JSON, one constant a line."""
    Path(path).write_text(json.dumps(asdict(profile), indent=1) + "\n", encoding="utf-8")


def constants(profile: Profile) -> dict[str, float]:
    """The numbers of a profile by name."""
    return {f.name: getattr(profile, f.name) for f in fields(profile) if f.type == "float"}
