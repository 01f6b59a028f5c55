"""How long simulated jobs of very many ranks take, and what Gloo's ring takes for a step.

    python benchmarks/simulated_ranks.py [--to FOLDER]

The simulations are the cases of the tests; their seconds say what such a test costs, and nothing of
the time that a real job of so many ranks needs. For that, the time of Gloo's all-reduce of the two
numbers of a verdict is measured on as many real processes as fit, and divided by its steps.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import record
import torch
import torch.distributed as dist
from job import on_ranks, slowest
from side_by_side import Row, in_turns, quantile

ROOT = Path(__file__).resolve().parents[1]
SIZES = (2, 4, 8, 16, 32)


def simulated() -> list[Row]:
    """Each case in a process of its own, from the first tensor to the last rank's end."""
    sys.path.insert(0, str(ROOT))
    from tests.ranks.test_very_many_ranks import judge_all, scenarios, train

    verdicts = f"{len(scenarios(2))} verdicts under LocalTensorMode"
    steps = "4 iterations on a threaded process group, the last a disagreement"
    sums = "sums of the message in 4 orders and as a tree, 60 groups of 1 to"
    cases: dict[str, Callable[[], Any]] = {
        f"{verdicts}, 1,024 ranks": partial(judge_all, 0, 1, 1_024),
        f"{verdicts}, 16,384 ranks": partial(judge_all, 0, 1, 16_384),
        f"{steps}, 256 ranks": partial(train, 0, 1, 256),
        f"{steps}, 1,024 ranks": partial(train, 0, 1, 1_024),
        f"{sums} 131,072 ranks": add_up,
    }
    rows = []
    for what, case in cases.items():
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, spawn) as pool:
            seconds, mebibytes = pool.submit(timed, case).result()
        note = f"largest resident size of the process: {mebibytes:.0f} MiB"
        rows.append(Row(what, "s", seconds, None, None, "", "", None, note))
    return rows


def add_up() -> None:
    from tests.unit.test_message_arithmetic import test_every_partial_sum_is_exact_in_every_order

    test_every_partial_sum_is_exact_in_every_order()


def timed(case: Callable[[], Any]) -> tuple[float, float]:
    torch.set_num_threads(1)
    started = time.perf_counter()
    case()
    seconds = time.perf_counter() - started
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def ring(num_rounds: int) -> list[Row]:
    """The all-reduce of two float64 over Gloo, and a step of it: there are 2 (n - 1)."""
    rows = []
    for size in SIZES:
        rounds = max(5, 2 * num_rounds // size)
        taken = slowest(on_ranks(reduce_in_blocks, size, rounds))["all-reduce"]
        middle, low, high = (1e6 * quantile(taken, at) for at in (0.5, 0.2, 0.8))
        num_steps = 2 * (size - 1)
        note = f"{size} ranks: p20 {low:.0f} us, p80 {high:.0f} us of {rounds} rounds"
        if size > (os.cpu_count() or 1):
            note += "; they take turns on the cores"
        times = {f"{size} ranks": middle, f"each of {num_steps} steps": middle / num_steps}
        for what, time_us in times.items():
            rows.append(Row(what, "us", time_us, None, None, "", "", None, note))
    return rows


def reduce_in_blocks(rank: int, size: int, num_rounds: int) -> dict[str, list[float]]:
    message, options = torch.zeros(2, dtype=torch.float64), dist.AllreduceOptions()
    options.reduceOp = dist.ReduceOp.SUM
    block = max(20, 400 // size)

    def run() -> float:
        started = time.perf_counter()
        for _ in range(block):
            dist.group.WORLD.allreduce([message], options).wait()
        return (time.perf_counter() - started) / block

    return in_turns({"all-reduce": run}, num_rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--to",
        type=Path,
        default=record.RESULTS / "training-step",
        help="the folder to record in; without it the result that is kept there is written anew",
    )
    chosen = parser.parse_args()
    groups = {
        "Simulated jobs": simulated(),
        "Gloo's all-reduce of two float64": ring(num_rounds=100),
    }
    for title, rows in groups.items():
        print(f"\n## {title}\n\n{record.table(rows)}", flush=True)
    env = record.environment(record.cpu_name(), threads=1, backend="gloo")
    print(f"\nrecorded in {record.keep('very-many-ranks', env, groups, chosen.to)}")


if __name__ == "__main__":
    main()
