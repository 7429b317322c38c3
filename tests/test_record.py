"""Records that ship: complete rows, and the README shows exactly their figures."""

from pathlib import Path

import pytest

from pi_dist.measure.record import kept_records, markdown_table

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


@pytest.mark.parametrize("name", kept_records())
def test_a_record_says_how_it_was_made(name):
    record = kept_records()[name]
    assert set(record) == {"command", "device", "versions", "settings", "rows"}
    assert {"torch", "deepspeed", "python"} <= set(record["versions"]) and record["rows"]
    for row in record["rows"]:
        assert set(row) >= STEP_ROW
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] * row["batch"] / row["ms"] * 1e3, rel=1e-3)
        assert 0 <= row["covered_share"] <= 1 and row["reach"] >= 0


@pytest.mark.parametrize("name", kept_records())
def test_the_readme_shows_the_record(name):
    assert markdown_table(kept_records()[name]) in (ROOT / "README.md").read_text()
