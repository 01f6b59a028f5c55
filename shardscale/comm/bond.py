"""Which group a scaler agrees in: found when it is needed, then kept."""

from __future__ import annotations

import itertools
import weakref

import torch.distributed as dist

from shardscale.comm.base import FIRST_TIMEOUT_S, Communicator, Timed, require_time
from shardscale.comm.process_group import ProcessGroupComm, is_alive, join_job
from shardscale.errors import ConfigError, StageError
from shardscale.records import Members

__all__ = ["Bond"]


class _Counters:
    """One counter for each group."""

    def __init__(self, first: int) -> None:
        self._first = first
        self._of: weakref.WeakKeyDictionary[object, itertools.count[int]] = (
            weakref.WeakKeyDictionary()
        )

    def next(self, group: object) -> int:
        return next(self._of.setdefault(group, itertools.count(self._first)))


# Scalers of one group are numbered as they are made, because all its ranks must make them in the
# same order. Copies, and disabled scalers that clip, get a number only when they first agree: one
# rank alone may make those for its own purposes.
_made = _Counters(0)
_copied = _Counters(2**16)


class Bond:
    """The group that one scaler belongs to.

    Before a process group exists the scaler is alone. Once it has agreed in a group it stays with
    it: another group's ranks would not share its history.

    Args:
        process_group: The agreeing group; None for the default group, whenever that comes.
        comm: A communicator instead of a process group.
        timeout_s: Seconds that a verdict may take; None for the defaults. It comes before what a
            communicator was made with, if that one can be told.
        is_numbered: Whether it counts among the scalers that all ranks make alike.

    Raises:
        ConfigError: both are given, this rank is no member of the group, or the timeout is not a
            number of at least 0.001.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
        comm: Communicator | None = None,
        timeout_s: float | None = None,
        is_numbered: bool = True,
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
        require_time(timeout_s)
        if comm is not None and not isinstance(comm, Communicator):
            raise ConfigError(
                f"comm is a {type(comm).__name__}, but must have rank, size, all_reduce_sum_ and "
                "all_gather_object; see shardscale.Communicator."
            )
        self._process_group = process_group
        self._comm = comm
        self._timed = comm
        if timeout_s is not None and isinstance(comm, Timed):
            self._timed = comm.within(timeout_s)
        self.timeout_s = timeout_s
        self.is_lost = False  # the group was given, and could not be carried along with a pickle
        self._joined: ProcessGroupComm | None = None
        self._members: Members | None = None
        self._ordinal = _made.next(self._key) if is_numbered else None
        if comm is None and dist.is_available():
            join_job()  # a rank that never comes to a verdict has at least been here

    @property
    def ordinal(self) -> int:
        """Which of its group's scalers this is, in the order of making."""
        if self._ordinal is None:
            self._ordinal = _copied.next(self._key)
        return self._ordinal

    @property
    def names_a_group(self) -> bool:
        """Whether a communicator was given, or a group that is not the whole job."""
        is_whole_job = self._process_group is None or self._process_group is dist.group.WORLD
        return self._comm is not None or not is_whole_job

    @property
    def is_aborted(self) -> bool:
        """Whether the group was given up, so that nothing on an accelerator can be waited for."""
        comm = self._timed or self._joined
        return isinstance(comm, ProcessGroupComm) and comm.is_aborted

    def twin(self) -> Bond:
        """Another scaler's bond to the same group, in the same process."""
        bond = Bond(self._process_group, self._comm, self.timeout_s, is_numbered=False)
        bond.is_lost = self.is_lost
        return bond

    def communicator(self) -> Communicator | None:
        """The communicator of the group, or None where this process decides alone.

        Raises:
            StageError: the group in which this scaler agreed exists no more, or was not carried
                along.
        """
        if self.is_lost:
            raise StageError(
                "this scaler was unpickled from one with a comm= or process_group= of its own, "
                "which no pickle can carry. Make a new scaler with the group it is to agree in, "
                "and load this one's state_dict into it."
            )
        if self._timed is not None:
            return self._timed
        if self._joined is not None:
            self._require_alive(self._joined)
            return self._joined
        if self._process_group is None and not (dist.is_available() and dist.is_initialized()):
            return None
        group = self._process_group or dist.group.WORLD
        assert group is not None
        if not is_alive(group):
            raise StageError(
                "the process_group given to this scaler has been destroyed. Make a new scaler with "
                "a group that exists, and load this one's state_dict into it."
            )
        if group.size() == 1:
            return None
        self._joined = ProcessGroupComm(group, self.timeout_s)
        return self._joined

    def impatient(self) -> Communicator:
        """The communicator of the group, for a rank that only joins to raise an error.

        The others may not come at all: without a timeout given it waits no longer than for a first
        verdict.
        """
        comm = self.communicator()
        assert comm is not None
        if isinstance(comm, Timed) and comm.timeout_s is None:
            return comm.within(FIRST_TIMEOUT_S)
        return comm

    def whereabouts(self) -> str:
        """``rank 1 of 4`` for an error of this rank's own, empty where it is alone; binds nothing.

        Collective: none.
        """
        comm = self._timed or self._joined
        if comm is not None:
            return f"rank {comm.rank} of {comm.size}"
        is_up = dist.is_available() and dist.is_initialized()
        group = self._process_group or (dist.group.WORLD if is_up else None)
        if group is None or group.size() == 1:
            return ""
        return f"rank {group.rank()} of {group.size()}"

    def members(self) -> Members:
        """The ranks that agree, this one alone where it decides alone."""
        here = dist.get_rank() if dist.is_available() and dist.is_initialized() else None
        comm = self.communicator()
        if isinstance(comm, ProcessGroupComm):
            if self._members is None:
                ranks = frozenset(dist.get_process_group_ranks(comm.group))
                self._members = Members(comm.rank, comm.size, dist.get_rank(), ranks)
            return self._members
        if comm is None:
            return Members(0, 1, here or 0, frozenset([here or 0]))
        return Members(comm.rank, comm.size, comm.rank if here is None else here, None)

    @property
    def _key(self) -> object:
        # The whole job has no object before it is initialised; this class stands for it.
        return self._comm or (self._process_group if self.names_a_group else Bond)

    def _require_alive(self, joined: ProcessGroupComm) -> None:
        if not is_alive(joined.group):
            raise StageError(
                f"rank {joined.rank} of {joined.size}: this scaler agreed in a process group that "
                "has since been destroyed, and the ranks of another one would not share its "
                "history. Make a new scaler and load this one's state_dict into it."
            )
