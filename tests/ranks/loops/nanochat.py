"""nanochat's shape: optimizers that average gradients themselves, and flags made equal by hand."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.ranks.loops.trace import Trace

__all__ = ["train"]

ACCUMULATION = 2


class _Spread(torch.optim.Optimizer):
    """Averages each gradient over the ranks; one rank updates the parameter and sends it on."""

    @torch.no_grad()
    def step(self) -> None:
        rank, size = dist.get_rank(), dist.get_world_size()
        for group in self.param_groups:
            for i, p in enumerate(group["params"]):
                dist.all_reduce(p.grad)
                p.grad.div_(size)
                if i % size == rank:
                    self.move_(p, group)
                dist.broadcast(p.data, i % size)

    def move_(self, p: Tensor, group: dict) -> None:
        raise NotImplementedError


class Muon(_Spread):
    """For matrices: a step along the momentum, its singular values brought near one."""

    def __init__(self, params, lr: float) -> None:
        super().__init__(params, {"lr": lr, "initial_lr": lr, "momentum": 0.5})

    def move_(self, p: Tensor, group: dict) -> None:
        state = self.state[p]
        momentum = state.setdefault("momentum", torch.zeros_like(p))
        momentum.mul_(group["momentum"]).add_(p.grad)
        direction = momentum / (momentum.norm() + 1e-7)
        for _ in range(5):  # Newton and Schulz's iteration for the nearest orthogonal matrix
            direction = 1.5 * direction - 0.5 * direction @ direction.T @ direction
        p.sub_(direction, alpha=group["lr"])


class AdamW(_Spread):
    """For all else; each rank has the state of its own parameters only."""

    def __init__(self, params, lr: float) -> None:
        super().__init__(params, {"lr": lr, "initial_lr": lr, "decay": 2.0**-7})

    def move_(self, p: Tensor, group: dict) -> None:
        state = self.state[p]
        mean = state.setdefault("mean", torch.zeros_like(p))
        square = state.setdefault("square", torch.zeros_like(p))
        num = state["num"] = state.get("num", 0) + 1
        mean.lerp_(p.grad, 0.25)
        square.lerp_(p.grad.square(), 0.125)
        p.mul_(1 - group["lr"] * group["decay"])
        denominator = (square / (1 - 0.875**num)).sqrt_().add_(1e-8)
        p.addcdiv_(mean / (1 - 0.75**num), denominator, value=-group["lr"])


def train(
    scaler_class: type,
    model: nn.Module,
    batches: Iterator[Tensor],
    num_steps: int,
    reduces_flags: bool = True,
) -> Trace:
    """``reduces_flags``: whether the loop makes the flags equal itself, as it must with torch."""
    trace = Trace()
    optimizers = [
        Muon([p for p in model.parameters() if p.ndim == 2], lr=2.0**-4),
        AdamW([p for p in model.parameters() if p.ndim != 2], lr=2.0**-6),
    ]
    scaler = scaler_class("cpu", init_scale=8.0, growth_interval=2)
    x = next(batches)
    for step in range(num_steps):
        for _ in range(ACCUMULATION):
            loss = model(x).square().mean() / ACCUMULATION
            train_loss = loss.detach()
            scaler.scale(loss).backward()
            x = next(batches)  # while an accelerator would still be at work
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * (1 - step / num_steps)
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
            if reduces_flags:
                for flag in scaler._found_inf_per_device(optimizer).values():
                    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        # Each rank clips its own share: the optimizers have averaged nothing so far.
        torch.nn.utils.clip_grad_norm_(model.parameters(), 4.0)
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        model.zero_grad(set_to_none=True)
        trace.note(train_loss, scaler.get_scale(), model.parameters())
    return trace
