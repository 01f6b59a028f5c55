"""What the rank server is asked for, and what it says came of it."""

from __future__ import annotations

import builtins
import signal
from typing import Any, NamedTuple

__all__ = ["Request", "Signal", "RankReport", "RanksFailed", "describe"]


class Signal(NamedTuple):
    """A real signal, addressed by rank and by how far that rank had come."""

    rank: int
    signum: int
    after_lines: int
    """Sent from outside as soon as the rank's log holds this many lines."""


class Request(NamedTuple):
    """One case, to be run on ``size`` freshly forked processes."""

    module: str
    qualname: str
    kwargs: bytes
    """A pickled dict; opened in the rank, so what cannot be imported is that rank's error."""
    size: int
    backend: str | None
    """What ``init_process_group`` is given; None leaves the rank without a group."""
    store: str
    """``"file"``, ``"tcp"`` (hosted by rank 0) or ``"counting"`` (a FileStore that records what is
    asked of it)."""
    group_timeout_s: float
    limit_s: float
    deaths_expected: bool
    """A rank that fails does not end the case for the others."""
    signals: tuple[Signal, ...]
    sys_path: tuple[str, ...]
    directory: str


class RankReport(NamedTuple):
    """How one rank ended."""

    rank: int
    exit_code: int | None
    """0 after the case returned or raised; minus the signal that killed or stopped it; None if it
    overran."""
    result: Any
    """What the case returned, or None."""
    error: str | None
    """The traceback, if the case raised."""
    lines: list[str]
    """What it wrote with ``log``."""
    output: str
    """Its standard output and error."""
    stack: str
    """Where every thread of it was when the time was up."""


class RanksFailed(builtins.AssertionError):
    """A case did not return on every rank; the message holds what each of them said."""


def describe(report: RankReport) -> str:
    """All that is known of one rank, for a failure message."""
    parts = [f"--- rank {report.rank}: {_ending(report)}"]
    if report.error:
        parts.append(report.error.rstrip())
    if report.stack:
        parts.append("was last doing (innermost call first):\n" + report.stack.rstrip())
    if report.lines:
        parts.append("log:\n" + "\n".join(report.lines))
    if report.output:
        parts.append("output:\n" + report.output.rstrip())
    return "\n".join(parts)


def _ending(report: RankReport) -> str:
    if report.exit_code is None:
        return "still running when the time was up; killed"
    if report.exit_code < 0:
        return f"ended by {signal.Signals(-report.exit_code).name}"
    return "raised" if report.error else "returned"
