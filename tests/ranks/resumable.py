"""A small job each of whose steps follows from its number alone, to be broken off and resumed."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from shardscale import DynamicScale, ShardedGradScaler
from tests.cluster.logs import digest

__all__ = ["BAD", "Job"]

BAD = (2, 5, 6, 10)
"""Steps with an Inf on one rank. With hysteresis 2 the scale backs off at step 6 only if the bad
step 5 is remembered; with growth after two good steps it grows at step 8 only if the good step 7
is."""


class Job:
    """An FSDP2 model where there is a process group, its optimizer and its scaler."""

    def __init__(self, fused: bool = False):
        torch.manual_seed(0)
        layers = torch.nn.Linear(3, 7), torch.nn.Tanh(), torch.nn.Linear(7, 5)
        self.model = torch.nn.Sequential(*layers)
        self.rank, self.size = 0, 1
        if dist.is_initialized():
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            fully_shard(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1, fused=fused)
        policy = DynamicScale(growth_interval=2, hysteresis=2)
        self.scaler = ShardedGradScaler("cpu", init_scale=64.0, policy=policy)

    def train(self, first: int, last: int) -> list[tuple[dict, str]]:
        """After each step, the scaler's state and the bits of this rank's parameters."""
        return [self.step(step) for step in range(first, last)]

    def step(self, step: int) -> tuple[dict, str]:
        self.backward(step)
        return self.judge_and_step()

    def backward(self, step: int) -> None:
        inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(100 * step + self.rank))
        self.optimizer.zero_grad()
        self.scaler.scale(self.model(inputs).square().mean()).backward()
        if step in BAD and self.rank == step % self.size:
            grad = self.model[2].bias.grad
            getattr(grad, "_local_tensor", grad).fill_(float("inf"))

    def judge_and_step(self) -> tuple[dict, str]:
        self.scaler.clip_grad_norm_(self.optimizer, 0.05)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return self.scaler.state_dict(), digest(self.model.parameters())

    def whole(self) -> str:
        """The bits of all parameters and moments, as one process would hold them."""
        held = [self.optimizer.state[p] for p in self.model.parameters()]
        tensors = [*self.model.parameters(), *(m[key] for m in held for key in sorted(m))]
        return digest(t.full_tensor() if hasattr(t, "full_tensor") else t for t in tensors)
