"""Faults by address, which a rank of the job plants into itself: real signals, real silence.

A fault is written ``kind:rank:step``, or ``kind:rank:step@start`` if it is not for the first start
of the job. What the kinds do to that rank at that step:

=============  =====================================================================
nan            one element of its gradient becomes NaN
slow           it comes to the verdict 1.5 s late
hold           it does not come to the verdict before the folder holds a file called go
raise          it raises instead of coming to the verdict
stop           SIGSTOP instead of coming to the verdict; whoever watches may continue it
kill-before    SIGKILL instead of coming to the verdict
kill-during    SIGKILL while its message is under way and the sum is not complete
kill-after     SIGKILL when it has the verdict, before ``update()``
=============  =====================================================================
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor, nn

from shardscale import Communicator
from shardscale.comm import ProcessGroupComm
from shardscale.testing import inject

__all__ = ["Address", "Faults", "struck"]

SLOW_S = 1.5


class Address(NamedTuple):
    """What happens where and when."""

    kind: str
    rank: int
    step: int
    start: int = 0  # torchrun may start the ranks again

    @classmethod
    def parse(cls, text: str) -> Address:
        place, _, start = text.partition("@")
        kind, rank, step = place.split(":")
        return cls(kind, int(rank), int(step), int(start or 0))

    def __str__(self) -> str:
        return f"{self.kind}:{self.rank}:{self.step}@{self.start}"


class Struck(NamedTuple):
    """A fault that has happened."""

    at_s: float  # on the clock of time.monotonic(), which all processes of a host share
    pid: int


class Faults:
    """The faults of a job, as one of its ranks plants them."""

    def __init__(
        self, addresses: Sequence[Address], start: int, rank: int, size: int, folder: Path
    ) -> None:
        self._addresses = [address for address in addresses if address.start == start]
        self._start = start
        self._rank = rank
        self._size = size
        self._folder = folder
        self._step = -1

    def in_gradients(self, model: nn.Module, step: int) -> None:
        """After ``backward``."""
        self._step = step
        for fault in self._due("nan"):
            self._note(fault)
            inject(rank=fault.rank, step=fault.step, value=float("nan"))(model, self._rank, step)

    def before_verdict(self) -> None:
        for fault in self._due("slow"):
            self._note(fault)
            time.sleep(SLOW_S)
        for fault in self._due("hold"):
            self._note(fault)
            while not (self._folder / "go").exists():
                time.sleep(0.01)
        for fault in self._due("raise"):
            self._note(fault)
            raise ValueError(f"planted: {fault}")
        for fault in self._due("stop"):
            self._note(fault)
            os.kill(os.getpid(), signal.SIGSTOP)
        for fault in self._due("kill-before"):
            self._note(fault)
            os.kill(os.getpid(), signal.SIGKILL)
        self._let_die_in_transport()

    def after_verdict(self) -> None:
        """Before ``update()``."""
        for fault in self._due("kill-after"):
            self._note(fault)
            os.kill(os.getpid(), signal.SIGKILL)

    def through(self, comm: Communicator | None, timeout_s: float) -> Communicator | None:
        """The communicator to agree through: on the rank that shall die in it, one to die in."""
        if all(each[:2] != ("kill-during", self._rank) for each in self._addresses):
            return comm
        return _Fatal(comm or ProcessGroupComm(dist.group.WORLD, timeout_s), self)

    def die_in_transport(self, buffer: Tensor) -> None:
        """Enter the all-reduce as the others do, and die in it."""
        for fault in self._due("kill-during"):
            sent_before = _segments_sent()
            work = dist.all_reduce(buffer, async_op=True)
            while _segments_sent() == sent_before:
                time.sleep(0.001)
            assert not work.is_completed(), "nobody was late"
            self._note(fault)
            os.kill(os.getpid(), signal.SIGKILL)

    def _let_die_in_transport(self) -> None:
        """Come so late that a neighbour can die while the sum is under way."""
        for fault in self._addresses:
            neighbour = (fault.rank - 1) % self._size
            is_now = (fault.kind, fault.step) == ("kill-during", self._step)
            if is_now and neighbour == self._rank:
                deadline = time.monotonic() + 20.0
                while (victim := struck(self._folder, fault)) is None or _is_alive(victim.pid):
                    assert time.monotonic() < deadline, f"{fault} has not happened"
                    time.sleep(0.001)

    def _due(self, kind: str) -> list[Address]:
        here = Address(kind, self._rank, self._step, self._start)
        return [fault for fault in self._addresses if fault == here]

    def _note(self, fault: Address) -> None:
        path = _path(self._folder, fault)
        path.with_suffix(".new").write_text(f"{time.monotonic()} {os.getpid()}")
        path.with_suffix(".new").rename(path)


def struck(folder: Path, fault: Address) -> Struck | None:
    """When and to which process a fault happened, or None if it has not."""
    try:
        at_s, pid = _path(folder, fault).read_text().split()
    except FileNotFoundError:
        return None
    return Struck(float(at_s), int(pid))


class _Fatal:
    """A communicator whose rank may die within the all-reduce."""

    def __init__(self, comm: Communicator, faults: Faults) -> None:
        self.rank = comm.rank
        self.size = comm.size
        self._comm = comm
        self._faults = faults

    def all_reduce_sum_(self, buffer: Tensor) -> None:
        self._faults.die_in_transport(buffer)
        self._comm.all_reduce_sum_(buffer)

    def all_gather_object(self, obj: object) -> list[object]:
        return self._comm.all_gather_object(obj)


def _path(folder: Path, fault: Address) -> Path:
    return folder / f"{'-'.join(map(str, fault))}.struck"


def _segments_sent() -> int:
    """How many TCP segments with data this process has sent on the connections that it has."""
    total = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            with socket.socket(fileno=os.dup(int(fd))) as connection:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 160)
        except OSError:
            continue  # no socket, or none of TCP
        total += struct.unpack_from("I", info, 156)[0]  # tcpi_data_segs_out of linux/tcp.h
    return total


def _is_alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
