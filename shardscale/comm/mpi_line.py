"""A duplicate of an MPI communicator on which nothing but verdicts travels, until one fails."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from shardscale.comm.attendance import Attendance, Crew, Place, tell
from shardscale.comm.mpi_talk import Talk, keep_for_ever, wait
from shardscale.errors import MissingRankError

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Line"]

_TAG = 1
_HOST_BYTES = 64  # the longest name that Linux allows


class Line:
    """A duplicate of a communicator, and how many verdicts have passed over it.

    Args:
        comm: The communicator.
        timeout_s: Seconds that the others have to come.

    Raises:
        MissingRankError: not all came.

    Collective: every rank of ``comm`` must make one.
    """

    def __init__(self, comm: MPI.Intracomm, timeout_s: float) -> None:
        from mpi4py import MPI

        host = MPI.Get_processor_name()
        self.num_verdicts = 0
        self._last: Place | None = None  # the newest verdict that is complete
        self._crew = Crew(comm.Get_rank(), comm.Get_size(), host)
        self._hosts: dict[int, str] = {}
        self._why_broken = ""
        self._mine = np.empty(2)
        self._rows = np.empty((self._crew.size, 2))
        # As long as there is no duplicate the ranks can talk only beside the program's own
        # messages. They do so when they give up, with a tag that hardly any program uses.
        self.talk = Talk(comm, MPI.COMM_WORLD.Get_attr(MPI.TAG_UB))
        making = Place(1, None)
        self._complete(lambda: self._duplicate(comm), making, "making its MPIComm", timeout_s)
        name = host.encode()[:_HOST_BYTES].ljust(_HOST_BYTES, b"\0")
        names = bytearray(_HOST_BYTES * self._crew.size)
        gather = functools.partial(self._comm.Iallgather, name, names)
        self._complete(gather, making, "making its MPIComm", timeout_s)
        for rank in range(self._crew.size):
            name = names[rank * _HOST_BYTES : (rank + 1) * _HOST_BYTES]
            self._hosts[rank] = name.rstrip(b"\0").decode(errors="replace")
        self.talk = Talk(self._comm, _TAG)

    def exchange(
        self, numbers: list[float], step: int | None, timeout_s: float
    ) -> NDArray[np.float64]:
        """The two numbers of every rank, (size, 2); the next exchange overwrites them.

        Args:
            numbers: This rank's.
            step: The scaler's number of updates, if it is known.
            timeout_s: Seconds.

        Raises:
            MissingRankError: not all ranks came in time, now or before.

        Collective: every rank must call.
        """
        if self._why_broken:
            raise MissingRankError(
                f"{self._crew.myself}: this communicator cannot be used any more, because "
                f"{self._why_broken}. Start the job again from its last checkpoint."
            )
        self._mine[:] = numbers
        place = Place(self.num_verdicts + 1, step)
        gather = functools.partial(self._comm.Iallgather, self._mine, self._rows)
        self._complete(gather, place, str(place), timeout_s)
        self.num_verdicts, self._last = place.verdict, place
        return self._rows

    def _duplicate(self, comm: MPI.Intracomm) -> MPI.Request:
        self._comm, request = comm.Idup()
        return request

    def _complete(
        self, start: Callable[[], MPI.Request], place: Place, what: str, timeout_s: float
    ) -> None:
        """Start an operation and wait. If it does not complete, the line is broken for good."""
        self._why_broken = f"{what} was interrupted"
        try:
            how = self._how_it_failed(start, place.verdict, timeout_s)
            self._why_broken = how and f"{what} did not complete{how}"
        finally:
            if self._why_broken:
                keep_for_ever(self)
        if how:
            raise MissingRankError(
                f"{self._crew.myself}: {self._why_broken}. {self._who_came(place)}"
            )

    def _how_it_failed(
        self, start: Callable[[], MPI.Request], verdict: int, timeout_s: float
    ) -> str:
        """Start and wait; empty if the operation has completed, else what became of it."""

        def is_hopeless() -> bool:
            return bool(self.talk.gave_up(verdict) or self.talk.elsewhere(verdict))

        try:
            self._request = start()
            is_done = wait(self._request.Test, is_hopeless, timeout_s)
        except RuntimeError as error:  # as mpi4py's are
            return f" ({type(error).__name__}: {error})"
        # A rank that comes when the others have gone finds their numbers all the same.
        if gone := self.talk.gave_up(verdict):
            return f" ({self._name(gone)} gave it up)"
        if is_done:
            return ""
        if elsewhere := self.talk.elsewhere(verdict):
            return f" ({self._name(elsewhere)} raised an error instead)"
        return f" within {timeout_s:g} s"

    def _who_came(self, place: Place) -> str:
        """In sentences: who is missing, where and since when, and what to do."""
        if self.talk.elsewhere(place.verdict) and not self.talk.gave_up(place.verdict):
            return "What it raised says what to mend."
        answered = self.talk.call_roll(place)
        if len(answered) == self._crew.size - 1:
            who = (
                "All ranks came in the end, but too late for some; if one is slow, raise timeout_s."
            )
        else:
            who = tell(Attendance(answered, {}, self._hosts), self._crew, place, self._last)
        first = ""
        if place.verdict == 1:
            first = (
                " If some ranks never train, make the MPIComm of a communicator of those that do, "
                "as Split() gives."
            )
        return (
            f"{who}{first} MPI cannot take back a call: start the job again from its last "
            "checkpoint."
        )

    def _name(self, ranks: Iterable[int]) -> str:
        return self._crew.name(ranks, self._hosts)
