"""Which group a scaler agrees in: found when it is needed, then kept."""

from __future__ import annotations

import itertools
import math
import weakref

import torch.distributed as dist

from shardscale.comm.base import Communicator
from shardscale.comm.process_group import ProcessGroupComm
from shardscale.errors import ConfigError, StageError

__all__ = ["Bond"]

# Scalers are numbered as they are made, because all ranks must make them in the same order. Ranks
# that are threads make theirs at the same time, so each communicator counts its own.
_process_ordinals = itertools.count()
_comm_ordinals: weakref.WeakKeyDictionary[Communicator, itertools.count[int]] = (
    weakref.WeakKeyDictionary()
)


class Bond:
    """The group that one scaler belongs to.

    Before a process group exists the scaler is alone. Once it has agreed in a group it stays with
    it: another group's ranks would not share its history.

    Args:
        process_group: The agreeing group; None for the default group, whenever that comes.
        comm: A communicator instead of a process group.
        timeout_s: Seconds that a verdict may take; None for the defaults.

    Raises:
        ConfigError: both are given, this rank is no member of the group, or the timeout is not a
            number of at least 0.001.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
        comm: Communicator | None = None,
        timeout_s: float | None = None,
    ) -> None:
        if process_group is not None and comm is not None:
            raise ConfigError(
                "process_group and comm are both given, but a scaler agrees in one group. "
                "Pass only one of them."
            )
        if process_group is not None and dist.get_rank(process_group) < 0:
            raise ConfigError(
                f"rank {dist.get_rank()} is not a member of the process_group given, and torch's "
                "collectives silently do nothing there. Make the scaler only on the group's ranks."
            )
        if timeout_s is not None and not 0.001 <= timeout_s < math.inf:
            raise ConfigError(
                f"timeout_s is {timeout_s!r}, but must be a number of seconds, at least 0.001."
            )
        self._process_group = process_group
        self._comm = comm
        self.timeout_s = timeout_s
        self._joined: ProcessGroupComm | None = None
        counter = (
            _process_ordinals
            if comm is None
            else _comm_ordinals.setdefault(comm, itertools.count())
        )
        self.ordinal = next(counter)

    def communicator(self) -> Communicator | None:
        """The communicator of the group, or None where this process decides alone.

        Raises:
            StageError: the group in which this scaler agreed exists no more.
        """
        if self._comm is not None:
            return self._comm
        if self._joined is not None:
            self._require_alive(self._joined)
            return self._joined
        if self._process_group is None and not (dist.is_available() and dist.is_initialized()):
            return None
        group = self._process_group or dist.group.WORLD
        assert group is not None
        if not _is_alive(group):
            raise StageError(
                "the process_group given to this scaler has been destroyed. Make a new scaler with "
                "a group that exists, and load this one's state_dict into it."
            )
        if group.size() == 1:
            return None
        self._joined = ProcessGroupComm(group, self.timeout_s, str(self.ordinal))
        return self._joined

    def _require_alive(self, joined: ProcessGroupComm) -> None:
        if not _is_alive(joined.group):
            raise StageError(
                f"rank {joined.rank} of {joined.size}: this scaler agreed in a process group that "
                "has since been destroyed, and the ranks of another one would not share its "
                "history. Make a new scaler and load this one's state_dict into it."
            )


def _is_alive(group: dist.ProcessGroup) -> bool:
    return dist.is_initialized() and group in dist.distributed_c10d._world.pg_map
