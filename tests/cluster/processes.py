"""Which processes of a job are left, whoever started them: all that inherited its mark.

A launcher may put its workers into sessions of their own and leave them to pid 1 when it dies. What
they all have is the environment that the launcher was started with.
"""

from __future__ import annotations

import os
import signal
import time
import uuid
from contextlib import suppress
from pathlib import Path

__all__ = ["end_all", "left", "new_mark"]


def new_mark() -> dict[str, str]:
    """A variable to start a job with, for ``left`` to find."""
    return {"FAULT_TEST_JOB": uuid.uuid4().hex}


def left(mark: dict[str, str], within_s: float = 0.0) -> dict[int, str]:
    """Command lines, by pid, of the processes that are left when the time is over; zombies are not.

    Returns as soon as there is none.
    """
    deadline = time.monotonic() + within_s
    while (found := _marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def end_all(mark: dict[str, str]) -> None:
    """Kill what is left, also what one of them starts meanwhile."""
    while found := _marked(mark):
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _marked(mark: dict[str, str]) -> dict[int, str]:
    wanted = {f"{name}={value}".encode() for name, value in mark.items()}
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            environment = set((folder / "environ").read_bytes().split(b"\0"))
            if wanted <= environment:
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                found[int(folder.name)] = command
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            pass  # it has ended, or is another user's
    return found
