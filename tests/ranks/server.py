"""A process that imports torch once and forks the ranks of every case.

A fork costs 10 ms where an import of torch costs seconds, and a forked rank has never run anything:
no group, mesh, cache or thread of an earlier case can reach it. For that this process itself must
never start a thread, never make a group and never call autograd; it imports, forks and waits.

    pytest --Request--> server --fork--> rank 0 .. n-1
           <--reports--        <--pipe--
"""

from __future__ import annotations

import importlib
import os
import pathlib
import pickle
import signal
import socket
import sys
import time
import traceback
from multiprocessing import connection

import torch

from tests.ranks.forked import be_rank
from tests.ranks.report import RankReport, Request

GRACE_S = 3.0
"""How long the other ranks may go on once one of them has failed; they would only wait for it."""


def main(request_fd: int) -> None:
    _import_what_cases_use()
    requests = connection.Connection(request_fd)
    requests.send_bytes(b"ready")
    while True:
        try:
            request = pickle.loads(requests.recv_bytes())
        except EOFError:
            return
        try:
            reply: object = _serve(request, requests)
        except Exception:
            reply = traceback.format_exc()
        # Plain pickle: `Connection.send` would move tensors into shared memory.
        requests.send_bytes(pickle.dumps(reply))


def _import_what_cases_use() -> None:
    """Whatever is not imported here is imported by every rank of every case."""
    torch.set_num_threads(1)
    for name in (
        "numpy",
        "pytest",
        "torch._dynamo",  # the first optimizer imports it
        "torch.distributed._functional_collectives",
        "torch.distributed.fsdp",
        # Its default group is read at import; it must be read while there is none.
        "torch.distributed.fsdp.sharded_grad_scaler",
        "torch.distributed.pipelining",
        "torch.distributed.tensor.parallel",
        "torch.testing",
    ):
        importlib.import_module(name)


class _Child:
    """One forked rank, as the server sees it."""

    def __init__(
        self, rank: int, pid: int, results: connection.Connection, go: connection.Connection
    ) -> None:
        self.rank = rank
        self.pid = pid
        self.results = results
        self.go = go  # closed when all ranks may end
        self.exit_code: int | None = None
        self.stopped = False
        self.reply: tuple[bytes | None, str | None] | None = None
        self.stack = ""

    @property
    def settled(self) -> bool:
        return self.reply is not None or self.exit_code is not None

    @property
    def failed(self) -> bool:
        return self.exit_code is not None or (self.reply is not None and self.reply[1] is not None)


def _serve(request: Request, requests: connection.Connection) -> list[RankReport]:
    """Fork the ranks, wait for them within the limit, leave none behind."""
    sys.path[:] = list(request.sys_path)
    # Imported here and not in the ranks, so that it is done once.
    importlib.import_module(request.module)
    num_threads = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1
    assert num_threads == 1, f"{num_threads} threads after {request.module}: no fork is safe"
    directory = pathlib.Path(request.directory)
    listener = socket.create_server(("127.0.0.1", 0)) if request.store == "tcp" else None
    children: list[_Child] = []
    try:
        for rank in range(request.size):
            for kind in ("log", "out", "stack"):
                (directory / f"rank{rank}.{kind}").touch()
            children.append(_fork(request, rank, listener, [requests, *_ends(children)]))
        if listener is not None:
            listener.close()
        _wait(request, children, directory, requests)
    finally:
        for child in children:
            child.go.close()
        _reap(children)
    return [_report(child, directory) for child in children]


def _ends(children: list[_Child]) -> list[connection.Connection]:
    return [end for child in children for end in (child.results, child.go)]


def _fork(
    request: Request,
    rank: int,
    listener: socket.socket | None,
    to_close: list[connection.Connection],
) -> _Child:
    results, results_out = connection.Pipe(duplex=False)
    go_in, go = connection.Pipe(duplex=False)
    pid = os.fork()
    if pid == 0:
        try:
            # An end of a pipe held open by a sibling would hide that its owner is gone.
            for end in [*to_close, results, go]:
                end.close()
            be_rank(request, rank, listener, results_out, go_in)
        except BaseException:
            traceback.print_exc()
        finally:
            # No interpreter shutdown: it would run exit handlers that belong to the server.
            os._exit(0)
    results_out.close()
    go_in.close()
    return _Child(rank, pid, results, go)


def _wait(
    request: Request,
    children: list[_Child],
    directory: pathlib.Path,
    requests: connection.Connection,
) -> None:
    deadline = time.monotonic() + request.limit_s
    unsent = list(request.signals)
    hurried = False
    while not all(child.settled for child in children):
        pending = [child for child in children if not child.settled]
        if time.monotonic() > deadline:
            _take_stacks(pending, directory)
            return
        ready = connection.wait([requests, *(child.results for child in pending)], timeout=0.02)
        if requests in ready:
            raise SystemExit  # nobody is waiting for this case any more
        for child in children:
            if child.stopped:
                _look_at(child)
        for child in pending:
            if child.results in ready:
                try:
                    child.reply = pickle.loads(child.results.recv_bytes())
                except EOFError:  # it is dead, or about to be
                    pass
            if child.reply is None:
                _look_at(child)
        for sig in list(unsent):
            if _num_lines(directory, sig.rank) >= sig.after_lines:
                unsent.remove(sig)
                os.kill(children[sig.rank].pid, sig.signum)
        if not request.deaths_expected and not hurried and any(child.failed for child in children):
            hurried = True
            deadline = min(deadline, time.monotonic() + GRACE_S)


def _look_at(child: _Child) -> None:
    """Note whether it was killed, stopped or let go on; until `waitpid` says that it is dead, its
    pid is no one else's."""
    pid, status = os.waitpid(child.pid, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
    if pid == 0:
        return
    if os.WIFCONTINUED(status):
        child.stopped, child.exit_code = False, None
        return
    child.stopped = os.WIFSTOPPED(status)
    child.exit_code = -os.WSTOPSIG(status) if child.stopped else os.waitstatus_to_exitcode(status)


def _take_stacks(pending: list[_Child], directory: pathlib.Path) -> None:
    """Ask each rank for the stacks of its threads; one that is blocked in C++ answers too."""
    for child in pending:
        os.kill(child.pid, signal.SIGUSR1)
    deadline = time.monotonic() + 2.0
    for child in pending:
        path, size = directory / f"rank{child.rank}.stack", -1
        while time.monotonic() < deadline and (size <= 0 or path.stat().st_size != size):
            size = path.stat().st_size
            time.sleep(0.02)
        child.stack = path.read_text()


def _reap(children: list[_Child]) -> None:
    deadline = time.monotonic() + 5.0
    for child in children:
        if child.stopped or not child.settled:
            _kill(child.pid)
        while not _gone(child.pid):
            if time.monotonic() > deadline:
                _kill(child.pid)
            time.sleep(0.002)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _gone(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True


def _num_lines(directory: pathlib.Path, rank: int) -> int:
    return (directory / f"rank{rank}.log").read_bytes().count(b"\n")


def _report(child: _Child, directory: pathlib.Path) -> RankReport:
    result, error = child.reply or (None, None)

    def text(kind: str) -> str:
        return (directory / f"rank{child.rank}.{kind}").read_text(errors="replace")

    exit_code = child.exit_code if child.reply is None else 0
    return RankReport(
        child.rank, exit_code, result, error, text("log").splitlines(), text("out"), child.stack
    )


if __name__ == "__main__":
    main(int(sys.argv[1]))
