"""`pi-dist savings`: the fewest GPUs with which each method trains a context, in memory and in time.

Every method has the same model, ZeRO stage, recomputation and tiling of the loss. One sequence is trained at
a time, split over all GPUs. What this machine's GPU can measure is measured: memory of one rank of P, by
`fake_ranks`, and its time; the rest is predicted by `step_model`, and each figure says which.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from pi_dist.config import (
    EXACT_METHODS,
    PRESETS,
    Config,
    ConfigError,
    Method,
    ModelConfig,
    ParallelConfig,
    TrainingConfig,
    UserError,
    check,
    check_model,
)
from pi_dist.measure.profile import Network, profile_from
from pi_dist.measure.reach import report
from pi_dist.measure.record import PREDICTION, RANK, kept_records, resume, write
from pi_dist.measure.savings_points import MEASURED, PREDICTED, Bench, Lab, OutOfTime, Point
from pi_dist.measure.sp_bench import METHODS
from pi_dist.measure.steps import model_of as preset_with
from pi_dist.ops.pattern import looks_beyond_a_chunk

# Times the memory there is: what is predicted to need more is not measured. With a measured point of the row,
# by whose error the prediction is corrected, and without one.
_HOPELESS_BESIDE, _HOPELESS = 1.25, 1.5

ONE_CHUNK = "nothing to stream"  # in the note of a row in chunks of which one is the context


@dataclass(frozen=True)
class Terms:
    """What all methods share: fields of the configuration, but chunk_tokens are those of one rank.

    What goes in chunks is not offloaded: chunks do not keep what would be.
    """

    zero_stage: int = 1
    chunk_tokens: int = 32768
    window: int = 4
    stride: int = 16
    num_skips: int = 1
    schedule: str = "fixed"
    activation_offload: bool = False
    mlp_tile_tokens: int | None = None
    max_gpus: int = 1024


@dataclass(frozen=True)
class Budget:
    """Time that a step of one sequence may take; None: any."""

    step_ms: float | None = None

    def allows(self, seconds: float) -> bool:
        return self.step_ms is None or 1e3 * seconds <= self.step_ms


def parse_budget(text: str, context: int) -> Budget:
    """memory, step_ms=NUMBER or tokens_per_s=NUMBER.

    Raises:
        ConfigError: it is none of these.
    """
    name, _, number = text.partition("=")
    try:
        value = float(number) if number else None
    except ValueError:
        value = -1.0
    if name == "memory" and not number:
        return Budget()
    step_ms = value if name == "step_ms" or not value else 1e3 * context / value
    if step_ms is None or not 0 < step_ms < math.inf or name not in ("step_ms", "tokens_per_s"):
        raise ConfigError(f"budget: {text!r} in memory, step_ms=NUMBER, tokens_per_s=NUMBER does not hold")
    return Budget(step_ms)


def variants(methods: Sequence[Method]) -> Iterator[tuple[Method, bool]]:
    """(method, streamed): π and window also in chunks, as rows of their own.

    Raises:
        ConfigError: an unknown method.
    """
    if not set(methods) <= set(METHODS):
        raise ConfigError(f"methods: {', '.join(methods)} in {', '.join(METHODS)} does not hold")
    for method in methods:
        yield method, False
        if method not in EXACT_METHODS:
            yield method, True


def model_of(preset: str, method: Method, terms: Terms) -> ModelConfig:
    """A preset with the terms' pattern.

    Raises:
        ConfigError: an unknown preset.
    """
    if preset not in PRESETS:
        raise ConfigError(f"preset: {preset!r} in {', '.join(PRESETS)} does not hold")
    if method in EXACT_METHODS:
        return preset_with(preset, method=method)
    pattern = {"window": terms.window, "stride": terms.stride, "schedule": terms.schedule}
    skips = 0 if method == "window" else terms.num_skips
    return preset_with(preset, method=method, num_skips=skips, **pattern)


def config_of(
    preset: str, method: Method, streamed: bool, context: int, num_gpus: int, terms: Terms
) -> Config:
    """One sequence over all GPUs; several share chunks that divide it.

    Raises:
        ConfigError: the method cannot be split so; the message says why.
    """
    chunk = _chunk(context, num_gpus, terms.chunk_tokens)
    if streamed and chunk == context:
        raise ConfigError(
            f"chunk_tokens: {terms.chunk_tokens} tokens a GPU × {num_gpus} < context ({context}) "
            f"does not hold: {ONE_CHUNK} (--chunk-tokens)"
        )
    config = Config(
        model=model_of(preset, method, terms),
        parallel=ParallelConfig(sp_degree=num_gpus, zero_stage=terms.zero_stage),
        training=TrainingConfig(
            context=context,
            batch_size=1,
            micro_batch_size=1,
            precision="bf16",
            activation_checkpointing=True,
            activation_offload=terms.activation_offload and not streamed,
            mlp_tile_tokens=terms.mlp_tile_tokens,
            chunk_tokens=chunk if streamed else None,
        ),
    )
    check(config, num_gpus)
    return config


def _chunk(context: int, num_gpus: int, chunk_tokens: int) -> int:
    """Tokens of the longest chunks of at most so many a GPU that all can share, down to a tenth of these."""
    longest = min(context, chunk_tokens * num_gpus)
    if num_gpus > 1:
        fewest_chunks = -(-context // longest)
        for number in range(fewest_chunks, 10 * fewest_chunks + 1):
            chunk, rest = divmod(context, number)
            if rest == 0 and chunk % num_gpus == 0:
                return chunk
    return longest


def divisors(number: int, limit: int) -> list[int]:
    """Divisors of a number up to a limit, ascending."""
    return [d for d in range(1, min(number, limit) + 1) if number % d == 0]


def first_true(count: int, holds: Callable[[int], bool], guess: int) -> int | None:
    """The least i < count for which `holds(i)`, which stays true once it is; None: there is none.

    Asks around the guess first, at doubling distance, then bisects: twice if the guess is right.
    """
    if count == 0:
        return None
    low, high, step = -1, count, 1  # holds(low) is false, holds(high) true, if they are in the range
    at = min(max(guess, 0), count - 1)
    while high - low > 1:
        if holds(at):
            high = at
            at = max(low + 1, at - step) if low == -1 else (low + high) // 2
        else:
            low = at
            at = min(high - 1, at + step) if high == count else (low + high) // 2
        step *= 2
    return high if high < count else None


def fewest(
    preset: str, method: Method, streamed: bool, context: int, budget: Budget, terms: Terms, bench: Bench
) -> dict[str, Any]:
    """A row: the fewest GPUs of one method for one context, or in words why there is no such number.

    Numbers of GPUs beyond the one with the least predicted time are tried for the sake of memory alone.

    Raises:
        OutOfTime: no time is left to measure a point.
    """
    lab = bench.lab
    row = _identity(preset, method, streamed, context, budget, terms, lab) | _reach(
        preset, method, context, terms
    )
    jobs, refused = _jobs(preset, method, streamed, context, terms, lab)
    if not jobs:
        return row | {"gpus": None, "note": next(iter(refused.values()))}
    guesses = [guess for _, _, guess in jobs]
    good = [i for i, point in enumerate(guesses) if point.fits and budget.allows(point.seconds)]
    fastest = min(range(len(jobs)), key=lambda i: (not guesses[i].fits, guesses[i].seconds))
    points: dict[int, Point] = {}

    def enough(index: int) -> bool:
        if index not in points:
            num_gpus, config, guess = jobs[index]
            what = f"{preset} {method}{' in chunks' if streamed else ''} {context:,} on {num_gpus}"
            hopeless = _is_hopeless(guess, points.values(), lab)
            points[index] = guess if hopeless else bench.point(config, num_gpus, what)
        return points[index].fits and budget.allows(points[index].seconds)

    most = max([fastest, *good[:1]])
    found = first_true(most + 1, enough, min([fastest, *good[:1]]))
    while found is None and most + 1 < len(jobs) and not points[most].fits:
        most += 1
        found = most if enough(most) else None
    row["checks"] = [_plain(asdict(points[i])) for i in sorted(points)]
    if found is not None:
        point = points[found]
        notes = []
        if point.time_source == PREDICTED and looks_beyond_a_chunk(jobs[found][1]):
            notes.append("without reading rows of other chunks, 2 to 4 times as long with it")
        fewer = jobs[found - 1][0] if found else 0
        notes += [f"({n}: {why})" for n, why in refused.items() if fewer < n < point.num_gpus]
        return row | _plain(asdict(point)) | {"gpus": point.num_gpus, "note": " ".join(notes)}
    last = max(points)
    text = _too_little(points[last], budget)
    return row | {"gpus": None, "note": text + _of_more(jobs[last:], refused, context, terms.max_gpus)}


def _is_hopeless(guess: Point, known: Iterable[Point], lab: Lab) -> bool:
    """Whether a prediction is so far beyond the memory that measuring would tell nothing new."""
    errors_of = [
        point.peak_mib / point.predicted_mib
        for point in known
        if point.peak_mib is not None and point.memory_source == MEASURED
    ]
    least = guess.predicted_mib * min(errors_of, default=1.0)
    return least > lab.profile.usable_mib * (_HOPELESS_BESIDE if errors_of else _HOPELESS)


def _jobs(
    preset: str, method: Method, streamed: bool, context: int, terms: Terms, lab: Lab
) -> tuple[list[tuple[int, Config, Point]], dict[int, str]]:
    """(jobs on the divisors of the context, by number of GPUs, and predictions; why the others are none)."""
    jobs: list[tuple[int, Config, Point]] = []
    refused: dict[int, str] = {}
    for num_gpus in divisors(context, terms.max_gpus):
        try:
            config = config_of(preset, method, streamed, context, num_gpus, terms)
            jobs.append((num_gpus, config, lab.predict(config, num_gpus)))
        except ConfigError as reason:
            refused[num_gpus] = str(reason)
    return jobs, refused


def _of_more(
    jobs: Sequence[tuple[int, Config, Point]], refused: dict[int, str], context: int, max_gpus: int
) -> str:
    """Why no more GPUs than those of the first of these jobs were tried."""
    most = jobs[0][0]
    if len(jobs) > 1:  # the first has the least predicted time
        return "; more do not help"
    reason = next((reason for num_gpus, reason in refused.items() if num_gpus > most), None)
    if reason is not None:
        return f"; with more: {reason}"
    if most < max_gpus:
        return f"; of more, up to {max_gpus:,}, none divides {context:,}"
    return f"; more than {max_gpus:,} were not tried (--max-gpus)"


def _too_little(last: Point, budget: Budget) -> str:
    """Why even the most GPUs that help are not enough."""
    gpus = f"{last.num_gpus} GPU{'s' if last.num_gpus > 1 else ''}"
    if not last.fits:
        need = "more than there is" if last.peak_mib is None else f"{last.peak_mib:,.0f} MiB"
        return f"not on {gpus}: {need} on each ({last.memory_source})"
    return (
        f"not on {gpus}: {ms_text(1e3 * last.seconds, budget.step_ms)} ms a step "
        f"> {budget_text(budget.step_ms)} ({last.time_source})"
    )


def ms_text(ms: float, budget_ms: float | None = None) -> str:
    """Digits enough that it is not 0, and within the budget or beyond it as printed too."""
    limit = math.inf if budget_ms is None else float(budget_text(budget_ms).replace(",", ""))
    texts = [f"{ms:,.{digits}f}" for digits in range(10)]
    for text in texts:
        said = float(text.replace(",", ""))
        if said > 0 and (said <= limit) == (ms <= limit):
            return text
    return texts[-1]


def budget_text(budget_ms: float) -> str:
    """With all its digits, nine at most."""
    return f"{budget_ms:,.9g}"


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Seconds as ms, numbers with as many digits as they deserve."""
    out = dict(values)
    for name in ("seconds", "predicted_seconds"):
        seconds = out.pop(name)
        out[name.replace("seconds", "ms")] = None if seconds is None else round(1e3 * seconds, 6)
    for name in ("peak_mib", "predicted_mib", "host_mib"):
        out[name] = None if out[name] is None else round(out[name], 1)
    return out


