"""Ranks as threads of one process: a whole job in a quick test."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

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
        rows = self._meeting.exchange("reduce", self.rank, buffer.clone())
        missing = [rank for rank in range(self.size) if rank not in rows]
        if missing:
            raise MissingRankError(
                f"rank {self.rank} of {self.size}: all-reduce {self.num_reduces} did not complete. "
                f"Did not come: ranks {missing}."
            )
        buffer.copy_(torch.stack([rows[rank] for rank in range(self.size)]).cumsum(0)[-1])

    def all_gather_object(self, obj: object) -> list[object]:
        """Every thread's object in rank order; None for one that did not come in time.

        Collective: every thread should call.
        """
        found = self._meeting.exchange("gather", self.rank, obj)
        return [found.get(rank) for rank in range(self.size)]


class Meeting:
    """Where the threads of one job hand each other things: the n-th of a kind meets the n-th."""

    def __init__(self, size: int, timeout_s: float) -> None:
        self.size = size
        self._timeout_s = timeout_s
        self._changed = threading.Condition()
        self._turns: Counter[tuple[str, int]] = Counter()
        self._tables: defaultdict[tuple[str, int], dict[int, Any]] = defaultdict(dict)
        self._gone: set[int] = set()
        self._given_up: set[int] = set()  # whoever comes later comes for nothing; tables are kept

    def exchange(self, kind: str, rank: int, thing: Any) -> dict[int, Any]:
        """What the threads brought, by rank; complete unless the time ran out."""
        with self._changed:
            self._turns[kind, rank] += 1
            table = self._tables[kind, self._turns[kind, rank]]
            table[rank] = thing
            self._changed.notify_all()
            came_in_time = self._changed.wait_for(
                lambda: len(table) == self.size or self._is_hopeless(kind, rank, table),
                self._timeout_s,
            )
            if not came_in_time:
                self._given_up.add(id(table))
            too_late = kind == "reduce" and came_in_time and id(table) in self._given_up
            return {rank: thing} if too_late else dict(table)

    def leave(self, rank: int) -> None:
        """This thread will not come again."""
        with self._changed:
            self._gone.add(rank)
            self._changed.notify_all()

    def _is_hopeless(self, kind: str, rank: int, table: dict[int, Any]) -> bool:
        if self._gone.issuperset(set(range(self.size)) - set(table)):
            return True
        # Threads that gather have given up on the all-reduce that this one waits in.
        next_gather = self._tables.get(("gather", self._turns["gather", rank] + 1))
        return kind == "reduce" and bool(next_gather)


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

    def one(rank: int) -> T | Exception:
        try:
            return fn(ThreadComm(rank, meeting))
        except Exception as error:  # noqa: BLE001 - the outcome of that rank
            return error
        finally:
            meeting.leave(rank)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))
