"""What a case may use while it runs on a rank: its log, its store, and errors as values."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch.distributed as dist

__all__ = ["Outcome", "outcome", "log", "scratch", "store"]


class Outcome(NamedTuple):
    """What a call came to; errors are values here, because each rank is judged for its own."""

    value: Any
    error: str | None
    """Name of the exception's type, or None."""
    kinds: tuple[str, ...]
    """Names of all the types it is an instance of."""
    message: str


def outcome(call: Callable[[], Any]) -> Outcome:
    """Run ``call``; give its value or its exception, in a form that can be pickled."""
    try:
        return Outcome(call(), None, (), "")
    except Exception as error:
        kinds = tuple(kind.__name__ for kind in type(error).__mro__)
        return Outcome(None, type(error).__name__, kinds, str(error))


def log(line: str) -> None:
    """Append a line to this rank's log; it is on the disk before this returns."""
    os.write(_here.log_fd, (line + "\n").encode())
    os.fsync(_here.log_fd)


def scratch() -> pathlib.Path:
    """A folder shared by the ranks of this case."""
    return _here.directory


def store() -> dist.Store:
    """The store that the default group was made with."""
    return _here.store


class _Here:
    """Filled in by the server after the fork: one case a process, so one of it."""

    log_fd: int
    directory: pathlib.Path
    store: dist.Store


_here = _Here()
