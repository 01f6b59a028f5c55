"""A torch.distributed process group as a communicator: NCCL, Gloo and MPI by the same lines."""

from __future__ import annotations

import socket
import time
import weakref
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import (
    Store,
    _get_process_group_store,
    default_pg_timeout,
)

from shardscale.caller import warn_caller
from shardscale.comm.attendance import Crew, Place
from shardscale.comm.base import FIRST_TIMEOUT_S
from shardscale.comm.monitor import Monitor
from shardscale.comm.register import Register
from shardscale.comm.roll_call import GIVEN_UP, RollCall
from shardscale.errors import MissingRankError

__all__ = ["ProcessGroupComm", "is_alive", "join_job", "message_device"]

# A verdict is later than usual after this long; only then is the store looked at.
_LATE_S = 1.0
_POLL_S = 0.25
# So long before the group's own watchdog a monitor's time is over: a roll call takes no longer.
_LEAD_S = 10.0
# Gloo passes two numbers round a ring of n ranks, in 2 (n - 1) steps one after the other. A step
# takes 50 to 90 us over the loopback (benchmarks/results/training-step, two ranks with a core each,
# November 2026), and over a network no less. So from 128 ranks on a verdict takes 13 ms and more,
# over 1 % of a training step of a second.
LARGE_FOR_GLOO = 128
_GLOO_STEP_S = 50e-6


_roll_calls: weakref.WeakKeyDictionary[dist.ProcessGroup, RollCall] = weakref.WeakKeyDictionary()
_monitors: weakref.WeakKeyDictionary[dist.ProcessGroup, Monitor] = weakref.WeakKeyDictionary()
_registers: weakref.WeakKeyDictionary[dist.ProcessGroup, Register] = weakref.WeakKeyDictionary()


class ProcessGroupComm:
    """The ranks of a ``ProcessGroup``.

    On a CPU transport (Gloo, MPI) the host waits, and a verdict that does not complete names the
    ranks that did not come. On an accelerator's transport (NCCL) the stream waits and the host goes
    on; there a monitor finds the same, logs it, and aborts the group.

    Args:
        group: The agreeing group; this rank must be a member.
        timeout_s: Seconds that a verdict may take. None: 60 for the first one, because a rank that
            never comes at all shows there; the group's own timeout for those after it.
    """

    def __init__(self, group: dist.ProcessGroup, timeout_s: float | None = None) -> None:
        self.group = group
        self.rank = group.rank()
        self.size = group.size()
        self.timeout_s = timeout_s
        self.step_under_way: int | None = None
        config = dist.get_backend_config(group)
        self._device = message_device(config)
        join_job()
        if group not in _roll_calls and self.size >= LARGE_FOR_GLOO:
            _warn_of_a_long_ring(self.size, _transport(config, self._device))
        # All scalers of a group share them: their verdicts come in one order on every rank.
        if group not in _roll_calls:
            _roll_calls[group] = _roll_call_of(group, is_host=self._device.type == "cpu")
            if self._device.type != "cpu":
                _monitors[group] = Monitor(self._device, _roll_calls[group], _while_alive(group))
        self._roll_call = _roll_calls[group]
        self._monitor = _monitors.get(group)

    @property
    def is_aborted(self) -> bool:
        """Whether a verdict on an accelerator took too long, and the group was given up."""
        return self._monitor is not None and self._monitor.finding is not None

    def within(self, timeout_s: float) -> ProcessGroupComm:
        """The same group for a caller who waits so long; verdicts are counted together.

        Collective: none.
        """
        return ProcessGroupComm(self.group, timeout_s)

    def all_reduce_sum_(self, buffer: Tensor) -> None:
        """Replace ``buffer`` by its sum over the group.

        Gloo and NCCL reduce to one place and hand the result on, so all ranks get the same bits.

        Raises:
            MissingRankError: the sum did not complete in time, or a peer's connection broke. On an
                accelerator's transport: an earlier one did not.

        Collective: every rank of the group must call; sends 2 float64.
        Sync: none on an accelerator's transport; on a CPU transport the host waits.
        """
        self._require_intact()
        place = self._roll_call.enter(self.step_under_way)
        timeout_s = self.timeout_s
        if timeout_s is None and place.verdict == 1:
            timeout_s = FIRST_TIMEOUT_S
        message = buffer.to(self._device)
        if self._monitor is None:
            self._sum_on_host_(message, place, timeout_s)
        else:
            self._sum_on_stream_(message, place, timeout_s, self._monitor)
        if message is not buffer:
            buffer.copy_(message)

    def all_gather_object(self, obj: object) -> list[object]:
        """Every rank's object, through the group's store; None for a rank that did not answer.

        Raises:
            MissingRankError: a verdict on an accelerator took too long, and the group was given up.

        Collective: every rank should call; at most ``timeout_s`` (60 s if none) is waited.
        """
        self._require_intact()
        return self._roll_call.gather(obj, self.timeout_s or FIRST_TIMEOUT_S)

    def _sum_on_host_(self, message: Tensor, place: Place, timeout_s: float | None) -> None:
        started = time.monotonic()
        try:
            work = self.group.allreduce([message], _sum_within(timeout_s))
            if not _is_done(work, _LATE_S if timeout_s is None else min(_LATE_S, timeout_s / 2)):
                self._wait_long(work, place, started, timeout_s or self._own_timeout_s())
        except RuntimeError as error:
            limit_s = timeout_s or self._own_timeout_s()
            is_over = time.monotonic() - started >= limit_s
            how = f" within {limit_s:g} s" if is_over else f" ({error})"
            raise MissingRankError(self._roll_call.report(place, how, limit_s)) from error
        self._roll_call.last = place

    def _wait_long(self, work: dist.Work, place: Place, started: float, limit_s: float) -> None:
        """Wait for ``work``, give up with the others as soon as one of them has."""
        poll_s = min(4 * _POLL_S, _POLL_S * max(1.0, self.size / LARGE_FOR_GLOO))
        while (left_s := started + limit_s - time.monotonic()) > 0:
            if self._roll_call.look(place, is_late=left_s <= limit_s / 2):
                raise RuntimeError(GIVEN_UP)
            if _is_done(work, min(poll_s, left_s)):
                return
        raise RuntimeError("its time is over")

    def _sum_on_stream_(
        self, message: Tensor, place: Place, timeout_s: float | None, monitor: Monitor
    ) -> None:
        own_s = self._own_timeout_s()
        # The group's watchdog ends the process when its time is over, and the sentence comes first.
        limit_s = min(timeout_s or own_s, own_s - min(_LEAD_S, own_s / 4))
        with monitor.watch(place, limit_s):
            try:
                self.group.allreduce([message], _sum_within(timeout_s)).wait()
            except RuntimeError as error:
                self._require_intact()
                how = f" ({error})"
                raise MissingRankError(self._roll_call.report(place, how, limit_s)) from error

    def _require_intact(self) -> None:
        if self._monitor is not None and self._monitor.finding is not None:
            raise MissingRankError(self._monitor.finding)

    def _own_timeout_s(self) -> float:
        """The group's, which may be set anew at any time."""
        try:
            own: timedelta = self.group._get_backend(self._device).options._timeout
        except (AttributeError, RuntimeError):  # of a transport that does not tell
            own = default_pg_timeout
        return own.total_seconds()


