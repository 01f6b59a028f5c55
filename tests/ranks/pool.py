"""Run a function on several ranks and get back what each of them returned."""

from __future__ import annotations

import os
import pathlib
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from multiprocessing import connection
from typing import Any

from tests.ranks.report import RankReport, RanksFailed, Request, Signal, describe

__all__ = ["RankPool"]

REPOSITORY = pathlib.Path(__file__).parents[2]


class RankPool:
    """Real processes for tests: one import of torch, then a fork per rank and case.

    A *case* is a function at the top of a test module, ``case(rank, size, **kwargs)``, whose result
    can be pickled.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        self._directory = directory
        self._server: subprocess.Popen[bytes] | None = None
        self._requests: connection.Connection | None = None

    def run(
        self,
        case: Callable[..., Any],
        size: int,
        *,
        backend: str | None = "gloo",
        store: str = "file",
        group_timeout_s: float = 10.0,
        limit_s: float = 30.0,
        **kwargs: Any,
    ) -> list[Any]:
        """Run ``case`` on ``size`` ranks of a new process group.

        Args:
            case: Called as ``case(rank, size, **kwargs)`` on each rank.
            size: Number of ranks, any from 1.
            backend: For ``init_process_group``; None leaves the ranks without a group.
            store: ``"file"``, ``"tcp"`` (rank 0 is its host) or ``"counting"``; a case reaches it
                with ``tests.ranks.rank.store``.
            group_timeout_s: The group's own timeout.
            limit_s: When it is over, every rank is asked for its stack and killed.

        Returns:
            The results, in the order of ranks.

        Raises:
            RanksFailed: If any rank raised, died or overran; with the traceback or stack, log and
            output of each.
        """
        reports = self._ask(case, size, backend, store, group_timeout_s, limit_s, False, (), kwargs)
        if any(report.error is not None or report.exit_code != 0 for report in reports):
            raise RanksFailed(
                f"{case.__qualname__} on {size} ranks:\n" + "\n".join(map(describe, reports))
            )
        return [report.result for report in reports]

    def spawn(
        self,
        case: Callable[..., Any],
        size: int,
        *,
        signals: Iterable[Signal] = (),
        backend: str | None = "gloo",
        store: str = "file",
        group_timeout_s: float = 10.0,
        limit_s: float = 30.0,
        **kwargs: Any,
    ) -> list[RankReport]:
        """Run a case in which ranks may raise, be killed or be stopped; report how each of them
        ended.

        Args:
            signals: Sent from outside, each as soon as its rank has logged so many lines. A case
            may as well send
                signals to itself. A rank stopped by a signal stays stopped until all others have
                ended.
        """
        return self._ask(
            case, size, backend, store, group_timeout_s, limit_s, True, tuple(signals), kwargs
        )

    def close(self) -> None:
        """End the server; a rank still running ends with it."""
        if self._requests is not None:
            self._requests.close()
        if self._server is not None:
            try:
                self._server.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._server.kill()
                self._server.wait()
        self._server = self._requests = None

    def _ask(
        self, case, size, backend, store, group_timeout_s, limit_s, deaths_expected, signals, kwargs
    ):
        request = Request(
            case.__module__,
            case.__qualname__,
            pickle.dumps(kwargs),
            size,
            backend,
            store,
            group_timeout_s,
            limit_s,
            deaths_expected,
            signals,
            (str(REPOSITORY), *sys.path),
            tempfile.mkdtemp(prefix=f"{case.__name__}-", dir=self._directory),
        )
        if self._server is None:
            self._start()
        try:
            self._requests.send_bytes(pickle.dumps(request))
            # The server keeps the limit; the rest is for importing the test's module and for ending
            # the ranks.
            if not self._requests.poll(limit_s + 60):
                raise RanksFailed("The rank server did not answer.")
            reply = pickle.loads(self._requests.recv_bytes())
        except BaseException as error:
            # An answer that is still to come must not be taken for that of the next case.
            self.close()
            if isinstance(error, (EOFError, OSError)):
                raise RanksFailed(f"The rank server ended during {case.__qualname__}.") from error
            raise
        if isinstance(reply, str):
            raise RanksFailed(f"{case.__qualname__} could not be started:\n{reply}")
        return [_opened(report) for report in reply]

    def _start(self) -> None:
        self._requests, theirs = connection.Pipe()
        # One thread each: a library that started a pool of them at import could not be forked.
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.ranks.server", str(theirs.fileno())],
            cwd=REPOSITORY,
            env={**os.environ, **threads, "GLOO_SOCKET_IFNAME": "lo"},
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        try:
            if not self._requests.poll(120):
                raise RanksFailed("The rank server did not start within 120 s.")
            assert self._requests.recv_bytes() == b"ready"
        except BaseException as error:
            self._server.kill()
            self.close()
            if isinstance(error, EOFError):
                raise RanksFailed(
                    "The rank server ended while it was starting; its error is above."
                ) from error
            raise


def _opened(report: RankReport) -> RankReport:
    result = None if report.result is None else pickle.loads(report.result)
    return report._replace(result=result)
