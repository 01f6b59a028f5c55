"""Ranks as threads of one process: a whole job in a quick test."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from shardscale.errors import MissingRankError

__all__ = ["ThreadComm", "run_ranks"]

T = TypeVar("T")


class ThreadComm:
    """A communicator between threads; numbers are added in rank order.

    Args:
        rank: This thread's number.
        meeting: Where the threads of one job meet; made by :func:`run_ranks`.
    """

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank = rank
        self.size = meeting.size
        self.num_reduces = 0
        self._meeting = meeting

    def all_reduce_sum_(self, buffer: Tensor) -> None:
        """Replace ``buffer``, (2,) float64, by its sum over the threads.

        Raises:
            MissingRankError: not all threads came within the meeting's time.

        Collective: every thread must call.
        """
        self.num_reduces += 1
        rows = self._meeting.exchange(self.rank, buffer.clone())
        buffer.copy_(torch.stack(rows).cumsum(0)[-1])

    def all_gather_object(self, obj: object) -> list[object]:
        """Every thread's object in rank order.

        Collective: every thread must call.
        """
        return self._meeting.exchange(self.rank, obj)


class Meeting:
    """Where the threads of one job hand each other one thing at a time."""

    def __init__(self, size: int, timeout_s: float) -> None:
        self.size = size
        self._barrier = threading.Barrier(size, timeout=timeout_s)
        self._slots: list[object] = [None] * size
        self._arrived = [0] * size

    def exchange(self, rank: int, thing: T) -> list[T]:
        """Every thread's ``thing`` in rank order, once all have come."""
        self._slots[rank] = thing
        self._arrived[rank] += 1
        try:
            self._barrier.wait()
            things = list(self._slots)
            self._barrier.wait()  # no thread may fill its slot again before all have read
        except threading.BrokenBarrierError:
            turn = self._arrived[rank]
            missing = [r for r in range(self.size) if self._arrived[r] < turn]
            raise MissingRankError(
                f"rank {rank} of {self.size}: meeting {turn} did not complete. "
                f"Did not come: ranks {missing}."
            ) from None
        return things  # type: ignore[return-value]

    def leave(self) -> None:
        """End all waits: this thread will not come again."""
        self._barrier.abort()


def run_ranks(
    fn: Callable[[ThreadComm], T], size: int, timeout_s: float = 10.0
) -> list[T | Exception]:
    """Run ``fn`` on ``size`` threads at once, each with its own communicator.

    Args:
        fn: What one rank does; gets its communicator, to be passed as ``comm=``.
        size: The number of ranks.
        timeout_s: Seconds that a rank waits for the others in one collective.

    Returns:
        In rank order, what ``fn`` returned or the exception it raised. A rank that returns while
        others still wait for it makes their waits fail, as a process that has ended would.

    >>> import torch
    >>> def total(comm):
    ...     buffer = torch.tensor([comm.rank, 1.0], dtype=torch.float64)
    ...     comm.all_reduce_sum_(buffer)
    ...     return buffer.tolist()
    >>> run_ranks(total, 3)
    [[3.0, 3.0], [3.0, 3.0], [3.0, 3.0]]
    """
    meeting = Meeting(size, timeout_s)
    done = threading.Barrier(size)

    def one(rank: int) -> T | Exception:
        try:
            outcome: T | Exception = fn(ThreadComm(rank, meeting))
        except Exception as error:  # noqa: BLE001 - the outcome of that rank
            outcome = error
        if isinstance(outcome, MissingRankError):
            meeting.leave()
        done.wait(timeout=10 * timeout_s)
        return outcome

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))
