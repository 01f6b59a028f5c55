"""The fault matrix shows every row that was opened, and holds it to its limit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster import matrix


@pytest.fixture(autouse=True)
def no_rows(monkeypatch: pytest.MonkeyPatch) -> list[matrix.Row]:
    rows: list[matrix.Row] = []
    monkeypatch.setattr(matrix, "_rows", rows)
    return rows


def test_a_row_that_ends_in_time_holds(no_rows: list[matrix.Row]):
    with matrix.row("kill -9", "mpirun", "all end", limit_s=5) as row:
        row.ended(1.25, -9)
    assert no_rows[0].cells() == (
        "kill -9",
        "mpirun",
        "all end",
        "5 s",
        "1.2 s",
        "-9",
        "as expected",
    )


@pytest.mark.parametrize("took", [5.01, None])
def test_a_row_that_ends_late_or_was_not_measured_fails(no_rows: list[matrix.Row], took):
    with (
        pytest.raises(AssertionError, match="kill -9, mpirun"),
        matrix.row("kill -9", "mpirun", "all end", limit_s=5) as row,
    ):
        row.seconds = took
    assert no_rows[0].outcome == "FAILED"


def test_a_row_whose_test_fails_or_is_skipped_says_so(no_rows: list[matrix.Row]):
    with pytest.raises(ZeroDivisionError), matrix.row("stop", "srun", "", limit_s=5) as row:
        row.ended(1.0, 1 // 0)
    with pytest.raises(pytest.skip.Exception), matrix.row("link down", "srun", "", limit_s=5):
        pytest.skip("needs root")
    assert [row.outcome for row in no_rows] == ["FAILED", "skipped: needs root"]


def test_the_table_takes_its_place_between_the_marks(tmp_path: Path):
    page = tmp_path / "page.md"
    begin, end = matrix._MARKS
    page.write_text(f"before\n{begin}old\n{end}\nafter\n")
    row = matrix.Row(r"a \1 fault", "srun", "", 5.0, 1.0, 1, "as expected")
    matrix.write_into(page, [row])
    table = matrix.as_markdown([row])
    assert table.endswith("| a \\1 fault | srun |  | 5 s | 1.0 s | 1 | as expected |\n")
    assert page.read_text() == f"before\n{begin}{table}{end}\nafter\n"


def test_a_page_without_marks_is_refused(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("text\n")
    with pytest.raises(AssertionError, match="lacks the marks"):
        matrix.write_into(page, [])