def join_job() -> None:
    """Enter this process in its job's register, once; for the errors of those that miss it."""
    world = dist.group.WORLD
    if world is not None and world not in _registers:
        _registers[world] = Register(world.rank(), world.size())
        if world.size() > 1:
            _registers[world].join(_get_process_group_store(world))


def is_alive(group: dist.ProcessGroup) -> bool:
    """Whether the group has not been destroyed."""
    return dist.is_initialized() and group in dist.distributed_c10d._world.pg_map


def _roll_call_of(group: dist.ProcessGroup, is_host: bool) -> RollCall:
    world = dist.group.WORLD
    assert world is not None
    ranks = tuple(dist.get_process_group_ranks(group))
    in_job = None if ranks == tuple(range(len(ranks))) else ranks
    crew = Crew(group.rank(), group.size(), socket.gethostname(), in_job)
    stores = _get_process_group_store(group), _get_process_group_store(world)
    # NCCL meets through the store when a group is first used. A host that waits there for a rank
    # that does not come keeps the client to itself, so the monitor gets one of its own.
    opened = (lambda store: store) if is_host else _clone
    return RollCall(crew, _registers[world], *(partial(opened, store) for store in stores))


def _clone(store: Store) -> Store:
    try:
        clone: Store = store.clone()  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError):  # a store in Python need not have it
        return store
    return clone


def _while_alive(group: dist.ProcessGroup) -> Callable[[], dist.ProcessGroup | None]:
    """Finds the group as long as it exists, and does not keep it alive."""
    reference = weakref.ref(group)

    def find() -> dist.ProcessGroup | None:
        found = reference()
        return found if found is not None and is_alive(found) else None

    return find


def _sum_within(timeout_s: float | None) -> dist.AllreduceOptions:
    options = dist.AllreduceOptions()
    options.reduceOp = dist.ReduceOp(dist.ReduceOp.SUM)
    if timeout_s is not None:
        # The transport must give up, too: a sum left pending would complete for a rank that comes
        # late, when the others have raised, and keep their processes from ending.
        options.timeout = timedelta(seconds=timeout_s)
    return options


def _is_done(work: dist.Work, patience_s: float) -> bool:
    """Wait for ``work`` a while; False if it is still under way.

    Raises:
        RuntimeError: it failed.
    """
    try:
        work.wait(timedelta(seconds=max(0.001, patience_s)))  # 0 ms would be for ever
    except RuntimeError:
        # A wait that timed out leaves the work pending. It may have ended since then, and well.
        if not work.is_completed():
            return False
        work.wait()
    return True


def _transport(backend_config: str, device: torch.device) -> str:
    """The backend that carries tensors of a device."""
    pairs = (pair.partition(":") for pair in backend_config.split(","))
    return {kind: backend for kind, _, backend in pairs}.get(device.type, "")


def _warn_of_a_long_ring(size: int, transport: str) -> None:
    # On every rank: where a warning is an error, one that a single rank raised would leave the
    # others waiting for it.
    if transport != "gloo":
        return
    num_steps = 2 * (size - 1)
    warn_caller(
        f"the agreeing group has {size} ranks and agrees over Gloo, which passes each verdict "
        f"round a ring of them on the host: {num_steps} steps, {num_steps * _GLOO_STEP_S:.2g} s or "
        "more. Give the group a transport that sums in a tree: on GPUs NCCL, as by "
        'init_process_group("cpu:gloo,cuda:nccl"); on CPUs one of your own, passed as comm=.',
    )


def message_device(backend_config: str) -> torch.device:
    """Where a group's messages live, from its ``device:backend`` pairs alone.

    The accelerator, if the group has a transport of its own for it and it knows float64; else the
    CPU. Gloo and MPI move every message through the host anyway, whatever device they accept.
    """
    for pair in backend_config.split(","):
        device, _, backend = pair.partition(":")
        if device in ("cpu", "mps") or backend in ("gloo", "mpi", "fake", "undefined", ""):
            continue
        if torch.get_device_module(device).is_available():
            return torch.device(device)
    return torch.device("cpu")
