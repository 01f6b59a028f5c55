"""Parameters with gradients, and optimizers that do nothing, so that the scaler is what is seen."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement

from shardscale import ShardedGradScaler

__all__ = ["FusedNoStep", "NoStep", "iteration", "plain", "sharded"]


class NoStep(torch.optim.Optimizer):
    """Steps by doing nothing."""

    def __init__(self, params: list[Tensor]) -> None:
        super().__init__(params, {})

    def step(self, closure: None = None) -> None:
        """Nothing."""


class FusedNoStep(NoStep):
    """The same, of the kind that reads the flag and the scale itself."""

    _step_supports_amp_scaling = True


def plain(num: int, numel: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """``num`` parameters of ``numel`` ones, with gradients of ones."""
    params = [torch.nn.Parameter(torch.ones(numel, dtype=dtype)) for _ in range(num)]
    for p in params:
        p.grad = torch.ones_like(p)
    return params


def sharded(
    num: int,
    numel: int,
    mesh: DeviceMesh,
    placements: list[Placement],
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """The same as DTensors, ``numel`` elements on each rank, laid out as FSDP2 does."""
    params = []
    for _ in range(num):
        local = torch.ones(numel, dtype=dtype)
        p = torch.nn.Parameter(DTensor.from_local(local, mesh, placements, run_check=False))
        # FSDP2 gives a gradient its parameter's very layout, not an equal one.
        p.grad = DTensor(local.clone(), p._spec, requires_grad=False)
        params.append(p)
    return params


def iteration(
    scaler: Any, optimizer: Any, max_norm: float | None = None, only_unscale: bool = False
) -> Callable[[], float]:
    """A function that makes one iteration and returns the seconds of its calls.

    Args:
        scaler: torch's or ours; its scale must be 1, so that gradients stay what they are.
        optimizer: What is stepped.
        max_norm: Clip, too: ours in one call, torch's by ``torch.nn.utils.clip_grad_norm_`` after
            ``unscale_``. The gradients are ones again before the clock starts.
        only_unscale: Count what comes before ``step`` alone; ``step`` and ``update`` are made, but
            not timed.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    grads = [getattr(p.grad, "_local_tensor", p.grad) for p in params]
    scaler.scale(torch.ones(()))

    def unscale() -> None:
        if max_norm is None:
            scaler.unscale_(optimizer)
        elif isinstance(scaler, ShardedGradScaler):
            scaler.clip_grad_norm_(optimizer, max_norm)
        else:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(params, max_norm)

    def run() -> float:
        if max_norm is not None:
            torch._foreach_zero_(grads)
            torch._foreach_add_(grads, 1.0)
        if dist.is_initialized():
            dist.barrier()
        started = time.perf_counter()
        unscale()
        unscaled = time.perf_counter()
        scaler.step(optimizer)
        scaler.update()
        return (unscaled if only_unscale else time.perf_counter()) - started

    return run
