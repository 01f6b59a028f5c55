"""Clipping 256 MiB of gradients in one process: what counts is how often memory is read."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from parameters import NoStep, iteration, plain
from side_by_side import Row, compare, in_turns
from torch import Tensor

from shardscale import ShardedGradScaler

__all__ = ["rows"]

NUM = 64
SIZE = 256 * 2**20
GOALS = {torch.float32: 2.5, torch.bfloat16: 4, torch.float16: 0.9}


def rows(num_rounds: int) -> list[Row]:
    """``unscale_`` and a clipping that is not active, by one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    found = []
    for dtype, goal in GOALS.items():
        params = plain(NUM, SIZE // NUM // dtype.itemsize, dtype)
        ways = {"ours": unscale_and_clip(ShardedGradScaler, params)}
        against = ""
        if dtype == torch.float16:  # torch refuses to unscale such gradients
            ways["torch"] = multiply(params)
            against = ", against one multiplication in place"
        else:
            ways["torch"] = unscale_and_clip(torch.amp.GradScaler, params)
        taken = in_turns(ways, num_rounds)
        what = f"unscale_ + clip_grad_norm_, not active, {str(dtype).removeprefix('torch.')}"
        found.append(compare(what + against, taken["ours"], taken["torch"], goal))
    torch.set_num_threads(before)
    return found


def unscale_and_clip(scaler_class: type, params: list[Tensor]) -> Callable[[], float]:
    scaler: Any = scaler_class("cpu", init_scale=1.0, growth_interval=10**9)
    return iteration(scaler, NoStep(params), math.inf, only_unscale=True)


def multiply(params: list[Tensor]) -> Callable[[], float]:
    def run() -> float:
        started = time.perf_counter()
        for p in params:
            p.grad.mul_(1.0)
        return time.perf_counter() - started

    return run
