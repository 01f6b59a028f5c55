"""What a step allocates: never a copy of a gradient."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from parameters import NoStep, plain
from side_by_side import Row
from torch.profiler import ProfilerActivity, profile

from shardscale import ShardedGradScaler

__all__ = ["rows"]

MIB = 2**20
SIZE = 64 * MIB
# A copy would be the gradient's own size; small work buffers are not.
GOAL_MIB = 4


def rows() -> list[Row]:
    """The largest single allocation of each call, for one gradient of 64 MiB."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        theirs = largest_allocations(torch.amp.GradScaler, dtype)
        for call, num_bytes in largest_allocations(ShardedGradScaler, dtype).items():
            found.append(
                Row(
                    f"largest allocation of {call}, one gradient of 64 MiB, "
                    f"{str(dtype).removeprefix('torch.')}",
                    "MiB",
                    num_bytes / MIB,
                    theirs[call] / MIB,
                    None,
                    "",
                    f"<= {GOAL_MIB} MiB",
                    num_bytes <= GOAL_MIB * MIB,
                )
            )
    return found


def largest_allocations(scaler_class: type, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of the largest allocation by call; the optimizer does nothing."""
    found = {}
    for call in ("unscale_", "unscale_ + clip_grad_norm_", "step"):
        params = plain(1, SIZE // dtype.itemsize, dtype)
        optimizer = NoStep(params)
        scaler: Any = scaler_class("cpu", init_scale=2.0)
        scaler.scale(torch.ones(()))

        def run(
            call: str = call, scaler: Any = scaler, params: Any = params, optimizer: Any = optimizer
        ) -> None:
            if call == "step":
                scaler.step(optimizer)
            elif call == "unscale_":
                scaler.unscale_(optimizer)
            elif isinstance(scaler, ShardedGradScaler):
                scaler.clip_grad_norm_(optimizer, 1.0)
            else:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(params, 1.0)

        found[call] = largest_allocation(run)
    return found


def largest_allocation(call: Callable[[], None]) -> int:
    """Bytes of the largest single allocation that the profiler sees while ``call`` runs."""
    with quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    events = profiled.profiler.kineto_results.events()
    return max((e.nbytes() for e in events if e.name() == "[memory]"), default=0)


@contextmanager
def quiet() -> Iterator[None]:
    """The profiler tells the terminal of its own comings and goings, below Python."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
