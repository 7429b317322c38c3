"""Records that ship: complete rows, and the README shows exactly their figures."""

import json
import re
from pathlib import Path

import pytest

from pi_dist.config import UserError
from pi_dist.measure.record import kept_records, resume, write
from pi_dist.measure.tables import PAGE, markdown_page, markdown_table

ROOT = Path(__file__).parents[1]
STEP_ROW = {
    "method",
    "tokens",
    "sp_degree",
    "zero_stage",
    "ms",
    "tokens_per_s",
    "mfu",
    "peak_mib",
    "reserved_mib",
}
STEP_ROW |= {"reach", "covered_share", "measured"}
KERNEL_ROW = {"method", "direction", "batch", "tokens", "heads", "window", "strides", "num_skips", "head_dim"}
KERNEL_ROW |= {"dtype", "ms", "floor_ms", "copy_share"}
SOURCES = {"measured", "composed", "predicted"}  # of a row of savings


@pytest.mark.parametrize("name", kept_records())
def test_a_record_says_how_it_was_made(name):
    record = kept_records()[name]
    of_savings = {"points"} if "gpus" in record["rows"][0] else set()
    assert set(record) - of_savings == {"command", "device", "versions", "settings", "rows"}
    assert {"torch", "deepspeed", "python"} <= set(record["versions"]) and record["rows"]
    if "what" in record["rows"][0]:
        assert {row["what"] for row in record["rows"]} <= {"table", "layer", "kl"}
        return
    if "gpus" in record["rows"][0]:
        for row in record["rows"]:
            assert row["gpus"] is None or {row["memory_source"], row["time_source"]} <= SOURCES, row
        return
    if "floor_ms" in record["rows"][0]:
        copies = [ceiling["copy_bytes_per_s"] for ceiling in record["settings"]["slices"]]
        for row in record["rows"]:
            assert set(row) >= KERNEL_ROW
            if row["ms"] is None:
                assert row["note"]
                continue
            assert row["times_floor"] == pytest.approx(row["ms"] / row["floor_ms"], rel=1e-2)
            shares = [row["bytes"] / copy / row["ms"] * 1e3 for copy in copies]
            assert any(row["copy_share"] == pytest.approx(x, rel=1e-2, abs=1e-4) for x in shares)
        return
    for row in (row for row in record["rows"] if row["ms"] is not None):
        assert set(row) >= STEP_ROW
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] * row["batch"] / row["ms"] * 1e3, rel=1e-3)
        assert 0 <= row["covered_share"] <= 1 and row["reach"] >= 0


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"rows": [', "Expecting value"),
        (b"", "Expecting value"),
        (b"\xff", "invalid start byte"),
        (b"[" * 100_000, "recursion"),
        (b"[]", "type (list) == object does not hold"),
        (b"{}", "device of the record (None)"),
    ],
)
def test_what_is_no_record_is_not_gone_on_with(tmp_path, content, reason):
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        resume(str(path), {})
    text = str(error.value)
    assert text.startswith(f"{path}: ") and reason in text and "\n" not in text
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"settings": None}, "type of settings == object"),
        ({"rows": None}, "type of rows == list of objects"),
        ({"rows": [1]}, "type of rows == list of objects"),
    ],
)
def test_a_record_without_settings_or_rows_is_not_gone_on_with(tmp_path, changed, reason):
    path = tmp_path / "record.json"
    path.write_text(json.dumps(resume(None, {}) | changed))
    with pytest.raises(UserError, match=f"not a record: {reason} does not hold"):
        resume(str(path), {})


def test_the_page_of_records_is_up_to_date():
    assert PAGE.read_text() == markdown_page()


def test_figures_of_the_readme_are_those_of_the_records():
    """All of its tables but that of claims: each is of lines of the records of one device."""
    readme, of_device = (ROOT / "README.md").read_text(), {}
    for record in kept_records().values():
        of_device.setdefault(record["device"], set()).update(markdown_table(record).split("\n"))
    tables = [table.strip().split("\n") for table in re.findall(r"(?:^\|.*\n)+", readme, re.MULTILINE)]
    assert len(tables) > 15
    for table in tables:
        of_one = any(set(table) <= lines for lines in of_device.values())
        assert of_one != (table[0] == "| claim | how it is checked |"), table


def test_a_written_record_reads_back_the_same(tmp_path):
    record = kept_records()["kernels_h200"]
    write(record, str(tmp_path / "record.json"))
    assert json.loads((tmp_path / "record.json").read_text()) == record


@pytest.mark.parametrize("name", ["kernels_h100", "kernels_h200"])
def test_floor_counts_each_tensor_once(name):
    """The bytes of the floor: (2H+2H)·n·D·2 + 8nH forward, (4H+4H)·n·D·2 + 12nH backward."""
    for row in kept_records()[name]["rows"]:
        rows = row["batch"] * row["tokens"] * row["heads"]
        factor, scalars = (8, 8) if row["direction"] == "forward" else (16, 12)
        assert row["bytes"] == rows * (factor * row["head_dim"] + scalars)


def sp_row(tokens, world_size, ms, **others):
    row = {"preset": "small", "method": "pi", "window": 4, "num_skips": 1, "overlap": "interior"}
    row |= {"exchange": "ring_all_to_all", "batch": 1, "reach": 192, "peak_mib": 2048.0, "fits": True}
    return row | {"tokens": tokens, "world_size": world_size, "ms": ms, "measured": True} | others


def test_a_table_of_steps_has_weak_scaling_predictions_and_forms_of_the_exchange():
    rows = [
        sp_row(1024, 1, 90.0, exposed_share=0.0),
        sp_row(1024, 2, 97.0, exposed_share=0.0, batch=2, sp_degree=1),
        sp_row(2048, 2, 100.0, exposed_share=0.02),
        sp_row(2048, 2, 125.0, exposed_share=0.2, overlap="none"),
        sp_row(2048, 1, None, measured=False, fits=False),
        sp_row(4096, 2, 70_000.0, method="ring", num_skips=0, reach=4095, measured=False),
        sp_row(4096, 1, None, method="ulysses", num_skips=0, measured=False, fits=None),
    ]
    assert markdown_table({"rows": rows}).split("\n") == [
        "| model | method | context | reach | 1 GPU | 2 GPUs | weak scaling | of 2 apart | exposed |",
        "|---|---|---|---|---|---|---|---|---|",
        "| small | π, k = 4, M = 1 | 2,048 | 192 | out of memory | 100 (2.0) | 90.0% | 97.0% | 2.0% |",
        "| small | ring | 4,096 | 4,095 |  | ~70,000 (2.0) |  |  |  |",
        "| small | ulysses | 4,096 | 192 | not possible |  |  |  |  |",
        "",
        "| small, π, k = 4, M = 1: overlap | exchange | sequences | 2,048 |",
        "|---|---|---|---|",
        "| interior | ring_all_to_all | 1 | 100.0 (2.0%) |",
        "| none | ring_all_to_all | 1 | 125.0 (20.0%) |",
    ]
