"""The training job of the fault matrix over MPI: ``-m tests.cluster.mpi_job --folder DIR ...``."""

from __future__ import annotations

import os
import signal
import time

import torch
from mpi4py import MPI
from torch import Tensor

from shardscale.comm import MPIComm
from shardscale.errors import MissingRankError
from tests.cluster import job
from tests.cluster.faults import Faults

PATIENCE_S = 3.0


def main() -> None:
    chosen = job.options()
    world = MPI.COMM_WORLD
    job.Faults = MPIFaults
    world.Barrier()  # nobody is to wait in vain for a slow import
    MPIFaults.comm = MPIComm(world, chosen.timeout)
    try:
        job.run(chosen, world.rank, world.size, MPIFaults.comm)
    except MissingRankError:
        # mpirun ends all ranks as soon as this one has left; the others are to have their say.
        missing = {fault.rank for fault in chosen.fault if fault.kind == "stop"}
        deadline = time.monotonic() + PATIENCE_S
        for rank in set(range(world.size)) - missing:
            while job.end_of(chosen.folder, rank) is None and time.monotonic() < deadline:
                time.sleep(0.01)
        raise


class MPIFaults(Faults):
    """Dies in the transport of MPI."""

    comm: MPIComm  # of this process

    def die_in_transport(self, buffer: Tensor) -> None:
        """Give the others this rank's numbers, and die without theirs."""
        for fault in self._due("kill-during"):
            rows = torch.empty(self.comm.size, 2, dtype=torch.float64)
            self.comm._line._comm.Iallgather(buffer, rows)
            self._note(fault)
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
