"""The search for the fewest GPUs, what it measures, reports and their command."""

import dataclasses
import json
import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_cost_model import H100, job, run

from pi_dist.config import ConfigError, UserError
from pi_dist.measure import savings_points
from pi_dist.measure.profile import NETWORKS, write_profile
from pi_dist.measure.record import device_name, kept_records, write
from pi_dist.measure.savings import (
    Budget,
    Terms,
    begun,
    config_of,
    errors,
    fewest,
    first_true,
    merged,
    ms_text,
    parse_budget,
    sweep,
)
from pi_dist.measure.savings_points import Bench, Lab, OutOfTime
from pi_dist.measure.savings_report import draw, markdown, saving
from pi_dist.measure.step_model import compute_seconds, memory, work
from pi_dist.measure.workers import OUT_OF_MEMORY

LAB = Lab(H100, NETWORKS["infiniband"])
BENCH = Bench(LAB)  # measures nothing


@given(st.integers(0, 40), st.integers(0, 40), st.integers(-3, 43))
def test_the_search_finds_the_first_true(count, first, guess):
    asked = []

    def holds(index):
        asked.append(index)
        return index >= first

    found = first_true(count, holds, guess)
    assert found == (first if first < count else None)
    assert len(asked) == len(set(asked)) and all(0 <= index < count for index in asked)
    if count and guess == first < count:
        assert len(asked) <= 2


@pytest.mark.parametrize(
    ("text", "ms"), [("memory", None), ("step_ms=250", 250.0), ("tokens_per_s=1000", 4000.0)]
)
def test_budgets(text, ms):
    assert parse_budget(text, 4000) == Budget(ms)


@pytest.mark.parametrize("text", ["", "time=3", "step_ms=", "step_ms=-1", "step_ms=x", "memory=3"])
def test_a_budget_that_makes_no_sense_is_refused(text):
    with pytest.raises(ConfigError, match="does not hold"):
        parse_budget(text, 4000)


def test_what_cannot_be_split_is_said_in_words():
    def note(method, context, streamed=False, budget=None, **terms):
        row = fewest("small", method, streamed, context, Budget(budget), Terms(**terms), BENCH)
        assert row["gpus"] is None
        return row["note"]

    assert "nothing to stream" in note("pi", 1024, streamed=True)
    assert "does not hold; ring and ulysses are exact" in note("dense", 2**22)
    assert "'ulysses' does not hold" in note("ulysses", 2**22, budget=100.0)
    assert "100 (predicted); more do not help" in note("ring", 2**22, budget=100.0)
    assert "100 (predicted); more than 64 were not tried" in note("ring", 2**22, budget=100.0, max_gpus=64)
    prime = note("ring", 4_194_301)
    assert "not on 1 GPU" in prime and prime.endswith("; of more, up to 1,024, none divides 4,194,301")
    assert "context (4) > model.window (4) does not hold" in note("window", 4)


def test_numbers_of_gpus_that_were_passed_over_are_named():
    """Six would be enough, but a ring's balanced shards are halves."""
    row = fewest("small", "ring", False, 4_194_306, Budget(), Terms(), BENCH)
    assert row["gpus"] == 9 and row["note"].startswith("(6: training.context: context (4194306) % (2 × ")
    profile = json.loads(json.dumps(dataclasses.asdict(H100)))
    assert row["note"] in markdown({"rows": [row], "settings": {"profile": profile}})


def test_what_is_predicted_stands_beside_what_was_measured_before():
    """By the records that ship, of that GPU and job; whatever was asked of it."""
    row = fewest("small", "pi", True, 131072, Budget(300.0), Terms(max_gpus=4), BENCH)
    found = [(e["gpus"], e["source"], e["measured"]) for e in errors([row]) if e["unit"] == "ms"]
    of_one = {
        name: point["ms"]
        for name in ("savings_h100", "savings_time_h100")
        for point in kept_records()[name]["points"]
        if point["what"] == "small pi in chunks 131,072 on 1"
    }
    measured = [(1, f"measured in records/{name}.json", pytest.approx(ms)) for name, ms in of_one.items()]
    composed = [(gpus, source) for gpus, source, _ in found if gpus == 2]
    assert found[:2] == measured and composed == [(2, "composed in records/savings_time_h100.json")]
    elsewhere = {"rows": [row | {"gpu": "A100"}], "settings": {"profile": dataclasses.asdict(H100)}}
    assert "Nothing was measured here: every figure is predicted." in markdown(elsewhere)


