"""`pi-dist bench sp`: whole training steps of every method on the ranks of the launcher, beside each other.

The same model, engine, recomputation and ZeRO stage for all; random tokens. A record is resumed, also with
another number of ranks: rows with one rank are the baseline of weak and strong scaling.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from pi_dist.config import (
    EXACT_METHODS,
    Config,
    ConfigError,
    Method,
    Overlap,
    ParallelConfig,
    TrainingConfig,
    UserError,
    check,
)
from pi_dist.measure.cost_model import exchanged_bytes
from pi_dist.measure.profile import Network, Profile
from pi_dist.measure.record import PREDICTION, step_row
from pi_dist.measure.step_model import memory, step_time
from pi_dist.measure.steps import (
    PAPER,
    WIDE,
    Record,
    Steps,
    agreed,
    check_presets,
    collect_garbage,
    end_with_parent,
    identity,
    model_of,
    most,
)
from pi_dist.measure.timeline import Kernel, busy_ms, counted_bytes, exposed_ms, kernels_of
from pi_dist.model.transformer import PiTransformer
from pi_dist.parallel.mesh import Mesh, make_mesh
from pi_dist.parallel.process_group import start, world_size_from_launcher
from pi_dist.training.deepspeed_engine import Engine

METHODS: tuple[Method, ...] = ("pi", "window", "ring", "ulysses", "dense")
MODES_AT = (32768, 131072, 262144)  # contexts at which every form of the exchange is timed
SLOWEST_MS = 60_000.0  # a step expected to be slower is predicted
TIMEOUT_S = 180.0  # of a collective
TIMED_STEPS = 9
TIMED_S = 8.0  # fewer steps where they would take longer than this, but at least one
PROFILED_STEPS = 3  # one wait of a rank for another makes a single step's exposed time meaningless
OTHER_STEPS = 3  # of a row: one whose bytes are counted, one that is captured, one replayed


@dataclass(frozen=True)
class Setup:
    """What one engine is built for; it runs at several contexts.

    sp_degree: ranks that share a sequence. batch: sequences of a step, of all ranks together.
    """

    preset: str
    method: Method
    sp_degree: int
    window: int
    stride: int
    num_skips: int
    overlap: Overlap = "interior"
    exchange: str = "ring_all_to_all"
    batch: int = 1
    cuda_graphs: bool | None = None

    def config(self, tokens: int, num_ranks: int, device: str, precision: str) -> Config:
        """The run's configuration at a context; raises ConfigError if it cannot be split so."""
        pattern = {"window": self.window, "stride": self.stride, "num_skips": self.num_skips}
        parallel = {"sp_degree": self.sp_degree, "overlap": self.overlap, "exchange": self.exchange}
        config = Config(
            model=model_of(self.preset, method=self.method, **pattern),
            parallel=ParallelConfig(**parallel, device=device, zero_stage=1),
            training=TrainingConfig(
                context=tokens,
                batch_size=self.batch,
                micro_batch_size=self.batch * self.sp_degree // num_ranks,
                precision=precision,
                activation_checkpointing=True,
                cuda_graphs=self.cuda_graphs,
            ),
        )
        check(config, num_ranks)
        return config


def plain_setups(presets: list[str], methods: list[Method], num_ranks: int) -> list[Setup]:
    """Those in which all ranks share one sequence, in the default form of the exchange."""
    return [
        Setup(preset, method, num_ranks, **pattern)
        for preset in presets
        for method in methods
        for pattern in _patterns(method, num_ranks)
    ]


