"""A single process gains nothing from agreeing, so it must not pay for it either."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from parameters import NoStep, iteration, plain
from side_by_side import Row, compare, in_turns

from shardscale import ShardedGradScaler

__all__ = ["rows"]

NUMEL = 64


def rows(num_rounds: int) -> list[Row]:
    """400 parameters in one process without a group: ``unscale_`` alone, and with clipping."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    ways = {}
    for name, scaler_class in (("torch", torch.amp.GradScaler), ("ours", ShardedGradScaler)):
        scaler = scaler_class("cpu", init_scale=1.0, growth_interval=10**9)
        ways[name] = iteration(scaler, NoStep(plain(400, NUMEL)), only_unscale=True)
    for clips, max_norm in (("measured", math.inf), ("clipped", 1e-3)):
        ways[f"torch {clips}"] = unscale_and_clip(torch.amp.GradScaler, max_norm)
        ways[f"ours {clips}"] = unscale_and_clip(ShardedGradScaler, max_norm)
    taken = in_turns(ways, num_rounds)
    torch.set_num_threads(before)
    return [
        compare("unscale_ of 400 parameters, one process", taken["ours"], taken["torch"], 1),
        compare(
            "unscale_ + clip_grad_norm_ of 400 parameters, one process, not active",
            taken["ours measured"],
            taken["torch measured"],
            1.5,
        ),
        compare("the same, active", taken["ours clipped"], taken["torch clipped"], 1.5),
    ]


def unscale_and_clip(scaler_class: type, max_norm: float) -> Callable[[], float]:
    scaler: Any = scaler_class("cpu", init_scale=1.0, growth_interval=10**9)
    params = plain(400, NUMEL)
    optimizer = NoStep(params)
    scaler.scale(torch.ones(()))

    def run() -> float:
        for p in params:
            p.grad.fill_(1.0)
        started = time.perf_counter()
        if isinstance(scaler, ShardedGradScaler):
            scaler.clip_grad_norm_(optimizer, max_norm)
        else:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(params, max_norm)
        seconds = time.perf_counter() - started
        scaler.step(optimizer)
        scaler.update()
        return seconds

    return run
