"""`pi-dist plan`: what a run would need on so many GPUs, before it is queued, and what to change."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from pi_dist.config import Config, ConfigError, check
from pi_dist.measure.profile import Network, Profile
from pi_dist.measure.reach import report
from pi_dist.measure.step_model import Memory, Time, memory, step_time

MOST_GPUS = 4096  # that are tried


@dataclass(frozen=True)
class Change:
    """One other setting, with which a run that does not fit would."""

    what: str
    mib: float
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
    more_gpus: int | None
    """With how many it would, if none of these changes helps; None: with no number that was tried."""

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
        changes = tuple(
            Change(what, mib, step_time(other, gpus, profile, network).total)
            for what, other in _alternatives(config, gpus)
            if (mib := _mib(other, gpus, profile)) <= profile.tensors_mib
        )
        more_gpus = None if changes else _more_gpus(config, gpus, profile)
    return Plan(
        gpus=gpus,
        gpu=profile.label,
        tensors_mib=profile.tensors_mib,
        memory=need,
        time=step_time(config, gpus, profile, network),
        tokens=config.training.context * config.training.batch_size,
        reach=min(reach.reach, config.training.context - 1),
        context=config.training.context,
        covered_share=reach.covered_share,
        changes=changes,
        more_gpus=more_gpus,
    )


def _mib(config: Config, gpus: int, profile: Profile) -> float:
    """Memory of a rank; infinite where the run would be refused."""
    try:
        check(config, gpus)
        return memory(config, gpus, profile).total
    except ConfigError:
        return math.inf


def _more_gpus(config: Config, gpus: int, profile: Profile) -> int | None:
    """The least multiple of the GPUs, by powers of two, that share a sequence and have the memory."""
    p, factor = config.parallel, 2
    while gpus * factor <= MOST_GPUS:
        other = replace(config, parallel=replace(p, sp_degree=p.sp_degree * factor))
        if _mib(other, gpus * factor, profile) <= profile.tensors_mib:
            return gpus * factor
        factor *= 2
    return None


def _alternatives(config: Config, gpus: int) -> Iterator[tuple[str, Config]]:
    """Settings that save memory and that the run could have, the least slowing first; then pairs of them."""
    t, p = config.training, config.parallel
    single = []
    for degree in (d for d in range(p.sp_degree + 1, gpus + 1) if gpus % d == 0):
        single.append((f"parallel.sp_degree={degree}", {"parallel": {"sp_degree": degree}}))
    for stage in (s for s in (1, 2, 3) if s > p.zero_stage):
        single.append((f"parallel.zero_stage={stage}", {"parallel": {"zero_stage": stage}}))
    if t.micro_batch_size > 1:
        single.append(("training.micro_batch_size=1", {"training": {"micro_batch_size": 1}}))
    if t.cuda_graphs:
        single.append(("training.cuda_graphs=null", {"training": {"cuda_graphs": None}}))
    if t.activation_checkpointing is not True and t.chunk_tokens is None:
        single.append(
            ("training.activation_checkpointing=true", {"training": {"activation_checkpointing": True}})
        )
    if t.mlp_tile_tokens is None:
        single.append(("training.mlp_tile_tokens=8192", {"training": {"mlp_tile_tokens": 8192}}))
    if t.activation_checkpointing is True and t.chunk_tokens is None and not t.activation_offload:
        single.append(("training.activation_offload=true", {"training": {"activation_offload": True}}))
    chunk = 8192 * p.sp_degree
    if t.chunk_tokens is None and chunk < t.context:
        single.append((f"training.chunk_tokens={chunk}", {"training": {"chunk_tokens": chunk}}))
    pairs = [
        (f"{a} --{b}", _joined(x, y))
        for i, (a, x) in enumerate(single)
        for b, y in single[i + 1 :]
        if a.split("=")[0] != b.split("=")[0]
    ]
    for what, changed in single + pairs:
        other = replace(
            config,
            parallel=replace(p, **changed.get("parallel", {})),
            training=replace(t, **changed.get("training", {})),
        )
        yield f"--{what}", other


def _joined(a: dict[str, dict], b: dict[str, dict]) -> dict[str, dict]:
    return {key: a.get(key, {}) | b.get(key, {}) for key in a | b}


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
    if plan.reach < plan.context - 1:
        lines.append(
            f"warning           context ({plan.context:,}) > reach ({plan.reach:,}): tokens farther back "
            "cost memory and time and change nothing; see pi-dist reach"
        )
    if m.host:
        lines.append(
            f"host memory       {m.host:,.0f} MiB a GPU, for kept rows or inputs of blocks; the time is "
            "without moving them"
        )
    if not plan.fits:
        if plan.changes:
            said = "one of these would:"
        elif plan.more_gpus:
            said = f"{plan.more_gpus:,} GPUs that share a sequence would"
        else:
            said = f"nor on {MOST_GPUS:,} GPUs, as it is"
        lines.append(f"does not fit      {said}")
        lines += [f"  {c.what}: {c.mib:,.0f} MiB, {1e3 * c.seconds:,.0f} ms" for c in plan.changes[:4]]
    return "\n".join(lines)
