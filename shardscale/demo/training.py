"""One rank's share of a job of the demo, one step after the other."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy

from shardscale import Communicator
from shardscale.demo.data import Digits, test_set, training_batches
from shardscale.demo.model import DigitsNet
from shardscale.demo.optimizers import OPTIMIZERS
from shardscale.demo.options import JobOptions
from shardscale.demo.overflow import overflow_
from shardscale.demo.results import JobResult, RankRow, Tick
from shardscale.demo.scalers import make_scaler
from shardscale.demo.witness import StepWitness
from shardscale.demo.wrap import WRAPS

__all__ = ["Training"]


class Training:
    """Model, optimizer and scaler of one rank, and how far it has come with them.

    Args:
        options: The job, the same on every rank.
        digits: The data, the same on every rank, on the device where this rank computes.
        comm: What shardscale's scaler agrees over; None for the process group.

    Collective: every rank of the job must construct it and make the same calls.
    """

    def __init__(
        self, options: JobOptions, digits: Digits, comm: Communicator | None = None
    ) -> None:
        self._started = time.perf_counter()
        self._options = options
        self._digits = digits
        self._device = digits.images.device
        self._rank = dist.get_rank()
        torch.manual_seed(0)
        self.model = WRAPS[options.wrap](DigitsNet(), self._device)
        self.optimizer = OPTIMIZERS[options.optimizer](self.model.parameters())
        self.scaler = make_scaler(options.scaler, options.wrap, self._device.type, comm)
        self.num_done = 0
        self._batches = training_batches(digits, self._rank, options.ranks)
        self._ticks: list[Tick] = []
        self._overflowed: str | None = None
        self.witness = StepWitness(self.model)

    @property
    def parts(self) -> tuple[nn.Module, torch.optim.Optimizer, torch.amp.GradScaler]:
        """What a checkpoint holds."""
        return self.model, self.optimizer, self.scaler

    def go_on_after(self, num_done: int) -> None:
        """Take over from a job that made so many steps, its checkpoint having been loaded."""
        for _ in range(num_done):
            next(self._batches)
        self.num_done = num_done
        self.witness = StepWitness(self.model)

    def step(self) -> Tick:
        """Make one step and return what came of it, as this rank sees it."""
        self.num_done += 1
        images, labels = next(self._batches)
        with torch.autocast(self._device.type, dtype=torch.float16):
            loss = cross_entropy(self.model(images), labels)
        self.scaler.scale(loss).backward()
        if self._options.inject:
            touched = overflow_(self.model, self._options.inject, self._rank, self.num_done)
            self._overflowed = touched or self._overflowed
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

        self.witness.observe()
        tick = Tick(self.num_done, loss.item(), self.scaler.get_scale(), self.witness.skipped)
        self._ticks.append(tick)
        return tick

    def result(self) -> JobResult:
        """Gather what every rank ended with."""
        row = RankRow(
            rank=self._rank,
            scale=self.scaler.get_scale(),
            applied=self.witness.applied,
            skipped=self.witness.skipped,
            digest=self.witness.digest(),
            accuracy=_accuracy(self.model, self._digits),
        )
        mine = (row, self._ticks, self._overflowed)
        told: list[tuple[RankRow, list[Tick], str | None]] = [mine] * self._options.ranks
        dist.all_gather_object(told, mine)
        return JobResult(
            rows=tuple(row for row, _, _ in told),
            ticks=tuple(told[0][1]),
            overflowed=next((name for _, _, name in told if name), None),
            device=self._device.type,
            seconds=time.perf_counter() - self._started,
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
