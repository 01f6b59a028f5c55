"""Ray Train's shape: an optimizer's step is followed by an update of the scale.

Here with two networks, both losses of which are backward before the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from tests.ranks.loops.trace import Trace

__all__ = ["train"]


class WrappedOptimizer(torch.optim.Optimizer):
    """A step is a step of the scaler and an update of its scale."""

    def __init__(self, optimizer: torch.optim.Optimizer, scaler) -> None:
        self.optimizer, self.scaler = optimizer, scaler

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def step(self, closure: Callable[[], object] | None = None) -> None:
        self.scaler.step(self.optimizer, closure)
        self.scaler.update()


def train(
    scaler_class: type,
    actor: nn.Module,
    critic: nn.Module,
    batches: Iterator[Tensor],
    num_steps: int,
    growth_interval: int,
    make_optimizer: Callable[..., torch.optim.Optimizer],
) -> Trace:
    """The critic's step comes after the actor's update; its gradients were made before it."""
    trace = Trace()
    scaler = scaler_class("cpu", init_scale=8.0, growth_interval=growth_interval)
    optimizers = [
        WrappedOptimizer(make_optimizer(net.parameters()), scaler) for net in (actor, critic)
    ]
    for _ in range(num_steps):
        x = next(batches)
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses = actor(x).square().mean(), critic(x).abs().mean()
        for loss in losses:
            scaler.scale(loss).backward()
        for optimizer in optimizers:
            optimizer.step()
        params = [*actor.parameters(), *critic.parameters()]
        trace.note(torch.stack(losses).sum(), scaler.get_scale(), params)
    return trace
