"""torchtitan's shape: containers of optimizers and schedulers over model parts, and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from tests.ranks.loops.trace import Trace

__all__ = ["train"]

MAX_NORM = 2.0


class OptimizersContainer(Optimizer):
    """One optimizer for each part of the model, in the guise of a single one."""

    def __init__(self, parts: list[nn.Module], make: Callable[..., Optimizer]) -> None:
        self.optimizers = [make(part.parameters()) for part in parts]
        super().__init__([p for part in parts for p in part.parameters()], {})

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)


class LRSchedulersContainer:
    """The same schedule for each of a container's optimizers."""

    def __init__(self, optimizers: OptimizersContainer) -> None:
        self.schedulers = [LambdaLR(o, lambda step: 1 / (1 + step)) for o in optimizers.optimizers]

    def step(self) -> None:
        for scheduler in self.schedulers:
            scheduler.step()


def clip_grad_norm_(params: Iterable[Tensor]) -> Tensor:
    """The norm of the whole model, also where torch gives a part of it as a DTensor."""
    params = list(params)
    norm = get_total_norm([p.grad for p in params if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    clip_grads_with_norm_(params, MAX_NORM, norm)
    return norm


def train(
    scaler_class: type,
    parts: list[nn.Module],
    batches: Iterator[Tensor],
    num_steps: int,
    make_optimizer: Callable[..., Optimizer],
    clips: bool = True,
) -> Trace:
    """Half way it stores the scaler's state and goes on with a new scaler that loads it."""
    trace = Trace()
    optimizers = OptimizersContainer(parts, make_optimizer)
    lr_schedulers = LRSchedulersContainer(optimizers)
    scaler = scaler_class("cpu", init_scale=8.0, growth_interval=2)
    for step in range(num_steps):
        if step == num_steps // 2:
            checkpoint = {"scaler": scaler.state_dict()}
            scaler = scaler_class("cpu", init_scale=1.0, growth_interval=1000)
            scaler.load_state_dict(checkpoint["scaler"])
        optimizers.zero_grad()
        output = next(batches)
        for part in parts:
            output = part(output)
        loss = output.square().mean()
        scaler.scale(loss).backward()
        if clips:
            scaler.unscale_(optimizers)
            clip_grad_norm_(p for part in parts for p in part.parameters())
        scaler.step(optimizers)
        scaler.update()
        lr_schedulers.step()
        trace.note(loss, scaler.get_scale(), [p for part in parts for p in part.parameters()])
    return trace