def _identity(
    preset: str, method: Method, streamed: bool, context: int, budget: Budget, terms: Terms, lab: Lab
) -> dict[str, Any]:
    return {
        "preset": preset,
        "context": context,
        "method": method,
        "streamed": streamed,
        "budget_ms": None if budget.step_ms is None else float(f"{budget.step_ms:.9g}"),
        "gpu": lab.profile.name,
        "measures": lab.measures,
        **asdict(lab.network),
        **asdict(terms),
    }


_SOURCE = (*RANK, *PREDICTION, "measure/savings.py", "measure/savings_points.py")
_IDENTITY = (
    *("preset", "context", "method", "streamed", "budget_ms", "gpu", "measures"),
    *(field.name for kind in (Network, Terms) for field in fields(kind)),
)
_ASKED = ("budget_ms", "measures", "max_gpus")  # of these, what is no part of the job


@lru_cache(maxsize=256)
def _reach_of(model: ModelConfig, context: int) -> tuple[int, float]:
    found = report(model, context)
    return found.reach_in_context, found.covered_share


def _reach(preset: str, method: Method, context: int, terms: Terms) -> dict[str, Any]:
    """How far back the last token sees, and what share of the context."""
    if method in EXACT_METHODS:
        reach, share = context - 1, 1.0
    else:
        reach, share = _reach_of(model_of(preset, method, terms), context)
    return {"reach": reach, "covered_share": share}