def test_no_saving_is_all_of_the_gpus():
    one, many = ({"gpus": number} for number in (1, 1024))
    assert saving(one, many) == "over 99%" and saving(one, one) == "0%"


def test_every_row_has_its_reach():
    rows = {m: fewest("small", m, False, 65536, Budget(), Terms(), BENCH) for m in ("pi", "window", "ring")}
    assert {method: row["reach"] for method, row in rows.items()} == {"pi": 192, "window": 48, "ring": 65535}
    assert rows["ring"]["covered_share"] == 1.0
    doubling = Terms(schedule="doubling")
    assert fewest("small", "pi", False, 65536, Budget(), doubling, BENCH)["reach"] > 30000
    beyond = Terms(stride=50000)  # two such strides leave the sequence
    assert fewest("small", "pi", False, 65536, Budget(), beyond, BENCH)["reach"] == 50044
    assert fewest("small", "ring", False, 65536, Budget(), Terms(window=10**6), BENCH)["gpus"] == 1


class PretendedGpu:
    """Says, in place of a worker, what a GPU would whose memory and speed are shares of the prediction."""

    def __init__(self, memory_share, time_share):
        self.shares, self.asked = (memory_share, time_share), []

    def __exit__(self, *_):
        pass

    def ask(self, request, timeout_s):
        self.asked.append((request.config.model.method, request.world_size, request.rank))
        point = LAB.predict(request.config, request.world_size)
        mib = point.peak_mib * self.shares[0]
        if mib > request.limit_mib:
            return {"status": OUT_OF_MEMORY}
        compute = compute_seconds(work(request.config, request.world_size, H100), H100)
        ms = 1e3 * compute * self.shares[1] if request.timed_steps else None
        return {"status": "ok", "peak_mib": mib, "ms": ms}


@pytest.fixture
def gpu(monkeypatch):
    def pretend(memory_share, time_share):
        found = PretendedGpu(memory_share, time_share)
        monkeypatch.setattr(savings_points, "Worker", lambda: found)
        monkeypatch.setattr(savings_points, "measured_apart", lambda asked, t: [found.ask(asked[0], t)])
        return found

    return pretend


def test_a_wrong_prediction_is_put_right_by_measuring(gpu):
    lab = dataclasses.replace(LAB, measures=True)
    assert fewest("small", "pi", False, 2**20, Budget(), Terms(), BENCH)["gpus"] == 1
    asked, lines = gpu(3.5, 1.0), []
    row = fewest("small", "pi", False, 2**20, Budget(), Terms(), Bench(lab, say=lines.append))
    assert (row["gpus"], row["memory_source"], row["time_source"]) == (4, "measured", "composed")
    assert [p for _, p, _ in asked.asked] == [1, 2, 8, 4]
    assert [p["fits"] for p in row["checks"]] == [False, False, True, True]
    found = [e for e in errors([row]) if e["unit"] == "mib"]
    assert [e["error"] for e in found] == pytest.approx([1 / 3.5 - 1] * 2, abs=1e-3)
    assert len(lines) == 4
    assert re.match(r"small pi 1,048,576 on 1: out of memory \([\d,]+ predicted\); ", lines[0])


def test_memory_is_sought_beyond_the_fastest_number_of_gpus(gpu):
    """Over Ethernet a ring is fastest on the GPUs of one node; these are not enough, fourteen are."""
    lab = Lab(H100, dataclasses.replace(NETWORKS["ethernet"], fabric_bytes_per_s=1.25e9), measures=True)
    gpu(1.08, 1.0)
    row = fewest("large", "ring", False, 3_670_016, Budget(), Terms(), Bench(lab))
    tried = {point["num_gpus"]: point["fits"] for point in row["checks"]}
    assert row["gpus"] == 14 and not tried[8]


