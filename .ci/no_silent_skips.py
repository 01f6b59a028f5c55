"""A pytest plugin that fails the run when a test that could have run did not.

Only tests marked ``gpu`` may be skipped, and only where there is no GPU. Without this a missing
dependency turns a whole file into a skip, and the run stays green.
"""

from __future__ import annotations

import pytest
import torch

_not_run: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # An expected failure has run, except where it was declared with run=False.
    expected = getattr(report, "wasxfail", None)
    ran = expected is not None and "[NOTRUN]" not in expected
    excused = "gpu" in report.keywords and not torch.cuda.is_available()
    if report.skipped and not ran and not excused:
        _not_run.append(report.nodeid)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        _not_run.append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _not_run and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _not_run:
        terminalreporter.section("skipped, but should have run", red=True)
        for nodeid in _not_run:
            terminalreporter.line(nodeid)
