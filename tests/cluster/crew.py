"""Jobs of processes without a launcher: several at once, forked from one that has imported torch.

A row that kills processes then costs no import, and rows that wait for a timeout wait together::

    pytest --what to run--> server --fork--> rank 0 .. n-1 of each job
           <--pids, ends--

The server must never start a thread or make a group: it imports, forks and reaps.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

import pytest

__all__ = ["Crew", "Ended", "Job", "crew"]

REPOSITORY = Path(__file__).parents[2]
GROUP_TIMEOUT_S = 8.0


class Ended(NamedTuple):
    """How a process ended."""

    code: int  # minus the signal that killed it
    at_s: float  # on the clock of time.monotonic(), which all processes of a host share


class Job(NamedTuple):
    """One job that the crew has started; ``tests.cluster.job`` says what it does."""

    folder: Path
    pids: list[int]  # by rank


class Crew:
    """The server, as the tests see it."""

    def __init__(self) -> None:
        self._ended: dict[int, Ended] = {}
        self._server_end, theirs = connection.Pipe()
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.crew", str(theirs.fileno())],
            cwd=REPOSITORY,
            env={**os.environ, **threads, "GLOO_SOCKET_IFNAME": "lo"},
            pass_fds=[theirs.fileno()],
        )
        theirs.close()

    def start(self, folder: Path, size: int, *arguments: str) -> Job:
        """Start a job of ``size`` ranks; its files go into ``folder``, and what the ranks print."""
        folder.mkdir()
        self._server_end.send((["--folder", str(folder), *arguments], size))
        while isinstance(answer := self._server_end.recv(), tuple):
            self._note(answer)
        return Job(folder, answer)

    def ended(self, pids: Iterable[int], limit_s: float) -> list[Ended]:
        """How these processes ended; waits for them.

        Raises:
            TimeoutError: one of them is still running when the time is over.
        """
        deadline = time.monotonic() + limit_s
        while missing := set(pids) - self._ended.keys():
            if not self._server_end.poll(max(0.0, deadline - time.monotonic())):
                raise TimeoutError(f"still running after {limit_s} s: {sorted(missing)}")
            self._note(self._server_end.recv())
        return [self._ended[pid] for pid in pids]

    def close(self) -> None:
        """End the server; a rank still running or stopped ends with it."""
        self._server_end.close()
        self._server.wait(timeout=10)

    def _note(self, news: tuple[int, int, float]) -> None:
        pid, *ended = news
        self._ended[pid] = Ended(*ended)


@pytest.fixture(scope="session")
def crew() -> Iterator[Crew]:
    """``crew.start(folder, size, ...)``; its server is started by the first test that asks."""
    crew = Crew()
    yield crew
    crew.close()


def main(request_fd: int) -> None:
    requests = connection.Connection(request_fd)
    for name in ("torch._dynamo", "tests.cluster.job"):  # the first optimizer imports the one
        importlib.import_module(name)
    try:
        while True:
            if requests.poll(0.01):
                arguments, size = requests.recv()
                requests.send(_fork_all(arguments, size, requests))
            while news := _reaped():
                requests.send(news)
    except (EOFError, ConnectionError):
        pass  # nobody is waiting any more; the ranks that are left die with this process


def _reaped() -> tuple[int, int, float] | None:
    """A process that has ended, its exit code and the time."""
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    return (pid, os.waitstatus_to_exitcode(status), time.monotonic()) if pid else None


def _fork_all(arguments: Sequence[str], size: int, requests: connection.Connection) -> list[int]:
    # The port is bound and listening before the fork: nobody can take it, nobody come too early.
    listener = socket.create_server(("127.0.0.1", 0))
    pids = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            requests.close()
            _be_rank(arguments, rank, size, listener)
        pids.append(pid)
    listener.close()
    return pids


def _be_rank(arguments: Sequence[str], rank: int, size: int, listener: socket.socket) -> Any:
    """Run the job as one of its ranks, and end this process."""
    import torch.distributed as dist

    from tests.cluster import job

    code = 1
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with the server
        chosen = job.options(arguments)
        out = os.open(chosen.folder / f"rank{rank}.out", os.O_WRONLY | os.O_CREAT)
        os.dup2(out, 1)
        os.dup2(out, 2)
        timeout = timedelta(seconds=GROUP_TIMEOUT_S)
        port = listener.getsockname()[1]
        # Rank 0 takes the listener over, the others only close it.
        fd = listener.detach()
        is_host = {"is_master": True, "master_listen_fd": fd} if rank == 0 else {}
        if rank != 0:
            os.close(fd)
        store = dist.TCPStore("127.0.0.1", port, size, timeout=timeout, **is_host)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
        job.run(chosen, rank, size)
        dist.destroy_process_group()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # No interpreter shutdown: it would run exit handlers that belong to the server.
        os._exit(code)


if __name__ == "__main__":
    main(int(sys.argv[1]))