def test_what_cannot_be_measured_is_said_and_tried_again(gpu, monkeypatch, tmp_path):
    pretended, path = gpu(1.0, 1.0), tmp_path / "s.json"
    lab = dataclasses.replace(LAB, measures=True)
    ask = pretended.ask
    pretended.ask = lambda request, _: {"status": "the worker has died"}
    record = begun(str(path), lab)
    what = ["small"], [131072], ["window"]
    sweep(str(path), *what, "memory", Terms(), lab, record)
    assert "(measuring failed: the worker has died)" in markdown(record)
    pretended.ask = ask
    sweep(str(path), *what, "memory", Terms(), lab, record)
    assert [row["memory_source"] for row in record["rows"]] == ["measured"] * 2


def test_rows_that_chunks_keep_lie_where_the_run_puts_them():
    """Covering strides: refused on few GPUs, as the run refuses them; else in host memory, and said."""
    covering = Terms(window=64, stride=65, num_skips=16, schedule="doubling")
    row = fewest("medium", "pi", True, 2**22, Budget(), covering, BENCH)
    assert row["gpus"] == 4
    row = fewest("medium", "pi", True, 2**22, Budget(), dataclasses.replace(covering, max_gpus=2), BENCH)
    assert row["gpus"] is None and "training.kept_rows: kept rows (238.3 GiB)" in row["note"]
    config = config_of("small", "pi", True, 2**24, 1, covering)
    need = memory(config, 1, H100)
    assert need.host > 300 * 1024 and need.kept > 30 * 1024


def test_time_on_one_gpu_or_on_real_ranks_is_measured_else_composed(gpu):
    lab = dataclasses.replace(LAB, measures=True, real_ranks=2)
    asked = gpu(1.0, 1.0)
    bench = Bench(lab)
    sources = {p: bench.point(job("pi", num_gpus=p), p, "").time_source for p in (1, 2, 4)}
    assert sources == {1: "measured", 2: "measured", 4: "composed"}
    assert asked.asked == [("pi", 1, 0), ("pi", 2, None), ("pi", 4, 2)]


def test_of_steps_that_take_too_long_only_memory_is_measured(gpu):
    asked = gpu(1.0, 1.0)
    lab = dataclasses.replace(LAB, measures=True, patience_s=20.0)
    row = fewest("large", "ring", False, 2**22, Budget(), Terms(), Bench(lab))
    assert (row["memory_source"], row["time_source"]) == ("measured", "predicted") and asked.asked
    lab = dataclasses.replace(lab, patience_s=0.1)
    row = fewest("large", "ring", False, 2**22, Budget(), Terms(), Bench(lab))
    assert (row["memory_source"], row["time_source"]) == ("predicted", "predicted")


def test_what_is_far_beyond_memory_is_not_measured(gpu):
    asked = gpu(1.0, 1.0)
    bench = Bench(dataclasses.replace(LAB, measures=True))
    row = fewest("small", "pi", False, 2**22, Budget(), Terms(), bench)
    usable = H100.usable_mib
    beyond = [point for point in row["checks"] if point["memory_source"] == "predicted"]
    assert all(not point["fits"] and point["predicted_mib"] > 1.25 * usable for point in beyond)
    assert row["memory_source"] == "measured" and len(beyond) + len(asked.asked) == len(row["checks"])
    dense = fewest("large", "dense", False, 2**22, Budget(), Terms(), bench)
    assert dense["gpus"] is None and "(predicted)" in dense["note"]
    assert all(method != "dense" for method, _, _ in asked.asked)


def test_a_measured_point_is_kept_and_shared_by_what_is_the_same_on_one_gpu(gpu):
    asked, known, saved = gpu(1.0, 1.0), [], []
    lab = dataclasses.replace(LAB, measures=True)
    bench = Bench(lab, known, lambda: saved.append(len(known)))
    for method in ("dense", "ring", "ulysses", "pi"):
        bench.point(job(method), 1, method)
    assert [method for method, _, _ in asked.asked] == ["dense", "pi"] and saved == [1, 2]
    again = Bench(lab, json.loads(json.dumps(known))).point(job("pi"), 1, "pi")
    assert len(asked.asked) == 2 and again.memory_source == "measured" and again.time_source == "measured"
    gpu(2.0, 1.0)  # another job is another point
    other = Bench(lab, known).point(job("pi", stride=32), 1, "")
    assert other.peak_mib == pytest.approx(2 * other.predicted_mib)


