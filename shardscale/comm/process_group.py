"""A torch.distributed process group as a communicator: NCCL, Gloo and MPI by the same lines."""

from __future__ import annotations

import math
import time
import weakref
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_process_group_store

from shardscale.caller import warn_caller
from shardscale.comm.base import FIRST_TIMEOUT_S
from shardscale.comm.roll_call import RollCall
from shardscale.errors import MissingRankError

__all__ = ["ProcessGroupComm", "message_device"]

# A verdict is later than usual after this long; only then is the store looked at.
_LATE = timedelta(seconds=1)
_POLL = timedelta(seconds=0.25)
# Gloo passes two numbers round a ring of n ranks, in 2 (n - 1) steps one after the other. A step
# takes 50 to 90 us over the loopback (benchmarks/results/training-step, two ranks with a core each,
# November 2026), and over a network no less. So from 128 ranks on a verdict takes 13 ms and more,
# over 1 % of a training step of a second.
LARGE_FOR_GLOO = 128
_GLOO_STEP_S = 50e-6


_roll_calls: weakref.WeakKeyDictionary[dist.ProcessGroup, RollCall] = weakref.WeakKeyDictionary()


class ProcessGroupComm:
    """The ranks of a ``ProcessGroup``.

    On a CPU transport (Gloo, MPI) the host waits, and a verdict that does not complete names the
    ranks that did not come. On an accelerator's transport (NCCL) the stream waits and the host goes
    on; there the group's own watchdog ends a call that hangs.

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
        config = dist.get_backend_config(group)
        self._device = message_device(config)
        if group not in _roll_calls and self.size >= LARGE_FOR_GLOO:
            _warn_of_a_long_ring(self.size, _transport(config, self._device))
        # All scalers of a group share it: their verdicts come in one order on every rank.
        self._roll_call = _roll_calls.setdefault(
            group, RollCall(_get_process_group_store(group), "shardscale", self.rank, self.size)
        )

    def within(self, timeout_s: float) -> ProcessGroupComm:
        """The same group for a caller who waits so long; verdicts are counted together.

        Collective: none.
        """
        return ProcessGroupComm(self.group, timeout_s)

    def all_reduce_sum_(self, buffer: Tensor) -> None:
        """Replace ``buffer`` by its sum over the group.

        Gloo and NCCL reduce to one place and hand the result on, so all ranks get the same bits.

        Raises:
            MissingRankError: the sum did not complete in time, or a peer's connection broke.

        Collective: every rank of the group must call; sends 2 float64.
        Sync: none on an accelerator's transport; on a CPU transport the host waits.
        """
        self._roll_call.num_verdicts += 1
        message = buffer.to(self._device)
        try:
            timeout_s = self._timeout_of_this_verdict()
            work = self.group.allreduce([message], _sum_within(timeout_s))
            if message.is_cpu:
                self._wait(work, timeout_s)
            else:
                work.wait()
        except RuntimeError as error:
            raise MissingRankError(self._explain(error)) from error
        if message is not buffer:
            buffer.copy_(message)

    def all_gather_object(self, obj: object) -> list[object]:
        """Every rank's object, through the group's store; None for a rank that did not answer.

        Collective: every rank should call; at most ``timeout_s`` (60 s if none) is waited.
        """
        return self._roll_call.gather(obj, self.timeout_s or FIRST_TIMEOUT_S)

    def _timeout_of_this_verdict(self) -> float | None:
        if self.timeout_s is None and self._roll_call.num_verdicts == 1:
            return FIRST_TIMEOUT_S
        return self.timeout_s

    def _wait(self, work: dist.Work, timeout_s: float | None) -> None:
        """Wait for ``work``, give up with the others as soon as one of them has."""
        first_slice = _LATE if timeout_s is None else min(_LATE, timedelta(seconds=timeout_s))
        if _is_done(work, first_slice):
            return
        deadline = time.monotonic() - first_slice.total_seconds() + (timeout_s or math.inf)
        while time.monotonic() < deadline:
            if self._roll_call.is_alarmed():
                raise RuntimeError("another rank gave up, or the store is silent")
            if _is_done(work, _POLL):
                return
        raise RuntimeError(f"not complete after {timeout_s:g} s")

    def _explain(self, error: RuntimeError) -> str:
        num = self._roll_call.num_verdicts
        what = f"rank {self.rank} of {self.size}: verdict {num} did not complete"
        hint = ""
        if num == 1:
            hint = (
                " It was the first verdict: if some ranks never train, name the group of those that"
                " do with process_group=."
            )
        return f"{what} ({error}). {self._roll_call.report()}{hint}"


def _sum_within(timeout_s: float | None) -> dist.AllreduceOptions:
    options = dist.AllreduceOptions()
    options.reduceOp = dist.ReduceOp(dist.ReduceOp.SUM)
    if timeout_s is not None:
        # The transport must give up, too: a sum left pending would complete for a rank that comes
        # late, when the others have raised, and keep their processes from ending.
        options.timeout = timedelta(seconds=timeout_s)
    return options


def _is_done(work: dist.Work, patience: timedelta) -> bool:
    """Wait for ``work`` a while; False if it is still under way.

    Raises:
        RuntimeError: it failed.
    """
    try:
        work.wait(patience)
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
