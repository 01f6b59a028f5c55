"""What one rank of the demo does: train, keep count, compare notes with the other ranks."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy

from shardscale.demo.data import Digits, test_set, training_batches
from shardscale.demo.model import DigitsNet
from shardscale.demo.optimizers import OPTIMIZERS
from shardscale.demo.options import JobOptions
from shardscale.demo.overflow import overflow_
from shardscale.demo.results import JobResult, RankRow, Tick
from shardscale.demo.scalers import make_scaler
from shardscale.demo.witness import StepWitness
from shardscale.demo.wrap import WRAPS

__all__ = ["TIMEOUT_S", "device_type_for", "joined_group", "train"]

TIMEOUT_S = 60


def device_type_for(ranks: int) -> str:
    """Return "cuda" where each of this machine's ranks gets a GPU of its own, else "cpu".

    A machine with one GPU trains on its CPU: one rank has nobody to agree with.
    """
    return "cuda" if torch.cuda.device_count() >= max(2, ranks) else "cpu"


@contextmanager
def joined_group(device_type: str) -> Iterator[torch.device]:
    """Join the process group the launcher's environment describes, and leave it at the end.

    Collective: every rank of the job must enter.
    """
    if device_type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        # The ranks share the cores; one thread each keeps them out of each other's way.
        torch.set_num_threads(1)
    backend = "nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=TIMEOUT_S))
    yield device
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
    started = time.perf_counter()
    rank, device = dist.get_rank(), digits.images.device
    torch.manual_seed(0)
    model = WRAPS[options.wrap](DigitsNet(), device)
    optimizer = OPTIMIZERS[options.optimizer](model.parameters())
    scaler = make_scaler(options.scaler, options.wrap, device.type)
    batches = training_batches(digits, rank, options.ranks)
    witness = StepWitness(model)
    ticks: list[Tick] = []
    overflowed: str | None = None

    for step in range(1, options.steps + 1):
        images, labels = next(batches)
        with torch.autocast(device.type, dtype=torch.float16):
            loss = cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        if options.inject:
            overflowed = overflow_(model, options.inject, rank, step) or overflowed
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        witness.observe()
        if rank == 0:
            ticks.append(Tick(step, loss.item(), scaler.get_scale(), witness.skipped))
            on_tick(ticks[-1])

    row = RankRow(
        rank=rank,
        scale=scaler.get_scale(),
        applied=witness.applied,
        skipped=witness.skipped,
        digest=witness.digest(),
        accuracy=_accuracy(model, digits),
    )
    told: list[tuple[RankRow, list[Tick], str | None]] = [(row, ticks, overflowed)] * options.ranks
    dist.all_gather_object(told, (row, ticks, overflowed))
    return JobResult(
        rows=tuple(row for row, _, _ in told),
        ticks=tuple(told[0][1]),
        overflowed=next((name for _, _, name in told if name), None),
        device=device.type,
        seconds=time.perf_counter() - started,
    )


def _accuracy(model: nn.Module, digits: Digits) -> float:
    """Return the share of the test images that this rank's model gets right.

    Collective: every rank must call, because FSDP gathers the layers.
    """
    images, labels = test_set(digits)
    model.eval()
    with torch.no_grad(), torch.autocast(images.device.type, dtype=torch.float16):
        hits = model(images).argmax(1) == labels
    return float(hits.float().mean())
