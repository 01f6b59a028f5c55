"""What the ranks of an MPI communicator tell each other once something has gone wrong."""

from __future__ import annotations

import ctypes
import itertools
import os
import pickle
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from shardscale.comm.attendance import Place

__all__ = ["Talk", "keep_for_ever", "wait"]

# Ranks that wait look for messages every millisecond; the rest is for a machine under load.
_GRACE_S = 2.0
_SPIN_S = 30e-6  # several times what a verdict takes where all ranks are there
_LONGEST_NAP_S = 1e-3


def wait(is_done: Callable[[], bool], is_hopeless: Callable[[], bool], timeout_s: float) -> bool:
    """Poll until something is done, or need not be waited for.

    At first another process may have the core after every poll: spinning beside one that needs it
    takes a verdict from 20 us to 12 ms (MPICH, 4 ranks on 2 cores, November 2026). Then this
    process sleeps, for a sixteenth of the time that it has waited, and so adds no more to it.

    Args:
        is_done: Polled; has the last word, however late it comes to that.
        is_hopeless: Asked between sleeps.
        timeout_s: Seconds.

    Returns:
        Whether it is done.
    """
    started = time.monotonic()
    while True:
        waited = time.monotonic() - started
        if is_done():
            return True
        if waited < _SPIN_S:
            _yield_core()
        elif waited >= timeout_s or is_hopeless():
            return False
        else:
            time.sleep(min(waited / 16, _LONGEST_NAP_S))


class Talk:
    """Messages between any two ranks, apart from all collectives.

    Every public method may be called from any thread.

    Args:
        comm: An mpi4py communicator.
        tag: The tag of all messages.
    """

    def __init__(self, comm: Any, tag: int) -> None:
        self._comm = comm
        self._tag = tag
        self._rank: int = comm.Get_rank()
        self._size: int = comm.Get_size()
        self._others = [rank for rank in range(self._size) if rank != self._rank]
        self._gathers = itertools.count(1)
        self._num_gathers = 0
        self._gave_up: dict[int, Place] = {}  # by rank, where it waits no longer
        # By gathering and rank: how many verdicts that rank had when it joined, and its object.
        self._told: defaultdict[int, dict[int, tuple[int, object]]] = defaultdict(dict)

    def gave_up(self, verdict: int) -> dict[int, Place]:
        """The ranks that have told of giving up this verdict, or one before it, and where."""
        self._listen()
        return {rank: at for rank, at in list(self._gave_up.items()) if at.verdict <= verdict}

    def elsewhere(self, verdict: int) -> set[int]:
        """The ranks that have begun a gathering instead of coming to this verdict.

        Those that have it already tell of what they read in it, and this rank is about to as well.
        """
        self._listen()
        later = [told for number, told in list(self._told.items()) if number > self._num_gathers]
        return {rank for told in later for rank, (had, _) in list(told.items()) if had < verdict}

    def call_roll(self, place: Place) -> dict[int, Place]:
        """Tell all ranks that this one gives up a verdict; the others that do so, too.

        Those that wait for the same verdict hear of it and tell as well, so after a short grace the
        ones that did not are those that never came.
        """
        keep_for_ever(self._tell((self._rank, "gave up", place)))

        def is_complete() -> bool:
            return len(self.gave_up(place.verdict)) == len(self._others)

        wait(is_complete, _never, _GRACE_S)
        return self.gave_up(place.verdict)

    def gather(self, obj: object, num_verdicts: int, timeout_s: float) -> list[object]:
        """Every rank's object in rank order, None for those that did not tell in time.

        Args:
            obj: Can be pickled.
            num_verdicts: How many verdicts this rank has.
            timeout_s: Seconds.
        """
        self._num_gathers = number = next(self._gathers)
        told = self._told[number]
        told[self._rank] = (num_verdicts, obj)
        sends = self._tell((self._rank, number, (num_verdicts, obj)))

        def is_complete() -> bool:
            self._listen()
            return len(told) == self._size and all(map(_is_over, sends))

        if not wait(is_complete, _never, timeout_s):
            keep_for_ever(sends)
        return [told[rank][1] if rank in told else None for rank in range(self._size)]

    def _tell(self, message: tuple[int, int | str, object]) -> list[Any]:
        """Start to send a message to all other ranks."""
        text = pickle.dumps(message)
        sends = []
        for rank in self._others:
            with suppress(RuntimeError):  # it is dead, and this MPI knows
                sends.append(self._comm.Isend(text, rank, self._tag))
        return sends

    def _listen(self) -> None:
        """Take in what has arrived."""
        try:
            self._take()
        except RuntimeError:  # a rank is dead, and may have been any that is listened to
            for rank in self._others:
                with suppress(RuntimeError):
                    self._take(source=rank)

    def _take(self, **source: int) -> None:
        while (message := self._comm.improbe(tag=self._tag, **source)) is not None:
            rank, what, content = message.recv()
            if what == "gave up":
                self._gave_up[rank] = content
            else:
                self._told[what][rank] = content


def keep_for_ever(thing: object) -> None:
    """Never free an object, not even when the interpreter ends.

    A pending operation can be neither cancelled nor waited for, and MPI may still use its buffers
    in ``MPI_Finalize``, which mpi4py calls after Python has freed all objects.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def _is_over(send: Any) -> bool:
    try:
        return bool(send.Test())
    except RuntimeError:  # whoever it was for is dead
        return True


def _never() -> bool:
    return False


def _yield_core() -> None:
    if hasattr(os, "sched_yield"):
        os.sched_yield()
    else:
        time.sleep(0)
