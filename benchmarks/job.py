"""Run a function on several ranks of a Gloo group on this machine, one thread each."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

__all__ = ["on_ranks", "slowest"]


def on_ranks(fn: Callable[..., Any], size: int, *args: Any) -> list[Any]:
    """``fn(rank, size, *args)`` on ``size`` new processes; what each returned, in rank order."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_be_rank, (size, folder, fn, args), nprocs=size)
        return [torch.load(Path(folder) / str(rank), weights_only=False) for rank in range(size)]


def slowest(per_rank: list[dict[str, list[float]]]) -> dict[str, list[float]]:
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
