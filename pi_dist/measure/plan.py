"""`pi-dist plan`: what a run would need on so many GPUs, before it is queued, and what to change."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

from pi_dist.config import Config, ConfigError, Method, check
from pi_dist.measure.profile import Network, Profile
from pi_dist.measure.reach import report
from pi_dist.measure.step_model import Memory, Time, memory, step_time
from pi_dist.ops.pattern import looks_beyond_a_chunk

MOST_GPUS = 4096  # that are tried
MIN_CHUNK = 4096  # tokens of a rank, of chunks that are tried
SHOWN = 4  # changes
_CHUNK = "training.chunk_tokens"


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
    memory: Memory | None
    refused: str
    """Why there is none: rows that chunks keep have no room."""
    time: Time
    looks_beyond_a_chunk: bool
    tokens: int
    """Of one optimizer step."""
    reach: int
    context: int
    covered_share: float
    changes: tuple[Change, ...]
    """What would make it fit, if it does not."""
    more_gpus: tuple[int, str] | None
    """(how many, with which flags) with which it would, if no change helps; None: none that was tried."""
    gpus_of_a_node: int
    precision: str

    @property
    def fits(self) -> bool:
        return self.memory is not None and self.memory.total <= self.tensors_mib


def make_plan(config: Config, gpus: int, profile: Profile, network: Network) -> Plan:
    """Predict the run on so many GPUs.

    Raises:
        ConfigError: it cannot be split so.
    """
    check(config, gpus)
    reach = report(config.model, config.training.context)
    need, refused = None, ""
    try:
        need = memory(config, gpus, profile)
    except ConfigError as reason:
        refused = str(reason)
    changes, more_gpus = (), None
    if need is None or need.total > profile.tensors_mib:
        changes = tuple(_that_fit(config, gpus, profile, network))
        more_gpus = None if changes else _more_gpus(config, gpus, profile)
    return Plan(
        gpus=gpus,
        gpu=profile.label,
        tensors_mib=profile.tensors_mib,
        memory=need,
        refused=refused,
        looks_beyond_a_chunk=looks_beyond_a_chunk(config),
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


def _more_gpus(config: Config, gpus: int, profile: Profile) -> tuple[int, str] | None:
    """The least multiple of the GPUs that has the memory: they share sequences, or else optimizer states.

    Where none has, as with dense attention: with rings.
    """
    sp_degree = config.parallel.sp_degree
    for other in ({}, *_rings(config)):
        for factor in range(2, MOST_GPUS // gpus + 1):
            for shared in (sp_degree * factor, sp_degree):
                settings = other | {"parallel.sp_degree": shared}
                need = _memory(_with(config, settings), gpus * factor, profile)
                if need is not None and need.total <= profile.tensors_mib:
                    return gpus * factor, _flags(settings)
    return None


def _rings(config: Config) -> list[dict[str, Any]]:
    """Rings in the place of what exact layers cannot be split so, if there are such layers."""
    ring: dict[Method, Method] = {"dense": "ring", "ulysses": "ring"}
    if not set(ring) & set(config.model.methods):
        return []
    methods = [ring.get(method, method) for method in config.model.methods]
    return [{"model.method": methods[0] if len(set(methods)) == 1 else methods}]


def _that_fit(config: Config, gpus: int, profile: Profile, network: Network) -> Iterator[Change]:
    """The first changes that are enough, none of which holds another."""
    enough: list[dict[str, Any]] = []
    for settings, other in _alternatives(config, gpus):
        if any(_holds(settings, fewer) for fewer in enough):
            continue
        need = _memory(other, gpus, profile)
        if need is not None and need.total <= profile.tensors_mib:
            enough.append(settings)
            if len(enough) > SHOWN:
                return
            seconds = step_time(other, gpus, profile, network).total
            yield Change(_flags(settings), need.total, need.host, seconds)


def _holds(settings: dict[str, Any], fewer: dict[str, Any]) -> bool:
    """Whether these are all of those, or shorter chunks in the place of theirs."""

    def is_there(name: str, value: Any) -> bool:
        mine = settings.get(name)
        return mine == value or (name == _CHUNK and mine is not None and mine < value)

    return all(is_there(name, value) for name, value in fewer.items())


def _alternatives(config: Config, gpus: int) -> Iterator[tuple[dict[str, Any], Config]]:
    """(settings, the run with them) that save memory, the least slowing first; then pairs, and triples."""
    t, p = config.training, config.parallel
    single: list[dict[str, Any]] = []
    if t.precision == "fp32":
        single.append({"training.precision": "bf16"})
    more_ranks = [{"parallel.sp_degree": d} for d in range(p.sp_degree + 1, gpus + 1) if gpus % d == 0]
    single += more_ranks
    for ring in _rings(config):
        single += [ring | ranks for ranks in more_ranks] or [ring]
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
    for share in (2, 4, 16, 64, 256, 1024):
        chunk = (t.chunk_tokens or t.context) // share
        if chunk % p.sp_degree == 0 and MIN_CHUNK * p.sp_degree <= chunk:
            single.append({_CHUNK: chunk})
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
    rooms: dict[str, dict[str, Any]] = {"model": {}, "parallel": {}, "training": {}}
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
    need = plan.refused
    if m is not None:
        need = (
            f"{m.total:,.0f} MiB of {plan.tensors_mib:,.0f}: parameters, optimizer and "
            f"gradients {m.states:,.0f}, kept {m.kept:,.0f}, working set {m.working:,.0f}"
        )
    lines = [
        f"predicted for {plan.gpus} × {plan.gpu}; nothing was run",
        f"memory of a GPU   {need}",
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
    if plan.looks_beyond_a_chunk:
        lines.append(
            "far rows          layers look beyond a chunk: reading rows kept of others is not in the time; "
            "steps that did so took 2 to 4 times as long"
        )
    if m is not None and m.host:
        lines.append(
            f"host memory       {m.host:,.0f} MiB a GPU, {m.host * plan.gpus_of_a_node:,.0f} of a node, for "
            "kept rows or inputs of blocks; the time is without moving them"
        )
    if not plan.fits:
        if plan.changes:
            said = "one of these would:"
        elif plan.more_gpus:
            said = "--gpus {} {} would".format(*plan.more_gpus)
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
