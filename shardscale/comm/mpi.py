"""The ranks of an MPI communicator, through mpi4py and without torch.distributed."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from shardscale.comm.base import FIRST_TIMEOUT_S, require_time
from shardscale.comm.mpi_checks import require_usable
from shardscale.comm.mpi_line import Line

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["MPIComm"]

# MPI knows no timeout. torch gives a group of Gloo half an hour, and so does this.
_LATER_TIMEOUT_S = 1800.0


class MPIComm:
    """The ranks of an mpi4py communicator.

    Works on a duplicate of the communicator, so that nothing else the program sends can mix with
    it. Make one for a communicator and give it to all scalers that agree there: the duplicate is
    kept until the process ends.

    The numbers of all ranks are gathered and added in rank order, because MPI does not promise that
    its own sum has the same bits on every rank. A buffer on another device is copied to the host
    and back, once each: MPI libraries rarely read device memory, those from PyPI never.

    Args:
        comm: An intracommunicator, as ``MPI.COMM_WORLD``, of the ranks that agree.
        timeout_s: Seconds that a verdict may take. None: 60 for making this object and for the
            first verdict, because a rank that never comes at all shows there; half an hour for
            those after it. A scaler's own ``timeout_s=`` comes before this one.

    Raises:
        ConfigError: mpi4py or MPI cannot be used, or this is no communicator to agree in; says why.
        MissingRankError: not all ranks of ``comm`` made one in time; names them.

    Collective: every rank of ``comm`` must make one, in the same order as its other collectives.
    """

    def __init__(self, comm: MPI.Intracomm, timeout_s: float | None = None) -> None:
        require_usable(comm)
        require_time(timeout_s)
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()
        self.timeout_s = timeout_s
        self.step_under_way: int | None = None
        self._line = Line(comm, timeout_s or FIRST_TIMEOUT_S)

    def within(self, timeout_s: float) -> MPIComm:
        """The same communicator for a caller who waits so long; verdicts are counted together.

        Collective: none.
        """
        other = copy.copy(self)
        other.timeout_s = timeout_s
        return other

    def all_reduce_sum_(self, buffer: Tensor) -> None:
        """Replace ``buffer`` by its sum over the ranks.

        After an error the communicator is broken, and every later call raises at once.

        Args:
            buffer: (2,) float64, on any device.

        Raises:
            MissingRankError: the sum did not complete in time, or others have given it up; names
                the ranks that did not come, and their hosts.

        Collective: every rank must call; sends 2 float64 to all the others.
        Sync: the host waits; for the buffer's device, too.
        """
        timeout_s = self.timeout_s
        if timeout_s is None:
            timeout_s = FIRST_TIMEOUT_S if self._line.num_verdicts == 0 else _LATER_TIMEOUT_S
        rows = self._line.exchange(buffer.tolist(), self.step_under_way, timeout_s)
        # One after the other. A sum may add by halves, on another machine by others.
        buffer.copy_(torch.from_numpy(np.add.accumulate(rows)[-1]))

    def all_gather_object(self, obj: object) -> list[object]:
        """Every rank's object in rank order; None for a rank that did not answer.

        Made of messages between any two ranks: it works on any thread, beside a collective, and
        after one that was given up.

        Collective: every rank should call; at most ``timeout_s`` (60 s if none) is waited.
        """
        timeout_s = self.timeout_s or FIRST_TIMEOUT_S
        return self._line.talk.gather(obj, self._line.num_verdicts, timeout_s)