def test_a_time_that_was_not_asked_for_is_measured_when_it_is(gpu):
    asked, known = gpu(1.0, 1.0), []
    hasty, patient = (Bench(dataclasses.replace(LAB, measures=True, patience_s=s), known) for s in (0.1, 60))
    config = job("ring", num_gpus=4)
    assert [b.point(config, 4, "").time_source for b in (hasty, patient, hasty)] == [
        "predicted",
        "composed",
        "composed",
    ]
    assert len(asked.asked) == 2


def test_what_would_end_too_late_is_not_begun(gpu):
    asked = gpu(1.0, 1.0)
    bench = Bench(dataclasses.replace(LAB, measures=True), until=0.0)
    assert bench.point(job(), 1, "").memory_source == "measured"  # else nothing would ever be measured
    with pytest.raises(OutOfTime):
        bench.point(job(num_gpus=2), 2, "")
    assert len(asked.asked) == 1


@pytest.mark.slow
def test_measuring_works_from_the_command_on(tmp_path, capsys):
    """A profile that calls a CPU its GPU: real processes, fake ranks."""
    apart = {
        "fixed_mib": 0.0,
        "gpu_layer_us": 1.0,
        "host_layer_us": 10.0,
    }  # a GPU and its host need more than all of the tiny model
    mine = dataclasses.replace(H100, name="mine", device=device_name(), memory_mib=2560.0 + 4.5, **apart)
    write_profile(mine, str(tmp_path / "mine.json"))
    flags = [
        "--gpu",
        str(tmp_path / "mine.json"),
        "--preset",
        "tiny",
        "--context",
        "4096",
        "--methods",
        "pi,ring",
    ]
    assert run("savings", *flags, "--max-gpus", "8", "--json", str(tmp_path / "s.json")) == 0
    rows = json.loads((tmp_path / "s.json").read_text())["rows"]
    found = [p for row in rows for p in row.get("checks", ()) if p["num_gpus"] == row["gpus"]]
    assert found and {p["memory_source"] for p in found} == {"measured"}, found
    assert {p["time_source"] for p in found} <= {"measured", "composed"}
    said = capsys.readouterr()
    assert "Largest error" in said.out and re.search(r"tiny ring 4,096 on \d: [\d,]+ MiB", said.err)
    record = json.loads((tmp_path / "s.json").read_text())
    assert record["points"] and not (tmp_path / "s.json.part").exists()
    record["rows"].pop()
    (tmp_path / "s.json").write_text(json.dumps(record))
    flags += ["--max-gpus", "8", "--json", str(tmp_path / "s.json")]
    assert run("savings", *flags) == 0 and " on " not in capsys.readouterr().err  # nothing again
    (tmp_path / "s.json").unlink()
    assert run("savings", *flags, "--minutes", "0.0001") == 3
    assert "run it again to go on" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "s.json").read_text())["points"]) == 1


