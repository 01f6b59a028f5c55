"""The seam between the scaler and whatever carries its two numbers between ranks."""

from shardscale.comm.base import Communicator, Solo
from shardscale.comm.bond import Bond, Members
from shardscale.comm.process_group import ProcessGroupComm

__all__ = ["Bond", "Communicator", "Members", "ProcessGroupComm", "Solo"]
