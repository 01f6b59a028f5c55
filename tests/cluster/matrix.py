"""The fault matrix: what was done to a job, what had to come of it, and what came.

A test opens a row; the rows of all tests are shown at the end of the run, equal faults together. ::

    with matrix.row("kill -9 before the verdict", "mpirun", "all end", limit_s=5) as row:
        ...                        # break the job, look at what is left of it
        row.ended(seconds, code)   # from the fault to the end of the job, and its exit code

With ``FAULT_MATRIX=docs/faults.md`` in the environment they are also written into that page,
between its two marks.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

__all__ = ["Row", "as_markdown", "pytest_terminal_summary", "row", "write_into"]

_HEAD = ("fault", "launcher", "expected", "limit", "took", "exit code", "outcome")
_MARKS = ("<!-- fault matrix: begin -->\n", "<!-- fault matrix: end -->")


@dataclass
class Row:
    """One fault under one launcher."""

    fault: str
    launcher: str
    expected: str
    limit_s: float
    seconds: float | None = None  # from the fault to the end of what had to end
    exit_code: int | None = None  # of the job; minus the signal that ended it
    outcome: str = "FAILED"

    def ended(self, seconds: float, exit_code: int | None) -> None:
        """Note what was measured; a row that never gets there has failed."""
        self.seconds = seconds
        self.exit_code = exit_code

    def cells(self) -> tuple[str, ...]:
        took = "" if self.seconds is None else f"{self.seconds:.1f} s"
        code = "" if self.exit_code is None else str(self.exit_code)
        limit = f"{self.limit_s:g} s"
        return (self.fault, self.launcher, self.expected, limit, took, code, self.outcome)


_rows: list[Row] = []


@contextmanager
def row(fault: str, launcher: str, expected: str, limit_s: float) -> Iterator[Row]:
    """Open a row; it holds if the block does not raise and the measured time is in the limit.

    Args:
        fault: What is done to the job.
        launcher: Who started it: "processes", "torchrun", "mpirun (MPICH)", "srun", ...
        expected: What must come of it, in a few words.
        limit_s: How many seconds the end may be away from the fault.
    """
    opened = Row(fault, launcher, expected, limit_s)
    _rows.append(opened)
    try:
        yield opened
    except pytest.skip.Exception as reason:
        opened.outcome = f"skipped: {reason}"
        raise
    assert opened.seconds is not None, f"{fault}, {launcher}: no time was measured"
    assert opened.seconds <= limit_s, (
        f"{fault}, {launcher}: {opened.seconds:.1f} s, not {limit_s:g}"
    )
    opened.outcome = "as expected"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show the matrix at the end of the run; a hook of pytest."""
    if not _rows:
        return
    terminalreporter.section("fault matrix")
    rows = sorted(_rows, key=lambda each: (each.fault.lower(), each.launcher.lower()))
    table = [_HEAD, *(each.cells() for each in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        line = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        terminalreporter.line(line.rstrip())
    if page := os.environ.get("FAULT_MATRIX"):
        write_into(Path(page), rows)


def write_into(page: Path, rows: list[Row]) -> None:
    """Put the rows between the marks of a page."""
    begin, end = _MARKS
    text = page.read_text()
    assert text.count(begin) == text.count(end) == 1, f"{page} lacks the marks {begin!r}, {end!r}"
    between = re.compile(re.escape(begin) + ".*" + re.escape(end), re.DOTALL)
    page.write_text(between.sub(lambda _: begin + as_markdown(rows) + end, text))


def as_markdown(rows: list[Row]) -> str:
    """The rows as a table."""
    lines = [_HEAD, ("---",) * len(_HEAD), *(each.cells() for each in rows)]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)
