"""Many small gradients on two ranks: what torch spends on each of them, and what ours does."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from job import on_ranks, slowest
from parameters import NoStep, iteration, plain, sharded
from side_by_side import Row, compare, in_turns
from torch import nn
from torch.amp import GradScaler
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler as TorchShardedGradScaler
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

from shardscale import ShardedGradScaler

__all__ = ["rows"]

NUMEL = 64
CLIPPING = {"not active": math.inf, "active": 1e-3}
SCALERS = {
    "ours": ShardedGradScaler,
    "torch": GradScaler,
    "torch's ShardedGradScaler": TorchShardedGradScaler,
}
LOCAL = (
    "torch.amp.GradScaler sends nothing: it trusts DDP to have left the same gradients everywhere"
)


def rows(num_rounds: int) -> list[Row]:
    """200 FSDP2 shards, and whole iterations of 400 plain parameters, each with clipping, too."""
    fsdp2 = slowest(on_ranks(unscale_fsdp2, 2, num_rounds))
    plain = slowest(on_ranks(iterate_plain, 2, num_rounds))
    ddp = slowest(on_ranks(iterate_ddp, 2, num_rounds))
    sharded_scaler = "torch's ShardedGradScaler"
    found = [
        compare(
            "unscale_ of 200 FSDP2 shards, 2 ranks, against torch.amp.GradScaler",
            fsdp2["ours", "unscale_"],
            fsdp2["torch", "unscale_"],
            8,
        ),
        *(
            compare(
                f"unscale_ + clip_grad_norm_ of the same, {action}, against its unscale_ + "
                "torch.nn.utils.clip_grad_norm_",
                fsdp2["ours", action],
                fsdp2["torch", action],
            )
            for action in CLIPPING
        ),
        compare(
            f"unscale_ + step + update of 400 plain parameters, 2 ranks, against {sharded_scaler}; "
            "the optimizer does nothing",
            plain["ours", "nothing"],
            plain[sharded_scaler, "nothing"],
            4,
        ),
        compare(
            "the same with SGD(foreach=True)",
            plain["ours", "SGD"],
            plain[sharded_scaler, "SGD"],
        ),
    ]
    for action in CLIPPING:
        for name, note in ((sharded_scaler, ""), ("torch", LOCAL)):
            against = "torch.amp.GradScaler" if name == "torch" else name
            found.append(
                compare(
                    "unscale_ + clip_grad_norm_ + step + update of 400 plain DDP parameters, "
                    f"{action}, against {against} and torch.nn.utils.clip_grad_norm_",
                    ddp["ours", action],
                    ddp[name, action],
                    note=note,
                )
            )
    return found


def unscale_fsdp2(rank: int, size: int, num_rounds: int) -> dict[tuple[str, str], list[float]]:
    mesh = init_device_mesh("cpu", (size,))
    ways = {}
    for action, max_norm in {"unscale_": None, **CLIPPING}.items():
        for name in ("torch", "ours"):
            optimizer = NoStep(sharded(200, NUMEL, mesh, [Shard(0)]))
            ways[name, action] = iteration(make(name), optimizer, max_norm, only_unscale=True)
    return in_turns(ways, num_rounds)


def iterate_plain(rank: int, size: int, num_rounds: int) -> dict[tuple[str, str], list[float]]:
    optimizers = {
        "nothing": NoStep,
        "SGD": functools.partial(torch.optim.SGD, lr=0.0, foreach=True),
    }
    ways = {}
    for kind, make_optimizer in optimizers.items():
        for name in ("torch's ShardedGradScaler", "ours"):
            ways[name, kind] = iteration(make(name), make_optimizer(plain(400, NUMEL)))
    return in_turns(ways, num_rounds)


def iterate_ddp(rank: int, size: int, num_rounds: int) -> dict[tuple[str, str], list[float]]:
    ways = {}
    for action, max_norm in CLIPPING.items():
        for name in SCALERS:
            params = plain(400, NUMEL)
            model = DistributedDataParallel(nn.ParameterList(params))
            scaler = make(name)
            if isinstance(scaler, ShardedGradScaler):
                scaler.attach(model)
            ways[name, action] = iteration(scaler, NoStep(params), max_norm)
    return in_turns(ways, num_rounds)


def make(name: str) -> Any:
    return SCALERS[name]("cpu", init_scale=1.0, growth_interval=10**9)
