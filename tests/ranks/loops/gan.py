"""A GAN's shape: one scaler for two optimizers, two steps of the discriminator for one of the other.

Each step has its own backward pass and its own update.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tests.ranks.loops.trace import Trace

__all__ = ["train"]

STEPS_OF_DISCRIMINATOR = 2


def train(
    scaler_class: type,
    discriminator: nn.Module,
    generator: nn.Module,
    batches: Iterator[Tensor],
    num_steps: int,
) -> Trace:
    """The generator's backward pass leaves gradients in the discriminator, zeroed before its next."""
    trace = Trace()
    scaler = scaler_class("cpu", init_scale=8.0, growth_interval=2)
    optimizers = {
        net: torch.optim.SGD(net.parameters(), lr=2.0**-8, momentum=0.5)
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
            real = next(batches)
            optimizers[discriminator].zero_grad()
            fake = generator(real.flip(0)).detach()
            pair = torch.cat([fake, real[:, : fake.shape[1]]])
            judged = discriminator(pair).mean(dim=1)
            step(discriminator, judged[:4].square().mean() - judged[4:].abs().mean())
        optimizers[generator].zero_grad()
        judged = discriminator(generator(next(batches)))
        step(generator, -judged.mean())
    return trace
