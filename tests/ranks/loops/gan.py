"""A GAN's shape: one scaler, two steps of the discriminator for each of the generator.

Each step has its own backward pass and its own update.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tests.ranks.loops.trace import Trace

__all__ = ["loss_of_discriminator", "loss_of_generator", "train"]

STEPS_OF_DISCRIMINATOR = 2


def loss_of_discriminator(discriminator: nn.Module, generator: nn.Module, real: Tensor) -> Tensor:
    """Low where it tells the first features of ``real``, (4, 5), from what is generated."""
    fake = generator(real.flip(0)).detach()
    judged = discriminator(torch.cat([fake, real[:, : fake.shape[1]]])).mean(dim=1)
    return judged[:4].square().mean() - judged[4:].abs().mean()


def loss_of_generator(discriminator: nn.Module, generator: nn.Module, noise: Tensor) -> Tensor:
    """Its backward pass leaves gradients in the discriminator, too."""
    return -discriminator(generator(noise)).mean()


def train(
    scaler_class: type,
    discriminator: nn.Module,
    generator: nn.Module,
    batches: Iterator[Tensor],
    num_steps: int,
) -> Trace:
    """What the generator's turn leaves in the discriminator is zeroed before its next."""
    trace = Trace()
    scaler = scaler_class("cpu", init_scale=8.0, growth_interval=2)
    optimizers = {
        net: torch.optim.SGD(net.parameters(), lr=2.0**-12, momentum=0.5)
        for net in (discriminator, generator)
    }
    params = [*discriminator.parameters(), *generator.parameters()]

    def step(net: nn.Module, loss: Tensor) -> None:
        scaler.scale(loss).backward()
        scaler.step(optimizers[net])
        scaler.update()
        trace.note(loss, scaler.get_scale(), params)

    for _ in range(num_steps):
        for _ in range(STEPS_OF_DISCRIMINATOR):
            optimizers[discriminator].zero_grad()
            step(discriminator, loss_of_discriminator(discriminator, generator, next(batches)))
        optimizers[generator].zero_grad()
        step(generator, loss_of_generator(discriminator, generator, next(batches)))
    return trace