def test_the_command_writes_record_report_and_figure_and_goes_on(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    record, report, figure = (tmp_path / name for name in ("s.json", "s.md", "s.png"))
    flags = ["savings", "--preset", "small,large", "--methods", "pi,ring,dense", "--json", str(record)]
    assert run(*flags, "--context", "65536,1000003") == 0
    before = record.read_text()
    assert (
        run(*flags, "--context", "65536,1000003,4194304", "--report", str(report), "--plot", str(figure)) == 0
    )
    rows = json.loads(record.read_text())["rows"]
    assert len(rows) == 2 * 3 * 4 and all(
        json.dumps(row) in record.read_text() for row in json.loads(before)["rows"]
    )
    text = report.read_text()
    assert "measured in records/savings_h100.json" in text
    assert "## large, 4,194,304 tokens, within memory" in text and "0.0%" in text
    assert re.search(
        r"\| ring \| \*\*(\d+)\*\* \([\d.]+ GiB p, [\d,]+ ms p; on \d+: [\d.]+ GiB p\) \| 4,194,303 \|", text
    )
    assert figure.stat().st_size > 10_000
    capsys.readouterr()
    joined = tmp_path / "joined.json"
    assert run("savings", "--from", str(record), str(record), "--json", str(joined)) == 0
    assert (
        len(json.loads(joined.read_text())["rows"]) == 24
        and "# GPUs that a context needs" in capsys.readouterr().out
    )


def swept(path, lab=LAB, budget="memory", contexts=(65536,), methods=("pi", "ring"), preset="small", **more):
    """The record at a path, with these rows added; the file is there even if the time is up."""
    record = begun(str(path), lab)
    terms = Terms(**more.pop("terms", {}))
    sweep(str(path), [preset], list(contexts), list(methods), budget, terms, lab, record, **more)
    return record


def test_a_record_is_of_one_gpu_in_all_its_constants(tmp_path, capsys):
    record, mine = tmp_path / "s.json", tmp_path / "mine.json"
    flags = ["savings", "--context", "65536", "--methods", "pi", "--json"]
    assert run(*flags, str(record)) == 0
    before = record.read_text()
    capsys.readouterr()
    assert run(*flags, str(record), "--gpu", "A100") == 2
    error = capsys.readouterr().err
    assert "profile of the record (H100) == here (A100) does not hold" in error and error.count("\n") == 1
    write_profile(dataclasses.replace(H100, host_layer_us=1.0), str(mine))  # of the same name
    assert run(*flags, str(record), "--gpu", str(mine)) == 2
    error = capsys.readouterr().err
    assert "(H100) == here (H100) does not hold: other host_layer_us" in error and error.count("\n") == 1
    assert record.read_text() == before and run(*flags, str(record)) == 0
    for source in ('"of old"', "null"):  # the code that measured, which also takes no record from before it
        record.write_text(re.sub(r'"source": "\w+"', f'"source": {source}', before))
        assert run(*flags, str(record)) == 2
        error = capsys.readouterr().err
        assert "source of the record (" in error and error.count("\n") == 1
    record.write_text(before)
    other = tmp_path / "a.json"
    assert run(*flags, str(other), "--gpu", "A100") == 0
    assert "On A100 (by its data sheet), " in capsys.readouterr().out
    assert run("savings", "--from", str(record), str(other)) == 2
    error = capsys.readouterr().err
    assert f"{other}: profile of the record (A100) == of {record} (H100)" in error and error.count("\n") == 1


def test_what_is_measured_and_what_is_not_are_tables_of_their_own(gpu, tmp_path):
    gpu(1.0, 1.0)
    swept(tmp_path / "s.json")
    text = markdown(swept(tmp_path / "s.json", dataclasses.replace(LAB, measures=True)))
    assert text.count("## small, 65,536 tokens") == 2 == text.count("| fewer than π |")
    assert "\nPredicted; ZeRO 1" in text and "\nMeasured where this GPU can; ZeRO 1" in text


def test_what_ran_out_of_memory_unforeseen_is_named(gpu, tmp_path):
    lab = dataclasses.replace(LAB, measures=True)
    for share, said in (
        (1.0, None),
        (1.45, "predicted to fit: small 1,048,576 window on 1 (54.3 GiB predicted)."),
    ):
        gpu(share, 1.0)
        text = markdown(swept(tmp_path / f"{share}.json", lab, contexts=(2**20,), methods=["window"]))
        assert ("1 points ran out of memory" in text) == (said is not None) and (said or "") in text


@pytest.mark.parametrize(
    ("where", "key", "value"),
    [(None, "device", "other"), (None, "versions", {"torch": "2.1.0"}), ("settings", "source", "of old")],
)
def test_records_that_cannot_be_compared_are_not_joined(tmp_path, where, key, value):
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    record = swept(one)
    (record if where is None else record[where])[key] = value
    two.write_text(json.dumps(record))
    with pytest.raises(UserError, match=rf"{two}: {key} of the record \(.*\) == of {one} \("):
        merged([str(one), str(two)])


def test_joined_records_have_no_row_twice_and_the_later_stays(tmp_path):
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    rows = swept(one)["rows"] + swept(two, contexts=(131072,))["rows"]
    assert merged([str(one), str(two), str(one)])["rows"] == rows
    record = json.loads(one.read_text())
    record["rows"][0]["ms"] = 12345.0
    two.write_text(json.dumps(record))
    assert merged([str(one), str(two)])["rows"][0]["ms"] == 12345.0


def test_a_record_that_lacks_rows_is_named_when_it_is_joined(gpu, tmp_path, capsys):
    gpu(1.0, 1.0)
    lab = dataclasses.replace(LAB, measures=True)
    whole, part, joined = (tmp_path / f"{name}.json" for name in ("whole", "part", "joined"))
    assert swept(whole, lab)["settings"]["complete"] is True
    assert len(swept(part, lab, contexts=(131072,), minutes=0.0)["rows"]) == 1
    capsys.readouterr()
    assert run("savings", "--from", str(whole), str(part), "--json", str(joined)) == 3
    assert capsys.readouterr().err == f"{part}: not complete, rows are left\n"
    assert json.loads(joined.read_text())["settings"]["complete"] is False
    swept(part, lab, contexts=(131072,))
    capsys.readouterr()
    assert run("savings", "--from", str(whole), str(part)) == 0 and not capsys.readouterr().err


def test_more_patience_or_more_gpus_improve_a_row_and_less_do_not(gpu, tmp_path):
    asked, path = gpu(1.0, 1.0), tmp_path / "s.json"

    def sources(patience_s, real_ranks=1):
        lab = dataclasses.replace(LAB, measures=True, patience_s=patience_s, real_ranks=real_ranks)
        rows = swept(path, lab, "step_ms=200", (131072,), ["pi"], terms={"chunk_tokens": 131072})["rows"]
        assert len(rows) == 2 and rows[0]["gpus"] == 2
        return rows[0]["time_source"]

    assert [sources(0.01), sources(60.0), sources(0.01)] == ["predicted", "composed", "composed"]
    assert sources(60.0, real_ranks=2) == "measured"
    count = len(asked.asked)
    assert sources(60.0) == sources(0.01, real_ranks=4) == "measured" and len(asked.asked) == count


@pytest.mark.parametrize(
    ("ms", "budget_ms", "said"),
    [
        *((200.004, 200.0, "200.004"), (250.0, 200.0, "250"), (199.996, 200.0, "200"), (0.41, 0.4, "0.41")),
        *((0.3, None, "0.3"), (1234.6, None, "1,235"), (65.53, 65.536, "65.5"), (1e-12, 1.0, "0.000000000")),
    ],
)
def test_a_time_is_beyond_a_budget_as_printed_too(ms, budget_ms, said):
    assert ms_text(ms, budget_ms) == said


def test_budgets_are_printed_as_they_are(tmp_path):
    ms = fewest("small", "pi", False, 65536, Budget(), Terms(), BENCH)["ms"]
    text = markdown(swept(tmp_path / "s.json", budget=f"step_ms={ms - 0.003:.4f}", methods=["pi"]))
    limit = re.search(r"within ([\d.]+) ms a step", text)[1]
    assert limit == f"{ms - 0.003:.4f}".rstrip("0")
    assert float(re.search(r"on 1: ([\d.]+) ms", text)[1]) > float(limit)
    record = swept(tmp_path / "t.json", budget="step_ms=0.3", methods=["ring"])
    assert re.search(r"not on \d+ GPUs: [\d,]+ ms a step > 0.3 \(predicted\)", markdown(record))
    assert "within 0.3 ms a step" in markdown(record) and "— says" in markdown(record)


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws a record; what is in the figure."""
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    from pi_dist.measure import figures

    def draw_it(record):
        found, save = [], figures.save

        def look(figure, path):
            save(figure, path)
            page, legend = figure.bbox, figure.legends[0].get_texts()
            texts = [*figure.texts, *legend, *(axes.title for axes in figure.axes)]
            corners = [(text, xy) for text in texts for xy in text.get_window_extent().corners()]
            outside = [text.get_text() for text, xy in corners if not page.contains(*xy)]
            legend = [text.get_text() for text in legend]
            found.append(SimpleNamespace(axes=figure.axes, legend=legend, outside=outside))

        monkeypatch.setattr(figures, "save", look)
        draw(record, tmp_path / "s.png")
        monkeypatch.setattr(figures, "save", save)
        return found[0]

    return draw_it


def curves_of(axes):
    """[(contexts, GPUs)] of the strong lines, in order."""
    lines = [line for line in axes.lines if line.get_linestyle() != "None" and line.get_alpha() is None]
    return [[list(data) for data in line.get_data()] for line in lines]


def test_a_curve_of_the_figure_is_one_budget_and_one_pattern(drawn, tmp_path):
    path = tmp_path / "s.json"
    for budget in ("memory", "step_ms=100", "step_ms=200", "tokens_per_s=500000"):
        record = swept(path, contexts=(65536, 131072), budget=budget, methods=["ring"])
    figure = drawn(record)
    assert [x for x, _ in curves_of(figure.axes[0])] == [[65536, 131072]] * 4
    assert figure.legend[1:5] == [
        *("within memory", "within 100 ms a step", "within 200 ms a step", "500,000 tokens/s")
    ]
    assert not figure.outside
    record = swept(tmp_path / "t.json", methods=["window"])
    record = swept(tmp_path / "t.json", methods=["window"], terms={"window": 8})
    assert drawn(record).legend[2:4] == ["within memory, window 4", "within memory, window 8"]


def test_the_figure_names_what_is_in_any_panel_and_marks_what_fits_nowhere(drawn, tmp_path):
    path = tmp_path / "s.json"
    swept(path, methods=["dense"], contexts=(65536, 2**22))
    figure = drawn(swept(path, methods=["pi", "ring"], preset="large"))
    assert figure.legend[:4] == ["dense", "π", "π, streamed", "ring"]
    assert figure.legend[-3:-1] == ["memory predicted", "none: see the report"]
    assert figure.legend[-1] == "equal numbers: side by side"
    crosses = [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_marker() == "x"]
    assert crosses == [2**22]
    ticks = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert ticks == ["1", "2", "4", "8", "none"]
    assert figure.axes[0].get_ylim()[0] == 0.8 and not figure.outside


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--methods", "pi,flash"], "methods: pi, flash in"),
        (["--preset", "huge"], "preset: 'huge' in"),
        (["--budget", "money"], "budget: 'money' in"),
        (["--budget", "tokens_per_s=1e-320"], "budget: 'tokens_per_s=1e-320' in"),
        (["--context", "9" * 20, "--methods", "pi"], f"context ({'9' * 20}) <= 2^31"),
        (["--plot", "curves.xyz"], "plot: suffix of 'curves.xyz' in"),
        (["--plot", "nowhere/curves.svg"], "plot: 'nowhere' is not a directory"),
        (["--context", "4k"], "context: numbers from 1 on with commas"),
        (["--context", "4096,0"], "context: numbers from 1 on with commas"),
        (["--context", "²"], "context: numbers from 1 on with commas"),
        (["--context", "1"], "context (1) >= 2"),
        (["--gpu", "TPU"], "gpu: 'TPU' in"),
        (["--gpu", "this"], "gpu: GPUs of this machine (0) >= 1 does not hold"),
        (["--json", "tests"], "json: 'tests' is a directory"),
        (["--json", "nowhere/s.json"], "json: 'nowhere' is not a directory"),
        (["--report", "nowhere/s.md"], "report: 'nowhere' is not a directory"),
        (["--minutes", "-1"], "minutes: minutes (-1.0) > 0 does not hold"),
        (["--max-gpus", "0"], "max_gpus (0) >= 1"),
        (["--network", "carrier"], "network: 'carrier' in"),
        (["--fabric-gbytes-per-s", "0"], "fabric_bytes_per_s (0.0) > 0"),
        (["--mlp-tile-tokens", "0"], "mlp_tile_tokens (0) >= 1 does not hold"),
        (["--node-gbytes-per-s", ".nan"], "node_bytes_per_s (nan) > 0"),
        (["--from", "pyproject.toml"], "not a record of `pi-dist savings`"),
    ],
)
def test_flags_that_make_no_sense_are_refused_in_one_line(flags, said, capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    assert run("savings", *flags) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_links_within_a_node_are_what_is_said(capsys):
    flags = [
        "savings",
        "--context",
        "1048576",
        "--methods",
        "ulysses",
        "--max-gpus",
        "4",
        "--preset",
        "medium",
    ]
    assert run(*flags) == 0
    fast = capsys.readouterr().out
    assert run(*flags, "--node-gbytes-per-s", "20") == 0
    slow = capsys.readouterr().out
    assert "8 a node at 296 GB/s each (as two H200)," in fast and "8 a node at 20 GB/s each," in slow
    milliseconds = [float(re.search(r"([\d,]+) ms p", text)[1].replace(",", "")) for text in (fast, slow)]
    assert milliseconds[1] > milliseconds[0] + 100


def test_a_task_of_the_array_takes_its_context(tmp_path):
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@" >said\n')
    python.chmod(0o755)
    script = Path(__file__).parent.parent / "slurm/savings.sbatch"

    def task(number, *arguments):
        environment = os.environ | {"SLURM_ARRAY_TASK_ID": number, "SLURM_JOB_ID": "7"}
        command = ["bash", str(script), *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    assert task("12", "out", "--gpu", "this").returncode == 0
    flags = (tmp_path / "said").read_text().split()
    assert flags[2:7] == ["savings", "--minutes", "55", "--gpu", "this"]
    assert flags[7:] == ["--context", str(2**24), "--json", f"out/{2**24}.json"]
    assert (tmp_path / "out").is_dir()
    for number, arguments, said in (("0", (), "usage"), ("13", ("out",), "task (13) < 13 does not hold")):
        refused = task(number, *arguments)
        assert refused.returncode == 2 and said in refused.stderr


@pytest.mark.parametrize(
    ("place", "change", "said"),
    [
        ("rows", {"gpus": "many"}, "gpus ('many') is of type str"),
        ("rows", {"gpus": 1, "ms": None}, "ms (None) is of type NoneType"),
        ("rows", {"preset": ...}, "no 'preset'"),
        ("rows", {"checks": [{"num_gpus": 1}]}, "no '"),
        ("points", {"job": 5}, "job (5) is of type int"),
    ],
)
def test_a_damaged_record_is_refused_in_one_line(tmp_path, capsys, place, change, said):
    record = kept_records()["savings_time_h100"]
    first = record[place][0] | change
    record[place][0] = {key: value for key, value in first.items() if value is not ...}
    write(record, str(tmp_path / "s.json"))
    assert run("savings", "--from", str(tmp_path / "s.json")) == 2
    error = capsys.readouterr().err
    assert "s.json: not a record of `pi-dist savings`: " in error and said in error and error.count("\n") == 1


def test_a_time_without_what_far_rows_take_says_so(capsys):
    flags = ["savings", "--context=4194304", "--methods=pi", "--max-gpus=1", "--chunk-tokens=32768"]
    assert run(*flags) == 0 and "rows of other chunks" not in capsys.readouterr().out
    far = ["--window=64", "--stride=65", "--num-skips=16", "--schedule=doubling"]
    assert run(*flags, *far) == 0
    assert (
        " ms p without reading rows of other chunks, 2 to 4 times as long with it" in capsys.readouterr().out
    )


def test_several_gpus_share_chunks_that_divide_the_context():
    chunk = {p: config_of("small", "pi", True, 10**6, p, Terms()).training.chunk_tokens for p in (1, 2, 4)}
    assert chunk == {1: 32768, 2: 62500, 4: 125000}
    with pytest.raises(ConfigError, match="chunk_tokens"):
        config_of("small", "pi", True, 2 * 1_000_003, 2, Terms())
