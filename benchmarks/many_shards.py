"""Many small gradients on two ranks: what torch spends on each of them, and what ours does."""

from __future__ import annotations

import functools

import torch
from job import on_ranks, slowest
from parameters import NoStep, iteration, plain, sharded
from side_by_side import Row, compare, in_turns
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler as TorchShardedGradScaler
from torch.distributed.tensor import Shard

from shardscale import ShardedGradScaler

__all__ = ["rows"]

NUMEL = 64


def rows(num_rounds: int) -> list[Row]:
    """``unscale_`` of 200 FSDP2 shards, and a whole iteration of 400 plain parameters."""
    unscaling = slowest(on_ranks(unscale_shards, 2, num_rounds))
    iterating = slowest(on_ranks(iterate, 2, num_rounds))
    return [
        compare(
            "unscale_ of 200 FSDP2 shards, 2 ranks, against torch.amp.GradScaler",
            unscaling["ours"],
            unscaling["torch"],
            8,
        ),
        compare(
            "unscale_ + step + update of 400 plain parameters, 2 ranks, against torch's "
            "ShardedGradScaler; the optimizer does nothing",
            iterating["ours"],
            iterating["torch"],
            4,
        ),
        compare(
            "the same with SGD(foreach=True)",
            iterating["ours with SGD"],
            iterating["torch with SGD"],
        ),
    ]


def unscale_shards(rank: int, size: int, num_rounds: int) -> dict[str, list[float]]:
    mesh = init_device_mesh("cpu", (size,))
    ways = {}
    for name, scaler_class in (("torch", torch.amp.GradScaler), ("ours", ShardedGradScaler)):
        optimizer = NoStep(sharded(200, NUMEL, mesh, [Shard(0)]))
        scaler = scaler_class("cpu", init_scale=1.0, growth_interval=10**9)
        ways[name] = iteration(scaler, optimizer, only_unscale=True)
    return in_turns(ways, num_rounds)


def iterate(rank: int, size: int, num_rounds: int) -> dict[str, list[float]]:
    optimizers = {
        "": NoStep,
        " with SGD": functools.partial(torch.optim.SGD, lr=0.0, foreach=True),
    }
    ways = {}
    for suffix, make in optimizers.items():
        for name, scaler_class in (("torch", TorchShardedGradScaler), ("ours", ShardedGradScaler)):
            scaler = scaler_class("cpu", init_scale=1.0, growth_interval=10**9)
            ways[name + suffix] = iteration(scaler, make(plain(400, NUMEL)))
    return in_turns(ways, num_rounds)