def setups(presets: list[str], methods: list[Method], num_ranks: int) -> Iterator[tuple[Setup, bool]]:
    """(setup, whether it is run at every context, or only at those of MODES_AT).

    Then what they are compared with: other forms of the exchange, and sequences that fewer ranks share, of as
    many tokens a rank, so that ranks, engine and tokens are the same and the exchange is less, or none.
    """
    plain = plain_setups(presets, methods, num_ranks)
    yield from ((setup, True) for setup in plain)
    for setup in plain:
        if setup.method not in EXACT_METHODS:
            for sp_degree in (p for p in range(num_ranks // 2, 0, -1) if num_ranks % p == 0):
                yield replace(setup, sp_degree=sp_degree, batch=num_ranks // sp_degree), True
    if num_ranks == 1:
        return
    shaped = [setup for setup in plain if setup.method == "pi"]
    for setup in shaped:
        for exchange in ("ring_all_to_all", "all_to_all"):
            for overlap in ("none", "interior"):
                form = replace(setup, overlap=overlap, exchange=exchange)
                if form != setup:
                    yield form, False
    for wide in shaped[:1]:
        for exchange in ("ring_all_to_all", "all_to_all"):
            yield replace(wide, overlap="pipelined", exchange=exchange, batch=2), False
        yield replace(wide, batch=2), False  # what pipelined is compared with
        yield replace(wide, cuda_graphs=False), False


def _patterns(method: Method, num_ranks: int) -> list[dict[str, int]]:
    """Those that a method is measured with, on so many ranks."""
    if method == "pi":
        return [WIDE, PAPER]
    runs = ("window", "dense") if num_ranks == 1 else ("window", "ring", "ulysses")
    return [PAPER | {"num_skips": 0}] if method in runs else []


def measure(
    engine: Engine, mesh: Mesh, config: Config, model: PiTransformer
) -> tuple[dict[str, Any], list[Kernel]]:
    """(a row of the record, the kernels of a step on this GPU).

    The first step, which compiles, is the one whose bytes are counted; in the second, graphs are captured.
    """
    cuda, steps = mesh.device.type == "cuda", Steps(engine, mesh, config)
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with counted_bytes() as sent:
        steps.timed()
    first = steps.timed()
    if engine.replays:  # captured in that step
        first = steps.timed()
    number = min(TIMED_STEPS, int(TIMED_S / first))
    seconds = median([steps.timed() for _ in range(number)] or [first])
    layers = config.model.num_layers
    total = torch.tensor(float(sum(map(sum, sent.values()))), dtype=torch.float64, device=mesh.device)
    dist.all_reduce(total)
    profiles = []
    if cuda:
        profiles = [kernels_of(steps.one) for _ in range(_profiled_steps(number))]
    row = step_row(config, mesh.world_size, seconds, model.num_parameters()) | {
        "bytes_sent": round(total.item() / mesh.world_size / layers),
        "bytes_formula": _bytes_formula(config, mesh.dp_degree),
        "timed_steps": max(1, number),
        "replays": engine.replays,
        "fits": True,
    }
    if cuda:
        row |= {key: most(row[key], mesh) for key in ("peak_mib", "reserved_mib")}
    for kind, name in (("exchange", "exposed"), ("collective", "zero_exposed")):
        # causal, the first rank waits for nobody
        found = [[most(x, mesh) for x in exposed_ms(kernels, kind)] for kernels in profiles]
        row |= dict(zip((f"{kind}_ms", f"{name}_ms"), _medians(found), strict=True))
    row["exposed_share"] = round(row["exposed_ms"] / row["ms"], 4) if cuda else None
    if cuda:  # ranks wait for the slowest, whatever the exchange takes
        computes = [
            busy_ms([kernel for kernel in kernels if kernel.kind == "compute"]) for kernels in profiles
        ]
        found = [[most(x, mesh), -most(-x, mesh)] for x in computes]
        row |= dict(zip(("compute_ms", "least_compute_ms"), _medians(found), strict=True))
    return row, profiles[-1] if cuda else []


def _bytes_formula(config: Config, replicas: int) -> int:
    """Of a layer and rank, the mean, where so many replicas share the batch."""
    layers = config.model.num_layers
    return round(sum(exchanged_bytes(config, layer) for layer in range(layers)) / layers / replicas)


def _profiled_steps(timed: int) -> int:
    """How many, of a row of which so many are timed."""
    return max(1, min(PROFILED_STEPS, timed))


def _medians(found: list[list[float]]) -> list[float | None]:
    """Of both columns; none where nothing was profiled."""
    return [round(median(column), 3) for column in zip(*found, strict=True)] if found else [None, None]


def predicted(rows: list[dict[str, Any]], tokens: int) -> dict[str, float] | None:
    """Time and memory of an exact method beyond its last two measured contexts: a·n + b·n², and a + b·n."""
    known = [row for row in rows if row["measured"] and row["fits"]][-2:]
    if len(known) < 2:
        return None
    (n1, t1), (n2, t2) = ((row["tokens"], row["ms"]) for row in known)
    quadratic = max(0.0, (t2 / n2 - t1 / n1) / (n2 - n1))
    found = {"ms": round((t2 / n2 - quadratic * n2) * tokens + quadratic * tokens**2, 1)}
    for key in ("peak_mib", "reserved_mib"):
        if known[0][key] is not None:
            slope = (known[1][key] - known[0][key]) / (n2 - n1)
            found[key] = round(known[1][key] + slope * (tokens - n2), 1)
    return found


def expected_s(rows: list[dict[str, Any]], setup: Setup, tokens: int) -> float:
    """Seconds that a row takes, by that of the context before; 0 if there is none."""
    known = [row for row in rows if row["ms"] is not None and row["tokens"] < tokens]
    if not known:
        return 0.0
    ratio = tokens / known[-1]["tokens"]
    step_s = known[-1]["ms"] / 1e3 * ratio ** (2 if setup.method in EXACT_METHODS else 1)
    others = OTHER_STEPS + _profiled_steps(int(TIMED_S / step_s))
    return others * step_s + max(TIMED_S, step_s)


def _rows_of(record: Record, setup: Setup, world_size: int) -> list[dict[str, Any]]:
    """The rows of a setup on so many ranks, by context."""
    wanted = identity(Setup, vars(setup))
    alike = (row for row in record.rows if identity(Setup, row) == wanted)
    mine = (row for row in alike if row["world_size"] == world_size)
    return sorted(mine, key=lambda row: row["tokens"])


def bench(
    path: str,
    presets: list[str],
    contexts: list[int],
    methods: list[Method],
    *,
    minutes: float = 8.0,
    device: str = "auto",
    trace: str | None = None,
) -> bool:
    """Measure what the record at `path` lacks, for about so many minutes; True if all is there.

    Every rank of the launcher calls it. trace: where the last rank writes the kernels of the first step that
    it measures, unless the file is there.

    Raises:
        UserError: an unknown preset or method, methods of which none takes so many ranks, or a record of
            another device, of other versions or of another benchmark.
    """
    _check_names(presets, methods)
    if trace is not None and not Path(trace).resolve().parent.is_dir():
        raise UserError(f"bench sp: the directory of trace ({trace}) exists, does not hold")
    until, ranks = time.monotonic() + 60 * minutes, world_size_from_launcher()
    wanted_setups = list(setups(presets, methods, ranks))
    if not wanted_setups:
        raise UserError(_no_setup(str(ranks), methods))
    if ranks > 1:
        end_with_parent()
    mesh = make_mesh(ranks, start(device, TIMEOUT_S), TIMEOUT_S)
    meshes = {ranks: mesh}
    precision = "bf16" if mesh.device.type == "cuda" else "fp32"
    settings = {"precision": precision, "activation_checkpointing": True, "data": "random tokens"}
    record = Record(path, mesh, settings, _line)
    complete = True
    for setup, everywhere in wanted_setups:
        if setup.sp_degree not in meshes:
            meshes[setup.sp_degree] = make_mesh(setup.sp_degree, mesh.device, TIMEOUT_S)
        wanted = [n for n in sorted(contexts) if everywhere or n in MODES_AT or n == min(contexts)]
        wanted = [n * setup.sp_degree // ranks for n in wanted]
        done = {row["tokens"] for row in _rows_of(record, setup, ranks)}
        left = [n for n in wanted if n not in done]
        complete = not left or _run(
            setup, left, meshes[setup.sp_degree], record, device, precision, trace, until
        )
        if not complete:
            break
    record.close(complete)
    return complete


def predict(
    path: str,
    presets: list[str],
    contexts: list[int],
    methods: list[Method],
    ranks: list[int],
    profile: Profile,
    network: Network,
) -> None:
    """Add rows of so many ranks to the record at `path`, by the cost model: nothing is run.

    Raises:
        UserError: an unknown preset or method, or a record of another benchmark, GPU or network.
    """
    _check_names(presets, methods)
    settings = {"precision": "bf16", "activation_checkpointing": True, "data": "none"}
    settings |= {"profile": profile.name, "network": asdict(network)}
    plain = {num_ranks: plain_setups(presets, methods, num_ranks) for num_ranks in ranks}
    if not any(plain.values()):
        raise UserError(_no_setup(", ".join(map(str, ranks)), methods))
    record = Record(path, make_mesh(1, start("cpu", TIMEOUT_S)), settings, _line, PREDICTION)
    for num_ranks in ranks:
        for setup, tokens in itertools.product(plain[num_ranks], sorted(contexts)):
            if all(row["tokens"] != tokens for row in _rows_of(record, setup, num_ranks)):
                record.add(_predicted_row(setup, tokens, num_ranks, profile, network))
    record.close(True)


def _no_setup(ranks: str, methods: list[Method]) -> str:
    return (
        f"bench sp: ranks ({ranks}) == 1 for dense, > 1 for ring and ulysses, does not hold "
        f"for methods ({', '.join(methods)})"
    )


def _predicted_row(
    setup: Setup, tokens: int, num_ranks: int, profile: Profile, network: Network
) -> dict[str, Any]:
    what = vars(setup) | {"tokens": tokens, "world_size": num_ranks, "measured": False}
    try:
        config = setup.config(tokens, num_ranks, "auto", "bf16")
    except ConfigError as reason:
        return what | {"ms": None, "fits": None, "note": str(reason)}
    time_, need = step_time(config, num_ranks, profile, network), memory(config, num_ranks, profile).total
    return (
        step_row(config, num_ranks, time_.total, None, profile.device)
        | what
        | {
            "peak_mib": round(need, 1),
            "fits": need <= profile.tensors_mib,
            "bytes_formula": _bytes_formula(config, 1),
            "communication_ms": round(1e3 * time_.communication, 3),
        }
    )


def _check_names(presets: list[str], methods: list[Method]) -> None:
    """Raise UserError for a preset or method that is not known."""
    check_presets("bench sp", presets)
    if not set(methods) <= set(METHODS):
        raise UserError(f"bench sp: methods ({', '.join(methods)}) in {METHODS} does not hold")


def is_last_rank() -> bool:
    """Whether this rank writes the trace: causal, it waits for rows, as the first one does not."""
    return dist.get_rank() == dist.get_world_size() - 1


def _run(
    setup: Setup,
    contexts: list[int],
    mesh: Mesh,
    record: Record,
    device: str,
    precision: str,
    trace: str | None,
    until: float,
) -> bool:
    """Rows of one setup at these contexts, ascending; False if it is time to stop."""
    engine = model = None
    try:
        for tokens in contexts:
            empty = vars(setup) | {"tokens": tokens, "world_size": mesh.world_size}
            empty |= {"ms": None, "measured": False, "fits": None}
            try:
                config = setup.config(tokens, mesh.world_size, device, precision)
            except ConfigError as reason:
                record.add(empty | {"note": str(reason)})
                continue
            rows, what = (
                _rows_of(record, setup, mesh.world_size),
                [*vars(setup).values(), tokens, mesh.world_size],
            )
            guess = predicted(rows, tokens) if setup.method in EXACT_METHODS else None
            if any(row["fits"] is False for row in rows):
                record.add(empty | {"fits": False, "note": "out of memory at a shorter context"})
            elif record.attempted(what):
                record.add(empty | {"note": "the process ended while this was measured"})
            elif guess is not None and guess["ms"] > SLOWEST_MS:
                shape = step_row(config, mesh.world_size, guess["ms"] / 1e3, None)
                fits = "peak_mib" not in guess or guess["peak_mib"] < _capacity_mib(mesh)
                record.add(shape | vars(setup) | {"fits": fits} | guess | {"measured": False})
            elif agreed(time.monotonic() + record.begun * expected_s(rows, setup, tokens) > until):
                return False
            else:
                record.attempt(what)
                if engine is None:
                    model = PiTransformer.of_run(config, mesh.device.type)
                    engine = Engine(model, config, mesh)
                row, kernels = measure(engine, mesh, config, model)
                record.add(row | vars(setup))
                if trace is not None and is_last_rank() and not Path(trace).exists():
                    content = {"row": row, "kernels": [list(kernel) for kernel in kernels]}
                    Path(trace).write_text(json.dumps(content))
    except torch.OutOfMemoryError:  # the others may be in a collective: only a new process can go on
        record.add(empty | {"fits": False, "measured": True, "note": "out of memory"})
        raise UserError("bench sp: out of memory, which is in the record; run it again to go on") from None
    except BaseException:
        record.attempt(None)
        raise
    finally:
        if engine is not None:
            engine.close()
            del engine, model
            collect_garbage()  # the next setup's memory is to be its own
    return True


def _capacity_mib(mesh: Mesh) -> float:
    return torch.cuda.get_device_properties(mesh.device).total_memory / 2**20


def _line(row: dict[str, Any]) -> str:
    what = f"{row['preset']:<7} {row['method']:<8} k {row['window']:<3} M {row['num_skips']:<2} "
    what += f"{row['overlap']:<9} {row['exchange']:<15} B {row['batch']} "
    what += f"{'graphs ' if row.get('replays') else ''}n {row['tokens']:>9,} "
    what += f"P {row['world_size']}"
    if row["sp_degree"] < row["world_size"]:
        what += f" = {row['world_size'] // row['sp_degree']} × {row['sp_degree']}"
    if row["ms"] is None:
        return f"{what}  {row['note']}"
    memory = "" if row.get("peak_mib") is None else f", {row['peak_mib']:,.0f} MiB"
    exposed = row.get("exposed_share")
    share = "" if exposed is None else f", exposed {exposed:.2%}"
    return f"{what} {row['ms']:10.1f} ms{'' if row['measured'] else ' (predicted)'}{memory}{share}"
