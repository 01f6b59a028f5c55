"""What ``unscale_`` of 3,000 small parameters costs the host, as plain tensors and as DTensors."""

from __future__ import annotations

import torch
from held_gradients import FACTOR
from job import on_ranks
from parameters import NoStep, iteration, plain, sharded
from side_by_side import Row, compare, in_turns
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

from shardscale import ShardedGradScaler

__all__ = ["rows"]

NUM, NUMEL = 3000, 64
GOAL_PLAIN, GOAL_SHARDED = 5, 20


def rows(num_rounds: int) -> list[Row]:
    """Ours beside ``torch.amp.GradScaler``, in one process and in a group of one rank."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = unscale(plain(NUM, NUMEL), num_rounds)
    torch.set_num_threads(before)
    (in_group,) = on_ranks(unscale_sharded, 1, num_rounds)
    what = f"ShardedGradScaler.unscale_ of {NUM} {{}}, against torch.amp.GradScaler's"
    return [
        compare(what.format("plain parameters"), alone["ours"], alone["torch"], GOAL_PLAIN),
        compare(
            what.format("DTensors, Gloo group of 1 rank"),
            in_group["ours"],
            in_group["torch"],
            GOAL_SHARDED,
        ),
    ]


def unscale_sharded(rank: int, size: int, num_rounds: int) -> dict[str, list[float]]:
    return unscale(sharded(NUM, NUMEL, init_device_mesh("cpu", (size,)), [Shard(0)]), num_rounds)


def unscale(params: list[Tensor], num_rounds: int) -> dict[str, list[float]]:
    ways = {}
    for name, scaler_class in (("torch", torch.amp.GradScaler), ("ours", ShardedGradScaler)):
        scaler = scaler_class("cpu", init_scale=1 / FACTOR, growth_interval=10**9)
        ways[name] = iteration(scaler, NoStep(params), only_unscale=True)
    return in_turns(ways, num_rounds)
