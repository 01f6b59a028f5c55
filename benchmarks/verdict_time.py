"""What a verdict costs beside the all-reduce that it cannot do without."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from job import on_ranks, slowest
from parameters import NoStep, plain
from side_by_side import Row, in_turns, quantile

from shardscale import ShardedGradScaler

__all__ = ["rows"]

SIZES = (2, 4, 8, 16, 32)
GOAL = 0.15  # for 2 ranks, each with a core of its own


def rows(num_rounds: int) -> list[Row]:
    """A call with nothing to judge, less a bare all-reduce of one element in the same round.

    Blocks of calls are timed, one after the other without a barrier in between: the all-reduces
    keep the ranks in step. The bare series is run twice; what those two differ by is noise. The
    more ranks, the fewer rounds and the shorter the blocks.
    """
    found = []
    for size in SIZES:
        block = max(5, 100 // size)
        taken = slowest(on_ranks(time_blocks, size, max(3, 2 * num_rounds // size), block))
        found.append(
            row(
                "unscale_(()): a whole verdict, nothing to judge",
                size,
                taken,
                "nothing",
                GOAL if size == 2 else None,
            )
        )
        if size == 2:
            what = "unscale_ of one gradient of one element"
            found.append(row(what, size, taken, "one element", None))
    return found


def row(what: str, size: int, taken: dict[str, list[float]], name: str, goal: float | None) -> Row:
    bare, again = taken["bare"], taken["bare again"]
    outside = [(v - b) / b for v, b in zip(taken[name], bare, strict=True)]
    noise = [abs(a - b) / b for a, b in zip(again, bare, strict=True)]
    middle = quantile(outside, 0.5)
    note = (
        f"{size} ranks: two bare series differ by {quantile(noise, 0.5):.2f} x (median), "
        f"{quantile(noise, 0.8):.2f} x (p80) of {len(bare)} rounds; dist.all_reduce instead of the "
        f"group's own method: {1e6 * quantile(taken['dist'], 0.5):.0f} us"
    )
    num_cores = os.cpu_count() or 1
    if size > num_cores:
        note += f"; they take turns on {num_cores} cores, so most of every time is waiting for one"
    return Row(
        f"{what}, {size} ranks, less a bare all-reduce of one float32",
        "us",
        1e6 * quantile(taken[name], 0.5),
        1e6 * quantile(bare, 0.5),
        (middle, quantile(outside, 0.2), quantile(outside, 0.8)),
        "(ours - bare) / bare",
        "" if goal is None else f"<= {goal:g} x",
        None if goal is None else middle <= goal,
        note,
    )


def time_blocks(rank: int, size: int, num_rounds: int, block: int) -> dict[str, list[float]]:
    options = dist.AllreduceOptions()
    options.reduceOp = dist.ReduceOp.SUM
    group, one = dist.group.WORLD, torch.zeros(1)
    scaler = ShardedGradScaler("cpu", init_scale=1.0, growth_interval=10**9)
    scaler.scale(torch.ones(()))
    optimizers = [NoStep(plain(1, 1)) for _ in range(block)]  # each is unscaled once an iteration

    def bare() -> None:
        for _ in range(block):
            group.allreduce([one], options).wait()

    def wrapped() -> None:
        for _ in range(block):
            dist.all_reduce(one)

    def nothing() -> None:
        for _ in range(block):
            scaler.unscale_(())

    def one_element() -> None:
        for optimizer in optimizers:
            scaler.unscale_(optimizer)

    def timed(calls: Callable[[], None]) -> Callable[[], float]:
        def run() -> float:
            started = time.perf_counter()
            calls()
            seconds = (time.perf_counter() - started) / block
            if calls in (nothing, one_element):
                scaler.update()
            return seconds

        return run

    ways = {
        "bare": bare,
        "nothing": nothing,
        "one element": one_element,
        "dist": wrapped,
        "bare again": bare,
    }
    return in_turns({name: timed(calls) for name, calls in ways.items()}, num_rounds)
