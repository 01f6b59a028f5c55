"""Time grows with the number of parameters, and not faster."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from job import on_ranks, slowest
from parameters import NoStep, iteration, plain, sharded
from side_by_side import Row, compare, in_turns, quantile
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler as TorchShardedGradScaler
from torch.distributed.tensor import Shard

import shardscale
from shardscale import ShardedGradScaler

__all__ = ["rows"]

NUMEL = 64
NUMS = (100, 1_000, 10_000)
# Ten times the difference is a straight line; the rest is for caches that no longer hold it all.
GOAL = 11
CALLS = {"unscale_ + step + update": None, "clip_grad_norm_ + step + update": 1e-3}
PEERS: dict[str, type] = {
    "plain parameters": TorchShardedGradScaler,
    "FSDP2 shards": torch.amp.GradScaler,
}
# torch 2.13 plans an operator over a list of DTensors in the square of its length, the first time.
LARGEST_PLAN = 1_000

Way = tuple[str, str, int]  # ours or torch's, calls, number of parameters


def rows(num_rounds: int) -> list[Row]:
    """Iterations of 100, 1,000 and 10,000 parameters, and how the differences grow.

    What does not depend on the number of parameters, the all-reduce among it, is in each of the
    three times and in neither difference.
    """
    found = []
    for layout, peer in PEERS.items():
        taken = slowest(on_ranks(iterate, 2, layout, num_rounds))
        for calls, max_norm in CALLS.items():
            note = f"against torch's {peer.__name__}"
            if max_norm is not None:
                note += " and torch.nn.utils.clip_grad_norm_; clipping is active"
            if not torch_can(layout, max_norm, max(NUMS)):
                (seconds,) = taken["first by torch", calls, LARGEST_PLAN]
                note += (
                    f", whose first call with {LARGEST_PLAN:,} DTensors took {seconds:.1f} s; that "
                    f"grows with the square, so no one waited for {max(NUMS):,}"
                )
            for num in NUMS:
                what = f"{calls} of {num:,} {layout}, 2 ranks"
                ours, theirs = taken["ours", calls, num], taken.get(("torch", calls, num))
                if theirs is not None:
                    found.append(compare(what, ours, theirs, note=note))
                    continue
                middle = 1e6 * quantile(ours, 0.5)
                found.append(Row(what, "us", middle, "too long", None, "", "", None, note))
            growth = growth_of(taken, "ours", calls)
            assert growth is not None
            found.append(
                Row(
                    "of these medians, (t(10,000) - t(1,000)) / (t(1,000) - t(100))",
                    "x",
                    growth,
                    growth_of(taken, "torch", calls),
                    None,
                    "",
                    f"<= {GOAL} x",
                    growth <= GOAL,
                )
            )
    return found


def growth_of(taken: Mapping[Way, list[float]], name: str, calls: str) -> float | None:
    if (name, calls, max(NUMS)) not in taken:
        return None
    few, more, many = (quantile(taken[name, calls, num], 0.5) for num in NUMS)
    return (many - more) / (more - few) if more > few else math.nan  # nothing but noise


def torch_can(layout: str, max_norm: float | None, num: int) -> bool:
    """Whether torch comes to an end in time."""
    return layout != "FSDP2 shards" or max_norm is None or num <= LARGEST_PLAN


def iterate(rank: int, size: int, layout: str, num_rounds: int) -> dict[Way, list[float]]:
    ways, first = {}, {}
    for num in NUMS:
        if layout == "FSDP2 shards":
            params = sharded(num, NUMEL, init_device_mesh("cpu", (size,)), [Shard(0)])
        else:
            params = plain(num, NUMEL)
        for name, scaler_class in (("torch", PEERS[layout]), ("ours", ShardedGradScaler)):
            for calls, max_norm in CALLS.items():
                if name == "torch" and not torch_can(layout, max_norm, num):
                    continue
                scaler: Any = scaler_class("cpu", init_scale=1.0, growth_interval=10**9)
                if name == "ours" and layout == "plain parameters":
                    scaler.attach(nn.ParameterList(params), copies=shardscale.distinct)
                ways[name, calls, num] = run = iteration(scaler, NoStep(params), max_norm)
                first[f"first by {name}", calls, num] = [run()]
    return {**in_turns(ways, num_rounds), **first}
