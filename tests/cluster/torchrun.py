"""A job under torchrun on one host or several: its agents, their ends, and what they leave."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from tests.cluster.netns import INTERFACE, Host
from tests.cluster.processes import end_all, left, new_mark

__all__ = ["Launch", "await_"]

REPOSITORY = Path(__file__).parents[2]
T = TypeVar("T")
PORT = 29400  # of the rendezvous, on the first of several hosts; each has a network of its own


class Launch:
    """``tests.cluster.job`` under one agent per host; a context that leaves nothing behind.

    Args:
        folder: For the files of the job, which go into ``run0``, and ``run1`` after a restart; and
            for what the agents print.
        arguments: Of the job.
        num_local: Ranks per host.
        hosts: Where there are several; none for torchrun's standalone mode.
        max_restarts: How often the agents may start the ranks again.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        num_local: int,
        hosts: Sequence[Host] = (),
        max_restarts: int = 0,
    ) -> None:
        folder.mkdir()
        self.folder = folder
        self.hosts = hosts
        self.ended_at_s: dict[int, float] = {}  # by number of the agent
        self._mark = new_mark()
        program = ["-m", "tests.cluster.job", "--folder", str(folder), *arguments]
        options = [f"--nproc-per-node={num_local}", f"--max-restarts={max_restarts}"]
        self.agents = [
            self._start(number, [*flags, *options, *program], host)
            for number, (host, flags) in enumerate(_agents(hosts))
        ]
        self._watchers = [
            threading.Thread(target=self._watch, args=(number,))
            for number in range(len(hosts) or 1)
        ]
        for watcher in self._watchers:
            watcher.start()

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *_: object) -> None:
        end_all(self._mark)
        for watcher in self._watchers:
            watcher.join()

    def exit_code(self, number: int, limit_s: float) -> int | None:
        """Of one agent, as soon as it has ended; None if it has not when the time is over."""
        self._watchers[number].join(max(0.0, limit_s))
        return self.agents[number].returncode

    def exit_codes(self, limit_s: float) -> list[int | None]:
        """Of all agents, as soon as they have ended."""
        deadline = time.monotonic() + limit_s
        numbers = range(len(self.agents))
        return [self.exit_code(number, deadline - time.monotonic()) for number in numbers]

    def left(self, within_s: float = 0.0) -> dict[int, str]:
        """What is still running of it when the time is over, agents included."""
        return left(self._mark, within_s)

    def printed(self) -> str:
        """What the agents and their ranks have printed."""
        files = sorted(self.folder.glob("agent*.out"))
        return "\n".join(f"--- {file.name}\n{file.read_text()}" for file in files)

    def _start(
        self, number: int, arguments: Sequence[str], host: Host | None
    ) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "torch.distributed.run", *arguments]
        interface = "lo" if host is None else INTERFACE
        with (self.folder / f"agent{number}.out").open("wb") as out:
            return subprocess.Popen(
                command if host is None else host.command(*command),
                cwd=REPOSITORY,
                env={
                    **os.environ,
                    **self._mark,
                    "OMP_NUM_THREADS": "1",
                    "GLOO_SOCKET_IFNAME": interface,
                },
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _watch(self, number: int) -> None:
        self.agents[number].wait()
        self.ended_at_s[number] = time.monotonic()


def await_(what: Callable[[], T | None], job: Launch, limit_s: float = 60.0) -> T:
    """Wait for something about a job that is None until it is there."""
    deadline = time.monotonic() + limit_s
    while (found := what()) is None:
        assert time.monotonic() < deadline, job.printed()
        time.sleep(0.01)
    return found


def _agents(hosts: Sequence[Host]) -> list[tuple[Host | None, list[str]]]:
    """Where each agent runs, and how it finds the others."""
    if not hosts:
        return [(None, ["--standalone"])]
    meeting = [
        f"--nnodes={len(hosts)}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={hosts[0].address}:{PORT}",
        f"--rdzv-id={uuid.uuid4().hex}",
    ]
    return [
        # Who hosts the store is said: by default it is found out by host names, which are equal.
        (host, [*meeting, f"--rdzv-conf=is_host={int(i == 0)}", f"--local-addr={host.address}"])
        for i, host in enumerate(hosts)
    ]
