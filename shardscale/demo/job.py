"""What one rank of the demo does: join the others, train, compare notes with them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

import shardscale
from shardscale.demo.data import Digits
from shardscale.demo.options import JobOptions
from shardscale.demo.results import JobResult, Tick
from shardscale.demo.training import Training

__all__ = ["TIMEOUT_S", "device_type_for", "joined_group", "train"]

TIMEOUT_S = 60


def device_type_for(ranks: int) -> str:
    """Return "cuda" where each of this machine's ranks gets a GPU of its own, else "cpu".

    A machine with one GPU trains on its CPU: one rank has nobody to agree with.
    """
    return "cuda" if torch.cuda.device_count() >= max(2, ranks) else "cpu"


@contextmanager
def joined_group() -> Iterator[tuple[shardscale.RankEnv, torch.device]]:
    """Join the process group that the launcher's environment describes; leave it at the end.

    Yields who this rank is, and the device on which it computes.

    Collective: every rank of the job must enter.
    """
    env = shardscale.init_distributed()
    _set_pg_timeout(timedelta(seconds=TIMEOUT_S))  # no public name for it (torch 2.13)
    if device_type_for(env.local_world_size) == "cuda":
        device = torch.device("cuda", env.local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        # The ranks share the cores; one thread each keeps them out of each other's way.
        torch.set_num_threads(1)
    yield env, device
    gc.collect()  # what FSDP leaves behind can abort Python when it ends (torch 2.13)
    # Not after an error: closing the connections then would make the others
    # fail as well, and one of them could be the first to be noticed and blamed.
    dist.destroy_process_group()


def train(options: JobOptions, digits: Digits, on_tick: Callable[[Tick], None]) -> JobResult:
    """Train this rank's part of the model and gather what every rank ended with.

    Args:
        options: The job, the same on every rank.
        digits: The data, the same on every rank, on the device where this rank computes.
        on_tick: Called after every step, on rank 0 only.

    Collective: every rank of the job must call.
    """
    training = Training(options, digits)
    while training.num_done < options.steps:
        tick = training.step()
        if dist.get_rank() == 0:
            on_tick(tick)
    return training.result()
