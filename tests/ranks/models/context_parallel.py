"""Context parallelism: a sequence is split over ranks, and attention gathers keys and values.

By hand, because ``torch.distributed.tensor.experimental.context_parallel`` knows no attention of
the CPU.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_gather_tensor_autograd
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.ranks.models.laid import Laid, full

__all__ = ["Attention", "lay_out", "reference_grads"]


class Attention(nn.Module):
    """Causal attention of one head, whole or over a part of the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(5, 15)
        self.out = nn.Linear(5, 3)
        self.group: dist.ProcessGroup | None = None
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, dim=1)
        first = 0
        if self.group is not None:
            first = self.group.rank() * len(x)
            key, value = (all_gather_tensor_autograd(t, 0, self.group) for t in (key, value))
        is_later = torch.ones(len(x), len(key), dtype=torch.bool).triu(first + 1)
        scores = (query @ key.T).masked_fill(is_later, -torch.inf)
        return self.out(scores.softmax(1) @ value)


def _sequence(index: int, step: int) -> Tensor:
    """(8, 5), different for each index and step."""
    generator = torch.Generator().manual_seed(100 * step + index)
    return torch.randn(8, 5, generator=generator)


def reference_grads(model: Attention, num_batches: int, step: int) -> dict[str, Tensor]:
    """Gradients of one process that sees all sequences in full; left in ``model``."""
    model.zero_grad()
    for index in range(num_batches):
        model(_sequence(index, step)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def lay_out(size: int) -> Laid:
    """Two ranks a sequence; FSDP2 shards the parameters over both axes of the mesh as one."""
    model = Attention()
    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "cp"))
    model.group = mesh["cp"].get_group()
    fully_shard(model, mesh=mesh._flatten("dp_cp"))

    def backward(scaler, step: int) -> None:
        x = _sequence(dist.get_rank() // 2, step).chunk(2)[model.group.rank()]
        scaler.scale(model(x).sum() * size).backward()  # averaged over all ranks

    return Laid(model, backward, lambda: full(model), size // 2)
