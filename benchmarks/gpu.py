"""Unscaling and clipping on a GPU, beside torch's.

    python benchmarks/gpu.py [--quick] [--to FOLDER]

Needs only torch 2.11 or newer. Device time is taken between two events, host time around the call
alone. Without a GPU it says so and ends well.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import record
import torch
from parameters import NoStep
from side_by_side import Row, compare, quantile
from torch import Tensor

from shardscale import ShardedGradScaler

MIB = 2**20


class Case(NamedTuple):
    """A set of gradients."""

    name: str
    num: int
    numel: int
    dtype: torch.dtype


CASES = [
    Case("64 gradients, 256 MiB, float32", 64, MIB, torch.float32),
    Case("64 gradients, 256 MiB, bfloat16", 64, 2 * MIB, torch.bfloat16),
    Case("64 gradients, 256 MiB, float16", 64, 2 * MIB, torch.float16),
    Case("3000 gradients of 4 Ki, float32", 3000, 4096, torch.float32),
    Case("3000 gradients of 4 Ki, bfloat16", 3000, 4096, torch.bfloat16),
]
# What is done -> the largest norm, or None where nothing is clipped.
ACTIONS = {
    "unscale_": None,
    "unscale_ + clip, not active": math.inf,
    "unscale_ + clip, active": 1e-3,
}
# DESIGN: how many times less device time than torch's is hoped for.
GOALS = {"unscale_ + clip, not active": 2.4, "unscale_ + clip, active": 1.2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds, nothing recorded")
    parser.add_argument("--to", type=Path, help="the folder to record in")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        print("There is no GPU here that torch can use, so nothing was measured.")
        return
    num_rounds = 10 if chosen.quick else 100
    groups = {"Copy bandwidth": [copy_bandwidth(num_rounds)]}
    for case in CASES:
        groups[case.name] = rows(case, num_rounds)
    for title, group in groups.items():
        print(f"\n## {title}\n\n{record.table(group)}", flush=True)
    folder = chosen.to or (None if chosen.quick else record.RESULTS)
    if folder is not None:
        versions = {"cuda": torch.version.cuda, "hip": torch.version.hip}
        env = record.environment(torch.cuda.get_device_name(), rounds=num_rounds, **versions)
        print(f"\nrecorded in {record.keep('gpu-unscale', env, groups, folder)}")


def copy_bandwidth(num_rounds: int) -> Row:
    source = torch.ones(256 * MIB // 4, device="cuda")
    target = torch.empty_like(source)
    seconds = quantile([time_of(lambda: target.copy_(source))[0] for _ in range(num_rounds)], 0.5)
    note = f"{2 * source.nbytes / seconds / 1e9:.0f} GB/s, reading and writing counted"
    return Row("copy of 256 MiB", "us", 1e6 * seconds, None, None, "", "", None, note)


def rows(case: Case, num_rounds: int) -> list[Row]:
    """Device and host time of each action, ours and torch's in turns."""
    found = []
    for action, max_norm in ACTIONS.items():
        ways = {"torch": unscale_with_torch(case, max_norm), "ours": unscale(case, max_norm)}
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        refusal = ""
        for i in range(num_rounds + 3):
            for name in list(ways) if i % 2 else list(reversed(ways)):
                try:
                    times = ways[name]()
                except RuntimeError as error:
                    if name == "ours":
                        raise
                    refusal = f"torch: {str(error).splitlines()[0]}"
                    del ways[name]
                    continue
                if i >= 3:
                    taken[name].append(times)
        for index, kind in enumerate(("device", "host")):
            ours = [times[index] for times in taken["ours"]]
            theirs = [times[index] for times in taken["torch"]]
            what = f"{action}, {kind} time"
            goal = GOALS.get(action) if kind == "device" and case.num < 1000 else None
            if refusal:
                middle = 1e6 * quantile(ours, 0.5)
                found.append(Row(what, "us", middle, None, None, "", "", None, refusal))
            else:
                found.append(compare(what, ours, theirs, goal))
    return found


def make_params(case: Case) -> list[Tensor]:
    params = []
    for _ in range(case.num):
        p = torch.nn.Parameter(torch.empty(case.numel, dtype=case.dtype, device="cuda"))
        p.grad = torch.ones_like(p)
        params.append(p)
    return params


def unscale(case: Case, max_norm: float | None) -> Callable[[], tuple[float, float]]:
    params = make_params(case)
    optimizer = NoStep(params)
    scaler = ShardedGradScaler("cuda", init_scale=1.0, growth_interval=10**9)

    def call() -> None:
        if max_norm is None:
            scaler.unscale_(optimizer)
        else:
            scaler.clip_grad_norm_(optimizer, max_norm)

    def close() -> None:
        scaler.step(optimizer)
        scaler.update()

    return one_iteration(params, call, close)


def unscale_with_torch(case: Case, max_norm: float | None) -> Callable[[], tuple[float, float]]:
    params = make_params(case)
    optimizer = NoStep(params)
    scaler = torch.amp.GradScaler("cuda", init_scale=1.0, growth_interval=10**9)

    def call() -> None:
        if case.dtype == torch.float16:  # torch refuses float16 gradients before it looks at them
            one = torch.ones((), device="cuda")
            scaler._unscale_grads_(optimizer, one, torch.zeros_like(one), True)
        else:
            scaler.unscale_(optimizer)
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(params, max_norm)

    scaler.scale(torch.ones((), device="cuda"))
    # No update: with bfloat16 or float16 gradients it would find that nothing was recorded.
    return one_iteration(params, call, scaler._per_optimizer_states.clear)


def one_iteration(
    params: list[Tensor], call: Callable[[], None], close: Callable[[], None]
) -> Callable[[], tuple[float, float]]:
    """A function that makes one iteration and returns ``call``'s device and host seconds in it."""
    grads = [p.grad for p in params]

    def run() -> tuple[float, float]:
        torch._foreach_zero_(grads)
        torch._foreach_add_(grads, 1.0)
        times = time_of(call)
        close()
        return times

    return run


def time_of(call: Callable[[], Any]) -> tuple[float, float]:
    """Seconds on the device and on the host, from an idle device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    started = time.perf_counter()
    call()
    host = time.perf_counter() - started
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000, host


if __name__ == "__main__":
    main()
