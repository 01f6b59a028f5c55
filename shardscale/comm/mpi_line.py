"""A duplicate of an MPI communicator on which nothing but verdicts travels, until one fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from shardscale.comm.mpi_talk import Talk, keep_for_ever, say_ranks, wait
from shardscale.errors import MissingRankError

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Line"]

_TAG = 1
_HOST_BYTES = 64  # the longest name that Linux allows
_MAKING = "making its MPIComm"


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

        self.num_verdicts = 0
        self._rank, self._size = comm.Get_rank(), comm.Get_size()
        self._hosts: list[str] = []
        self._why_broken = ""
        self._mine = np.empty(2)
        self._rows = np.empty((self._size, 2))
        # As long as there is no duplicate the ranks can talk only beside the program's own
        # messages. They do so when they give up, with a tag that hardly any program uses.
        self.talk = Talk(comm, MPI.COMM_WORLD.Get_attr(MPI.TAG_UB))
        self._complete(lambda: self._duplicate(comm), _MAKING, timeout_s)
        name = MPI.Get_processor_name().encode()[:_HOST_BYTES].ljust(_HOST_BYTES, b"\0")
        names = bytearray(_HOST_BYTES * self._size)
        self._complete(lambda: self._comm.Iallgather(name, names), _MAKING, timeout_s)
        self._hosts = [
            names[i : i + _HOST_BYTES].rstrip(b"\0").decode(errors="replace")
            for i in range(0, len(names), _HOST_BYTES)
        ]
        self.talk = Talk(self._comm, _TAG)

    def exchange(self, numbers: list[float], timeout_s: float) -> NDArray[np.float64]:
        """The two numbers of every rank, (size, 2); the next exchange overwrites them.

        Raises:
            MissingRankError: not all ranks came in time, now or before.

        Collective: every rank must call.
        """
        if self._why_broken:
            raise MissingRankError(
                f"rank {self._rank} of {self._size}: this communicator cannot be used any more, "
                f"because {self._why_broken}. Start the job again from its last checkpoint."
            )
        self._mine[:] = numbers
        what = f"verdict {self.num_verdicts + 1}"
        self._complete(lambda: self._comm.Iallgather(self._mine, self._rows), what, timeout_s)
        self.num_verdicts += 1
        return self._rows

    def _duplicate(self, comm: MPI.Intracomm) -> MPI.Request:
        self._comm, request = comm.Idup()
        return request

    def _complete(self, start: Callable[[], MPI.Request], what: str, timeout_s: float) -> None:
        """Start an operation and wait. If it does not complete, the line is broken for good."""
        at = self.num_verdicts + 1
        self._why_broken = f"{what} was interrupted"
        try:
            why = self._why_not(start, at, timeout_s)
            self._why_broken = why and f"{what} did not complete ({why})"
        finally:
            if self._why_broken:
                keep_for_ever(self)
        if why:
            raise MissingRankError(
                f"rank {self._rank} of {self._size}: {self._why_broken}. {self._who_came(at)}"
            )

    def _why_not(self, start: Callable[[], MPI.Request], at: int, timeout_s: float) -> str:
        """Start and wait; empty if the operation has completed, else why it was given up."""

        def is_hopeless() -> bool:
            return bool(self.talk.gave_up(at) or self.talk.elsewhere(at))

        try:
            self._request = start()
            is_done = wait(self._request.Test, is_hopeless, timeout_s)
        except RuntimeError as error:  # as mpi4py's are
            return f"{type(error).__name__}: {error}"
        # A rank that comes when the others have gone finds their numbers all the same.
        if gone := self.talk.gave_up(at):
            return f"{say_ranks(gone)} gave it up"
        if is_done:
            return ""
        if elsewhere := self.talk.elsewhere(at):
            return f"{say_ranks(elsewhere)} raised an error instead"
        return f"not complete after {timeout_s:g} s"

    def _who_came(self, at: int) -> str:
        """In sentences: who is missing, where and since when, and what to do."""
        if self.talk.elsewhere(at) and not self.talk.gave_up(at):
            return "What it raised says what to mend."
        came = self.talk.call_roll(at)
        missing = [rank for rank in range(self._size) if rank not in came]
        who = "All ranks came in the end, but too late for some."
        if missing:
            names = ", ".join(f"rank {rank}{self._last_seen(rank, at)}" for rank in missing)
            who = f"Did not come: {names}. Came: {say_ranks(came)}."
        first = ""
        if at == 1:
            first = (
                " If some ranks never train, make the MPIComm of a communicator of those that do, "
                "as Split() gives."
            )
        return (
            f"{who} Every rank must make every call of the scaler; if one is slow, raise timeout_s."
            f"{first} MPI cannot take back a call: start the job again from its last checkpoint."
        )

    def _last_seen(self, rank: int, at: int) -> str:
        if not self._hosts:  # not even made yet
            return ""
        return f" ({self._hosts[rank]}" + (f", last at verdict {at - 1})" if at > 1 else ")")
