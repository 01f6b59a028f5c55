"""The seam between the scaler and whatever carries its two numbers between ranks."""

from shardscale.comm.base import Communicator, Solo
from shardscale.comm.bond import Bond
from shardscale.comm.env import RankEnv, resolve
from shardscale.comm.mpi import MPIComm
from shardscale.comm.process_group import ProcessGroupComm

__all__ = ["Bond", "Communicator", "MPIComm", "ProcessGroupComm", "RankEnv", "resolve", "Solo"]
