"""What a verdict costs beside the all-reduce that it cannot do without."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from job import on_ranks, slowest
from parameters import NoStep, plain
from side_by_side import Row, in_turns, quantile

from shardscale import ShardedGradScaler

__all__ = ["rows"]

BLOCK = 50
GOAL = 0.15


def rows(num_rounds: int) -> list[Row]:
    """A call with nothing to judge, less a bare all-reduce of one element in the same round.

    Blocks of calls are timed, one after the other without a barrier in between: the all-reduces
    keep the ranks in step. The bare series is run twice; what those two differ by is noise.
    """
    taken = slowest(on_ranks(time_blocks, 2, num_rounds))
    bare, again = taken["bare"], taken["bare again"]
    rows = []
    for what, name, goal in (
        ("unscale_(()): a whole verdict, nothing to judge", "nothing", GOAL),
        ("unscale_ of one gradient of one element", "one element", None),
    ):
        outside = [(v - b) / b for v, b in zip(taken[name], bare, strict=True)]
        noise = [abs(a - b) / b for a, b in zip(again, bare, strict=True)]
        middle = quantile(outside, 0.5)
        rows.append(
            Row(
                f"{what}, 2 ranks, less a bare all-reduce of one float32",
                "us",
                1e6 * quantile(taken[name], 0.5),
                1e6 * quantile(bare, 0.5),
                (middle, quantile(outside, 0.2), quantile(outside, 0.8)),
                "(ours - bare) / bare",
                "" if goal is None else f"<= {goal:g} x",
                None if goal is None else middle <= goal,
                f"two bare series differ by {quantile(noise, 0.5):.2f} x (median), "
                f"{quantile(noise, 0.8):.2f} x (p80); dist.all_reduce instead of the group's own "
                f"method: {1e6 * quantile(taken['dist'], 0.5):.0f} us",
            )
        )
    return rows


def time_blocks(rank: int, size: int, num_rounds: int) -> dict[str, list[float]]:
    options = dist.AllreduceOptions()
    options.reduceOp = dist.ReduceOp.SUM
    group, one = dist.group.WORLD, torch.zeros(1)
    scaler = ShardedGradScaler("cpu", init_scale=1.0, growth_interval=10**9)
    scaler.scale(torch.ones(()))
    optimizers = [NoStep(plain(1, 1)) for _ in range(BLOCK)]  # each is unscaled once an iteration

    def bare() -> None:
        for _ in range(BLOCK):
            group.allreduce([one], options).wait()

    def wrapped() -> None:
        for _ in range(BLOCK):
            dist.all_reduce(one)

    def nothing() -> None:
        for _ in range(BLOCK):
            scaler.unscale_(())

    def one_element() -> None:
        for optimizer in optimizers:
            scaler.unscale_(optimizer)

    def timed(block: Callable[[], None]) -> Callable[[], float]:
        def run() -> float:
            started = time.perf_counter()
            block()
            seconds = (time.perf_counter() - started) / BLOCK
            if block in (nothing, one_element):
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
    return in_turns({name: timed(block) for name, block in ways.items()}, num_rounds)
