"""A single process gains nothing from agreeing, so it must not pay for it either."""

from __future__ import annotations

import math

import torch
from parameters import NoStep, iteration, plain
from side_by_side import Row, compare, in_turns

from shardscale import ShardedGradScaler

__all__ = ["rows"]

NUMEL = 64
ACTIONS = {"unscale_": None, "not active": math.inf, "active": 1e-3}


def rows(num_rounds: int) -> list[Row]:
    """400 parameters in one process without a group: ``unscale_`` alone, and with clipping."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    ways = {}
    for action, max_norm in ACTIONS.items():
        for name, scaler_class in (("torch", torch.amp.GradScaler), ("ours", ShardedGradScaler)):
            scaler = scaler_class("cpu", init_scale=1.0, growth_interval=10**9)
            optimizer = NoStep(plain(400, NUMEL))
            ways[name, action] = iteration(scaler, optimizer, max_norm, only_unscale=True)
    taken = in_turns(ways, num_rounds)
    torch.set_num_threads(before)
    return [
        compare(what, taken["ours", action], taken["torch", action], goal)
        for what, action, goal in (
            ("unscale_ of 400 parameters, one process", "unscale_", 1),
            (
                "unscale_ + clip_grad_norm_ of 400 parameters, one process, not active",
                "not active",
                1.5,
            ),
            ("the same, active", "active", 1.5),
        )
    ]
