"""Cases for the rank pool: the doctor on forked ranks, and ranks that leave it half-way."""

from __future__ import annotations

import json
import os
import signal
import threading
from typing import Any

import torch.distributed as dist

from shardscale.comm import ProcessGroupComm
from shardscale.comm.env import resolve
from shardscale.doctor import checks, command, examination, names, rounds, timing
from tests.ranks.rank import scratch

__all__ = [
    "examined",
    "lose_a_rank",
    "lose_rank_0",
    "never_come",
    "reduce_nothing",
    "stick_in_an_all_reduce",
    "stick_in_torchs_last_check",
    "written",
]


def examined(rank: int, size: int, *arguments: str) -> int:
    """Run the command as a launcher's rank; its exit code, if it leaves the interpreter alone."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="1",  # nobody is there: the ranks meet in a file
    )
    rendezvous = dist.FileStore(str(scratch() / "store"), size)
    command.come_together = lambda environ, backend, timeout_s: (
        resolve(environ),
        rendezvous,
        "gloo",
    )
    try:
        command.main(arguments)
    except SystemExit as end:
        return int(end.code)


def written(rank: int, size: int) -> tuple[int, Any]:
    """The exit code, and the report that rank 0 has written when its ranks have ended."""
    path = scratch() / "report.json"
    code = examined(rank, size, "--json", str(path))
    return code, json.loads(path.read_text()) if rank == 0 else None


def examined_in_haste(rank: int, size: int) -> int:
    """The same with limits that a test can wait for."""
    examination._LIMIT_S = 2.0
    rounds._GRACE_S = 0.5
    return examined(rank, size, "--timeout", "2")


def reduce_nothing(rank: int, size: int) -> int:
    """Our scaler, broken: what a rank finds never leaves it."""
    ProcessGroupComm.all_reduce_sum_ = lambda self, buffer: None
    return examined(rank, size)


def never_come(rank: int, size: int) -> int:
    return 0 if rank == 1 else examined_in_haste(rank, size)


def lose_a_rank(rank: int, size: int) -> int:
    """Rank 1 dies when it is to take part in an all-reduce."""
    if rank == 1:
        timing.median_times = lambda devices: os.kill(os.getpid(), signal.SIGKILL)
    return examined_in_haste(rank, size)


def lose_rank_0(rank: int, size: int) -> int:
    if rank == 0:
        names.look_up = lambda hosts: os.kill(os.getpid(), signal.SIGKILL)
    return examined_in_haste(rank, size)


def stick_in_an_all_reduce(rank: int, size: int) -> int:
    if rank == 1:
        timing.median_times = lambda devices: threading.Event().wait()
    return examined_in_haste(rank, size)


def stick_in_torchs_last_check(rank: int, size: int) -> int:
    """A torch whose scaler hangs although nothing foretold it."""

    def hang_with_torch(make, ground):
        if rank == 1 and not isinstance(make(1.0), checks.ShardedGradScaler):
            threading.Event().wait()
        return last.right

    last = checks.CHECKS[-1]
    examination.CHECKS = [last._replace(case=hang_with_torch)]
    return examined_in_haste(rank, size)
