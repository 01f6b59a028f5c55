"""What init_distributed costs beside torch's own start of a group."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from functools import partial

import torch.distributed as dist
from job import on_ranks, slowest
from side_by_side import Row, in_turns, quantile

from shardscale import init_distributed

__all__ = ["rows"]

SIZES = (2, 8)
GOAL_S = 0.1


def rows(num_rounds: int) -> list[Row]:
    """A group of Gloo by either, one after the other in the same processes."""
    found = []
    for size in SIZES:
        taken = slowest(on_ranks(time_starts, size, num_rounds))
        more = difference(taken["ours"], taken["torch"])
        noise = [abs(s) for s in difference(taken["torch again"], taken["torch"])]
        middle = quantile(more, 0.5)
        found.append(
            Row(
                f"init_distributed, {size} ranks, by the variables of SLURM",
                "ms",
                1e3 * quantile(taken["ours"], 0.5),
                1e3 * quantile(taken["torch"], 0.5),
                (1e3 * middle, 1e3 * quantile(more, 0.2), 1e3 * quantile(more, 0.8)),
                "ours - torch, ms",
                f"<= {1e3 * GOAL_S:g} ms more",
                middle <= GOAL_S,
                f"{size} ranks on {os.cpu_count()} cores, until the last one has its group; two "
                f"series of torch's differ by {1e3 * quantile(noise, 0.5):.0f} ms (median of the "
                "rounds)",
            )
        )
    return found


def difference(some: list[float], others: list[float]) -> list[float]:
    """Round by round."""
    return [one - other for one, other in zip(some, others, strict=True)]


def time_starts(rank: int, size: int, num_rounds: int) -> dict[str, list[float]]:
    def ours(port: int) -> None:
        by_slurm(rank, size, port)
        init_distributed("gloo")

    def theirs(port: int) -> None:
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)

    ways = {"torch": theirs, "ours": ours, "torch again": theirs}
    return in_turns({name: partial(timed, way) for name, way in ways.items()}, num_rounds)


def timed(start: Callable[[int], None]) -> float:
    """Seconds for another group in place of the one that there is."""
    told = [free_port()]
    dist.broadcast_object_list(told)
    dist.barrier()
    dist.destroy_process_group()
    started = time.perf_counter()
    start(told[0])
    return time.perf_counter() - started


def by_slurm(rank: int, size: int, port: int) -> None:
    variables = {
        "SLURM_JOB_ID": 1,
        "SLURM_STEP_ID": 0,
        "SLURM_PROCID": rank,
        "SLURM_LOCALID": rank,
        "SLURM_NODEID": 0,
        "SLURM_NTASKS": size,
        "SLURM_NNODES": 1,
        "SLURM_STEP_TASKS_PER_NODE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in variables.items()})


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
