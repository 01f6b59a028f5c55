"""Accelerate's shape: wrapped optimizers, each of which steps and then updates the scale itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from tests.ranks.loops.gan import loss_of_discriminator, loss_of_generator
from tests.ranks.loops.trace import Trace

__all__ = ["train", "train_in_turns"]

ACCUMULATION = 2
MAX_NORM = 2.0


class AcceleratedOptimizer(torch.optim.Optimizer):
    """Steps through the scaler; looks on whether its optimizer was called to learn of a skip."""

    def __init__(self, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> None:
        self.optimizer = optimizer
        self._accelerator = accelerator
        self._was_called = False
        self.step_was_skipped = False

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self._accelerator.sync_gradients:
            self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        if not self._accelerator.sync_gradients:
            return
        scaler, original = self._accelerator.scaler, self.optimizer.step

        def noting(*args: Any, **kwargs: Any) -> Any:
            self._was_called = True
            return original(*args, **kwargs)

        self.optimizer.step = noting
        scaler.step(self.optimizer, closure)
        scaler.update()
        self.optimizer.step = original
        self.step_was_skipped = not self._was_called
        self._was_called = False


class Accelerator:
    """What stands between a loop and the scaler."""

    def __init__(self, scaler_class: type, accumulation: int) -> None:
        self.scaler = scaler_class("cpu", init_scale=8.0, growth_interval=4)
        self.sync_gradients = True
        self._accumulation = accumulation
        self._num_batches = 0
        self._optimizers: list[AcceleratedOptimizer] = []

    def prepare(self, optimizer: torch.optim.Optimizer) -> AcceleratedOptimizer:
        self._optimizers.append(AcceleratedOptimizer(optimizer, self))
        return self._optimizers[-1]

    @contextlib.contextmanager
    def accumulate(self, model: nn.Module) -> Iterator[None]:
        self._num_batches += 1
        self.sync_gradients = self._num_batches % self._accumulation == 0
        context = contextlib.nullcontext()
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(self.sync_gradients)
        elif not self.sync_gradients:
            context = model.no_sync()
        with context:
            yield

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss / self._accumulation).backward()

    def unscale_gradients(self) -> None:
        for prepared in self._optimizers:
            optimizer: Any = prepared
            while isinstance(optimizer, AcceleratedOptimizer):
                optimizer = optimizer.optimizer
            self.scaler.unscale_(optimizer)

    def clip_grad_norm_(self, model: nn.Module) -> None:
        self.unscale_gradients()  # of all optimizers, whatever is to be clipped
        if isinstance(model, FullyShardedDataParallel):
            model.clip_grad_norm_(MAX_NORM)
        else:
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)

    @property
    def optimizer_step_was_skipped(self) -> bool:
        return any(optimizer.step_was_skipped for optimizer in self._optimizers)


def train(
    scaler_class: type,
    model: nn.Module,
    batches: Iterator[Tensor],
    num_steps: int,
    optimizers: list[torch.optim.Optimizer],
    clips: bool,
) -> Trace:
    """An example script's loop: all it knows of the scaler is whether a step was skipped."""
    trace = Trace()
    accelerator = Accelerator(scaler_class, ACCUMULATION)
    optimizers = [accelerator.prepare(optimizer) for optimizer in optimizers]
    for _ in range(num_steps * ACCUMULATION):
        with accelerator.accumulate(model):
            loss = model(next(batches)).square().mean()
            accelerator.backward(loss)
            if clips and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model)
            for optimizer in optimizers:
                optimizer.step()
            for optimizer in optimizers:
                optimizer.zero_grad()
        if accelerator.sync_gradients:
            trace.skipped.append(accelerator.optimizer_step_was_skipped)
            trace.note(loss, accelerator.scaler.get_scale(), model.parameters())
    return trace


def train_in_turns(
    scaler_class: type,
    discriminator: nn.Module,
    generator: nn.Module,
    batches: Iterator[Tensor],
    num_steps: int,
) -> Trace:
    """A GAN: to clip one network unscales both optimizers, of which only that one then steps."""
    trace = Trace()
    accelerator = Accelerator(scaler_class, accumulation=1)
    turns = [
        (net, accelerator.prepare(torch.optim.SGD(net.parameters(), lr=2.0**-8)), loss_of)
        for net, loss_of in (
            (generator, loss_of_generator),
            (discriminator, loss_of_discriminator),
        )
    ]
    for _ in range(num_steps):
        for net, optimizer, loss_of in turns:
            loss = loss_of(discriminator, generator, next(batches))
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(net)
            optimizer.step()
            for _, each, _ in turns:
                each.zero_grad()
            trace.skipped.append(accelerator.optimizer_step_was_skipped)
            params = [*discriminator.parameters(), *generator.parameters()]
            trace.note(loss, accelerator.scaler.get_scale(), params)
    return trace
