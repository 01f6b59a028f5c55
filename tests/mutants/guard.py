"""A pytest plugin that tests the mutated copy, or nothing, and keeps what each test came to."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import shardscale

_outcomes: list[dict[str, str]] = []


def pytest_sessionstart(session: pytest.Session) -> None:
    tree = Path(os.environ["MUTANT_TREE"]).resolve()
    tested = Path(shardscale.__file__).resolve()
    # An installed shardscale in front of the copy would let every mutant live, or die, by chance.
    if tree not in tested.parents:
        pytest.exit(f"{tested} would be tested, which does not lie in {tree}", returncode=5)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _outcomes.append(_outcome(report.nodeid, "collect", "failed", report.longreprtext))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.failed:
        _outcomes.append(_outcome(report.nodeid, report.when, report.outcome, report.longreprtext))


def pytest_sessionfinish(session: pytest.Session) -> None:
    Path(os.environ["MUTANT_OUTCOMES"]).write_text(json.dumps(_outcomes))


def _outcome(nodeid: str, when: str, outcome: str, text: str) -> dict[str, str]:
    return {"nodeid": nodeid, "when": when, "outcome": outcome, "text": text}
