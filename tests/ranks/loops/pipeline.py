"""A pipeline by hand: the last of the ranks sees the loss, those in the middle never do."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.ranks.loops.trace import Trace

__all__ = ["train"]


def train(
    scaler_class: type,
    stage: nn.Module,
    batches: Iterator[Tensor],
    num_steps: int,
    scales_nothing: bool = False,
) -> Trace:
    """One stage a rank, all of one width.

    Args:
        scaler_class: See the package.
        stage: This rank's.
        batches: Read by the first stage; the others take from them the shape alone.
        num_steps: How many.
        scales_nothing: Whether ranks without a loss scale a zero, which is what wakes torch's
            scaler.
    """
    trace = Trace()
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    optimizer = torch.optim.SGD(stage.parameters(), lr=2.0**-6, momentum=0.5)
    scaler = scaler_class("cpu", init_scale=8.0, growth_interval=2)
    for _ in range(num_steps):
        optimizer.zero_grad()
        received = next(batches)
        if rank > 0:
            dist.recv(received, rank - 1)
            received.requires_grad_()
        output = stage(received)
        loss = None
        if rank == last:
            loss = output.square().mean()
            scaler.scale(loss).backward()
        else:
            dist.send(output.detach(), rank + 1)
            grad = torch.empty_like(output)
            dist.recv(grad, rank + 1)
            output.backward(grad)
            if scales_nothing:
                scaler.scale(torch.zeros(()))
        if rank > 0:
            dist.send(received.grad, rank - 1)
        scaler.step(optimizer)
        scaler.update()
        trace.note(loss, scaler.get_scale(), stage.parameters())
    return trace
