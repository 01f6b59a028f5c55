"""Run a function on several ranks of a Gloo group on this machine, one thread each."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

__all__ = ["on_ranks", "slowest"]

Name = TypeVar("Name")

# What takes long to import is imported once, by the server that every rank is forked from: 32 ranks
# that each do it themselves keep two cores busy for a minute.
mp.set_forkserver_preload(
    [
        "shardscale",
        "torch.distributed.fsdp.sharded_grad_scaler",
        "torch.distributed.tensor.parallel",
        "torch.profiler",
    ]
)


def on_ranks(fn: Callable[..., Any], size: int, *args: Any) -> list[Any]:
    """``fn(rank, size, *args)`` on ``size`` new processes; what each returned, in rank order."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _be_rank, (size, folder, fn, args), nprocs=size, start_method="forkserver"
        )
        return [torch.load(Path(folder) / str(rank), weights_only=False) for rank in range(size)]


def slowest(per_rank: list[dict[Name, list[float]]]) -> dict[Name, list[float]]:
    """By name and round, the time of the rank that took longest: the job goes at its pace."""
    return {
        name: [max(times) for times in zip(*(taken[name] for taken in per_rank), strict=True)]
        for name in per_rank[0]
    }


def _be_rank(
    rank: int, size: int, folder: str, fn: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # torch's advice on the collectives of its own clipping
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size
    )
    torch.save(fn(rank, size, *args), Path(folder) / str(rank))
    dist.barrier()
    dist.destroy_process_group()
