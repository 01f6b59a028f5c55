"""A small network of whole numbers, and what one process makes of it.

Weights, data and learning rates are whole numbers or powers of two, small enough that every sum and
product is exact in float32. So it does not matter in which order ranks add up gradients, and a
sharded run can be compared with one process holding the whole model bit for bit. The whole job's
loss is the sum over its batches.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Affine", "batch", "make_net", "reference_grads"]


class Affine(nn.Module):
    """``x * weight + bias``: what a norm layer does, without the rounding of its division."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


def make_net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """5 -> 7 -> 3 between two affine layers: sizes that no number of ranks divides.

    The same on every rank. With sequence parallelism the affine layers are where the norms of a
    transformer block are; as a pipeline it has up to four stages with parameters.
    """
    generator = torch.Generator().manual_seed(7)
    net = nn.Sequential(Affine(5), nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3), Affine(3))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randint(-1, 2, p.shape, generator=generator))
    return net.to(dtype)


def batch(index: int, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(4, 5) whole numbers in -2..2, different for each index and step."""
    generator = torch.Generator().manual_seed(100 * step + index)
    return torch.randint(-2, 3, (4, 5), generator=generator).to(dtype)


def reference_grads(net: nn.Module, num_batches: int, *steps: int) -> dict[str, Tensor]:
    """Gradients of one process that holds the whole model and sees all batches; left in ``net``."""
    net.zero_grad()
    for step in steps:
        for index in range(num_batches):
            net(batch(index, step)).sum().backward()
    return {name: p.grad.clone() for name, p in net.named_parameters()}
