"""The outcome of the demo as JSON, for machines to read."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

import shardscale
from shardscale.demo.agreement import closing_line, ranks_agree
from shardscale.demo.options import JobOptions
from shardscale.demo.results import JobResult
from shardscale.demo.table import overflow_text

__all__ = ["SCHEMA", "outcome", "write_record"]

SCHEMA = 1

_MAX_LOSSES = 100


def outcome(options: JobOptions, result: JobResult) -> dict[str, object]:
    """Return everything about one job in plain lists, dicts, strings and numbers."""
    every = max(1, -(-len(result.ticks) // _MAX_LOSSES))
    return {
        "options": {
            **options._asdict(),
            "inject": options.inject and options.inject._asdict(),
        },
        "device": result.device,
        "overflow": overflow_text(options, result),
        "ranks": [row._asdict() for row in result.rows],
        "losses": [tick._asdict() for tick in result.ticks[::every]],
        "accuracy": min(row.accuracy for row in result.rows),
        "seconds": round(result.seconds, 3),
        "agree": ranks_agree(result.rows, options.wrap),
        "closing_line": closing_line(result.rows, options.wrap),
    }


def write_record(path: Path, jobs: Sequence[tuple[JobOptions, JobResult]]) -> None:
    """Write the first job, and under "comparison" what it was compared with, to a file."""
    versions = {
        "shardscale": shardscale.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    first, *others = [outcome(*job) for job in jobs]
    record = {"schema": SCHEMA, "versions": versions, **first, "comparison": others}
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