def errors(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every measured point beside its prediction: share by which the prediction is too high.

    Of what was not measured here, the points that the records that ship have of this job on this GPU.
    """
    kept = _kept_checks()
    return [
        error
        for row in rows
        for point in row.get("checks", ())
        for error in _errors_of(row, point, kept.get(_kept_key(row, point), []))
    ]


def _errors_of(
    row: dict[str, Any], point: dict[str, Any], kept: list[tuple[str, dict[str, Any]]]
) -> Iterator[dict[str, Any]]:
    what = {key: row[key] for key in ("preset", "context", "method", "streamed")}
    for unit, figure, source in (("mib", "peak_mib", "memory_source"), ("ms", "ms", "time_source")):
        predicted, here = point[f"predicted_{unit}"], point[source] != PREDICTED
        for name, measured in [("", point)] if here else kept:
            value = measured[figure]
            if value is not None and measured[source] != PREDICTED:
                yield what | {
                    "gpus": point["num_gpus"],
                    "unit": unit,
                    "measured": value,
                    "source": f"{measured[source]} in records/{name}.json" if name else measured[source],
                    "predicted": predicted,
                    "error": round(predicted / value - 1, 4),
                }


def _kept_key(row: dict[str, Any], check_: dict[str, Any]) -> tuple:
    """What a point is of: all that its row says but what was asked of it."""
    return *(row.get(key) for key in _IDENTITY if key not in _ASKED), check_["num_gpus"]


def _kept_checks() -> dict[tuple, list[tuple[str, dict[str, Any]]]]:
    """(record, point) of all measured points of the records that ship, each once a record."""
    found: dict[tuple, dict[str, dict[str, Any]]] = {}
    for name, record in kept_records().items():
        for row in record["rows"] if "points" in record else ():
            for check_ in row.get("checks", ()):
                if check_["memory_source"] == MEASURED:
                    found.setdefault(_kept_key(row, check_), {})[name] = check_
    return {key: list(of_records.items()) for key, of_records in found.items()}


def sweep(
    path: str | None,
    presets: Sequence[str],
    contexts: Sequence[int],
    methods: Sequence[Method],
    budget: str,
    terms: Terms,
    lab: Lab,
    record: dict[str, Any],
    minutes: float = math.inf,
) -> bool:
    """Add the rows that `record` lacks, for about so many minutes; True if all are there.

    The record is written to `path`, if there is one, after each row and each measured point. Shows a bar, and
    a line for each measured point, on standard error.

    Raises:
        ConfigError: a preset, context, method or budget that makes no sense, before anything is measured.
    """
    from tqdm import tqdm

    wanted = []
    for preset in presets:
        for context in contexts:
            if context < 2:
                raise ConfigError(f"context: context ({context}) >= 2 does not hold")
            limit = parse_budget(budget, context)
            for method, streamed in variants(methods):
                check_model(model_of(preset, method, terms))
                wanted.append((preset, method, streamed, context, limit))
    rows = record["rows"]

    def save() -> None:
        if path is not None:
            write(record, path)

    def say(text: str) -> None:
        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()

    found_with = {
        "budget": budget.partition("=")[0],
        "patience_s": lab.patience_s,
        "real_ranks": lab.real_ranks,
    }
    record["settings"]["complete"] = False
    until = time.monotonic() + 60 * minutes
    with Bench(lab, record.setdefault("points", []), save, say, until) as bench:
        for what in tqdm(wanted, desc="cells", disable=None):
            own = _identity(*what, terms, lab)
            same = (i for i, row in enumerate(rows) if all(row[key] == own[key] for key in own))
            at = next(same, len(rows))
            if at == len(rows) or _has_problem(rows[at]) or _can_do_better(lab, rows[at]):
                try:
                    rows[at : at + 1] = [fewest(*what, terms, bench) | found_with]
                except OutOfTime:
                    return False
                save()
    record["settings"]["complete"] = True
    save()
    return True


def _has_problem(row: dict[str, Any]) -> bool:
    """Whether something should have been measured for it, and could not be: it is tried again."""
    return any(point.get("problem") for point in row.get("checks", ()))


def _can_do_better(lab: Lab, row: dict[str, Any]) -> bool:
    """Whether it measures with more patience or on more GPUs than the row was found with, and no less."""
    has = {"patience_s": lab.patience_s, "real_ranks": lab.real_ranks}
    had = {key: row.get(key, value) for key, value in has.items()}
    return lab.measures and had != has and all(has[key] >= had[key] for key in has)


def begun(path: str | None, lab: Lab) -> dict[str, Any]:
    """The record at `path`, to go on with, or a fresh one.

    Raises:
        UserError: it is one of another GPU profile, device, version or source, or none of savings.
    """
    profile = json.loads(json.dumps(asdict(lab.profile)))
    settings = {"profile": profile, "data": "random tokens", "complete": False}
    record = resume(path, settings, _SOURCE)
    _check_savings(f"{path}", record)
    _check_same(f"{path}", record, "here", record | {"settings": record["settings"] | {"profile": profile}})
    return record


def _check_savings(path: str, record: dict[str, Any]) -> None:
    """Raise UserError unless it is a record of savings, with all that is read of it."""
    try:
        profile_from(record["settings"]["profile"])
        for row in record["rows"]:
            _check_row(row)
        for point in record.get("points", ()):
            _check_types(point, {"job": str, "what": str, "status": str}, ("peak_mib", "ms"))
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{path}: not a record of `pi-dist savings`: {reason}") from error


def _check_row(row: dict[str, Any]) -> None:
    """Raise KeyError or TypeError for a row that lacks something, or has it of another kind."""
    for key in _IDENTITY:
        row[key]
    _check_types(row, {"note": str, "reach": int, "covered_share": float, "gpus": int | None})
    numbers = {"peak_mib": float | int, "ms": float | int}
    of_point = {"num_gpus": int, "memory_source": str, "time_source": str, "predicted_mib": float | int}
    if row["gpus"] is not None:
        _check_types(row, numbers | {"memory_source": str, "time_source": str})
    for point in row.get("checks", ()):
        _check_types(point, of_point | {"predicted_ms": float | int}, tuple(numbers))


def _check_types(values: dict[str, Any], kinds: dict[str, Any], or_none: Sequence[str] = ()) -> None:
    for key, kind in kinds.items() | {(key, float | int | None) for key in or_none}:
        if not isinstance(values[key], kind):
            raise TypeError(f"{key} ({values[key]!r}) is of type {type(values[key]).__name__}")


def _check_same(path: str, mine: dict[str, Any], where: str, theirs: dict[str, Any]) -> None:
    """Rows that are compared are of one GPU, the same in all its constants, one device,
    one state of the code.

    Raises:
        UserError: they are of two.
    """
    profile, other = (record["settings"]["profile"] for record in (mine, theirs))
    names = profile["name"], other["name"]
    if profile != other:
        differ = [key for key in other | profile if profile.get(key) != other.get(key)]
        raise UserError(
            f"{path}: profile of the record ({names[0]}) == {where} ({names[1]}) does not hold"
            + (f": other {', '.join(differ)}" if names[0] == names[1] else "")
        )
    for key in ("device", "versions", "source"):
        a, b = ((record["settings"] if key == "source" else record).get(key) for record in (mine, theirs))
        if a != b:
            raise UserError(f"{path}: {key} of the record ({a}) == {where} ({b}) does not hold")


def merged(paths: Sequence[str]) -> dict[str, Any]:
    """One record of the rows of several, as the tasks of a SLURM array leave them.

    Of equal rows the last stays. Says on standard error which records are not complete.

    Raises:
        UserError: a file is no record of savings, or not comparable with the first.
    """
    records = []
    for path in paths:
        try:
            records.append(json.loads(Path(path).read_text("utf-8")))
        except ValueError as error:
            raise UserError(f"{path}: not a record of `pi-dist savings`") from error
        _check_savings(path, records[-1])
        _check_same(path, records[-1], f"of {paths[0]}", records[0])
    complete = [record["settings"].get("complete", True) for record in records]
    for path, whole in zip(paths, complete, strict=True):
        if not whole:
            print(f"{path}: not complete, rows are left", file=sys.stderr)
    rows = {tuple(row.get(key) for key in _IDENTITY): row for record in records for row in record["rows"]}
    points = {point["job"]: point for record in records for point in record.get("points", ())}
    joined = {"rows": [*rows.values()], "points": [*points.values()]}
    return records[0] | {"settings": records[0]["settings"] | {"complete": all(complete)}} | joined
