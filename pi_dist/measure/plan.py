"""`pi-dist plan`: what a run would need on so many GPUs, before it is queued, and what to change."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

from pi_dist.config import Config, ConfigError, check
from pi_dist.measure.profile import Network, Profile
from pi_dist.measure.reach import report
from pi_dist.measure.step_model import Memory, Time, memory, step_time

MOST_GPUS = 4096  # that are tried
MIN_CHUNK = 4096  # tokens of a rank, of chunks that are tried
SHOWN = 4  # changes


@dataclass(frozen=True)
class Change:
    """One other setting, with which a run that does not fit would."""

    what: str
    mib: float
    host_mib: float
    """Of host memory, a GPU."""
    seconds: float


@dataclass(frozen=True)
class Plan:
    """The prediction for a run."""

    gpus: int
    gpu: str
    tensors_mib: float
    memory: Memory
    time: Time
    tokens: int
    """Of one optimizer step."""
    reach: int
    context: int
    covered_share: float
    changes: tuple[Change, ...]
    """What would make it fit, if it does not."""
    more_gpus: tuple[int, int] | None
    """(how many, sp_degree) with which it would, if no change helps; None: with none that was tried."""
    gpus_of_a_node: int
    precision: str

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.tensors_mib


def make_plan(config: Config, gpus: int, profile: Profile, network: Network) -> Plan:
    """Predict the run on so many GPUs.

    Raises:
        ConfigError: it cannot be split so.
    """
    check(config, gpus)
    reach = report(config.model, config.training.context)
    need = memory(config, gpus, profile)
    changes, more_gpus = (), None
    if need.total > profile.tensors_mib:
        changes = tuple(_that_fit(config, gpus, profile, network))
        more_gpus = None if changes else _more_gpus(config, gpus, profile)
    return Plan(
        gpus=gpus,
        gpu=profile.label,
        tensors_mib=profile.tensors_mib,
        memory=need,
        time=step_time(config, gpus, profile, network),
        tokens=config.training.context * config.training.batch_size,
        reach=reach.reach_in_context,
        context=config.training.context,
        covered_share=reach.covered_share,
        changes=changes,
        more_gpus=more_gpus,
        gpus_of_a_node=min(gpus, network.gpus_per_node),
        precision=config.training.precision,
    )


def _memory(config: Config, gpus: int, profile: Profile) -> Memory | None:
    """Of a rank; None where the run would be refused."""
    try:
        check(config, gpus)
        return memory(config, gpus, profile)
    except ConfigError:
        return None


def _more_gpus(config: Config, gpus: int, profile: Profile) -> tuple[int, int] | None:
    """The least multiple of the GPUs that has the memory: they share sequences, or else optimizer states."""
    p = config.parallel
    for factor in range(2, MOST_GPUS // gpus + 1):
        for sp_degree in (p.sp_degree * factor, p.sp_degree):
            other = replace(config, parallel=replace(p, sp_degree=sp_degree))
            need = _memory(other, gpus * factor, profile)
            if need is not None and need.total <= profile.tensors_mib:
                return gpus * factor, sp_degree
    return None


def _that_fit(config: Config, gpus: int, profile: Profile, network: Network) -> Iterator[Change]:
    """Changes that are enough, none of which holds another."""
    enough: list[dict[str, Any]] = []
    for settings, other in _alternatives(config, gpus):
        if any(fewer.items() <= settings.items() for fewer in enough):
            continue
        need = _memory(other, gpus, profile)
        if need is not None and need.total <= profile.tensors_mib:
            enough.append(settings)
            seconds = step_time(other, gpus, profile, network).total
            yield Change(_flags(settings), need.total, need.host, seconds)


def _alternatives(config: Config, gpus: int) -> Iterator[tuple[dict[str, Any], Config]]:
    """(settings, the run with them) that save memory, the least slowing first; then pairs, and triples."""
    t, p = config.training, config.parallel
    single: list[dict[str, Any]] = []
    if t.precision == "fp32":
        single.append({"training.precision": "bf16"})
    single += [{"parallel.sp_degree": d} for d in range(p.sp_degree + 1, gpus + 1) if gpus % d == 0]
    single += [{"parallel.zero_stage": stage} for stage in (1, 2, 3) if stage > p.zero_stage]
    if t.micro_batch_size > 1:
        single.append({"training.micro_batch_size": 1})
    if t.cuda_graphs:
        single.append({"training.cuda_graphs": None})
    recompute = {}
    if t.activation_checkpointing is not True:
        recompute["training.activation_checkpointing"] = True
        single.append(recompute)
    if t.mlp_tile_tokens is None:
        single.append({"training.mlp_tile_tokens": 8192})
    if t.chunk_tokens is None and not t.activation_offload:
        single.append(recompute | {"training.activation_offload": True})
    longest = t.chunk_tokens or 16384 * p.sp_degree
    for chunk in (longest // 2, longest // 4, longest // 16, longest // 64):
        if chunk % p.sp_degree == 0 and MIN_CHUNK * p.sp_degree <= chunk < t.context:
            single.append({"training.chunk_tokens": chunk})
    for number in (1, 2, 3):
        for several in combinations(single, number):
            joined = {key: value for settings in several for key, value in settings.items()}
            if len(joined) == sum(map(len, several)):
                yield joined, _with(config, joined)


def _flags(settings: dict[str, Any]) -> str:
    """As `pi-dist train` takes them."""
    values = {
        name: value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()
    }
    return " ".join(f"--{name}={value}" for name, value in values.items())


def _with(config: Config, settings: dict[str, Any]) -> Config:
    """The run with other settings, by their dotted names."""
    rooms: dict[str, dict[str, Any]] = {"parallel": {}, "training": {}}
    for name, value in settings.items():
        room, field = name.split(".")
        rooms[room][field] = value
    return replace(config, **{room: replace(getattr(config, room), **rooms[room]) for room in rooms})


def to_json(plan: Plan) -> dict:
    """The plan as data, its verdict with it."""
    return asdict(plan) | {"fits": plan.fits, "measured": False}


def describe(plan: Plan) -> str:
    """The plan in words."""
    m, seconds = plan.memory, plan.time.total
    lines = [
        f"predicted for {plan.gpus} × {plan.gpu}; nothing was run",
        f"memory of a GPU   {m.total:,.0f} MiB of {plan.tensors_mib:,.0f}: parameters, optimizer and "
        f"gradients {m.states:,.0f}, kept {m.kept:,.0f}, working set {m.working:,.0f}",
        f"step              {1e3 * seconds:,.0f} ms for {plan.tokens:,} tokens, "
        f"{plan.tokens / seconds:,.0f} tokens/s; of it waiting for others "
        f"{1e3 * plan.time.communication:,.0f} ms",
        f"reach             {plan.reach:,} tokens to the left at a context of {plan.context:,}, "
        f"{plan.covered_share:.1%} of it",
    ]
    if plan.precision == "fp32":
        lines.append("fp32              its products by the GPUs' data sheets: none was measured")
    if plan.reach < plan.context - 1:
        lines.append(
            f"warning           context ({plan.context:,}) > reach ({plan.reach:,}): tokens farther back "
            "cost memory and time and change nothing; see pi-dist reach"
        )
    if m.host:
        lines.append(
            f"host memory       {m.host:,.0f} MiB a GPU, {m.host * plan.gpus_of_a_node:,.0f} of a node, for "
            "kept rows or inputs of blocks; the time is without moving them"
        )
    if not plan.fits:
        if plan.changes:
            said = "one of these would:"
        elif plan.more_gpus:
            said = "--gpus {} --parallel.sp_degree={} would".format(*plan.more_gpus)
        else:
            said = f"nor with any change that was tried, nor on up to {MOST_GPUS:,} GPUs as it is"
        lines.append(f"does not fit      {said}")
        lines += [f"  {_in_words(change)}" for change in plan.changes[:SHOWN]]
    return "\n".join(lines)


def _in_words(change: Change) -> str:
    said = f"{change.what}: {change.mib:,.0f} MiB, {1e3 * change.seconds:,.0f} ms"
    if change.host_mib:
        said += f" without moving {change.host_mib:,.0f} MiB a GPU to host memory and back"
    return said
