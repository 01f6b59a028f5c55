"""Where Triton can be had, its tests run; at the end they say how much they have looked at."""

from __future__ import annotations

import sys

import pytest

from tests.kernels import cases

if sys.platform != "linux":
    collect_ignore_glob = ["*.py"]  # there is no Triton elsewhere


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if cases.num_checks:
        terminalreporter.write_line(f"kernels: {cases.num_checks} checks")
