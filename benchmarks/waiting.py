"""What it costs that the host does not wait: reading late, and skipping on the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from job import on_ranks, slowest
from parameters import FusedNoStep, iteration, plain
from side_by_side import Row, in_turns, quantile
from torch import Tensor

from shardscale import ShardedGradScaler, skip_on_device

__all__ = ["rows"]

MAKERS: dict[str, Callable[..., Any]] = {
    "AdamW": partial(torch.optim.AdamW, foreach=True),
    "RMSprop": partial(torch.optim.RMSprop, foreach=True),
    "SGD with momentum": partial(torch.optim.SGD, momentum=0.9, foreach=True),
}
SIZES = {"16 tensors of 1 MiB": (16, 2**18), "400 tensors of 64 elements": (400, 64)}
NOTE = (
    "On the CPU, with the flag taken for one on a device, which nobody may look at: a copy, a step "
    "and a selection. The new buffers are first touched here, and torch's selection by one flag is "
    "not vectorised, which costs a CPU more than a GPU."
)
ON_HOST = "As it is on the CPU: the flag lies on the host, so a good step is seen to be good."


def rows(num_rounds: int) -> list[Row]:
    """Late reading beside reading at once; gated steps beside plain ones."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    found = [
        late_reading("one process", time_reading(0, 1, 5 * num_rounds)),
        late_reading("2 ranks", slowest(on_ranks(time_reading, 2, 5 * num_rounds))),
        *gating(num_rounds),
    ]
    torch.set_num_threads(before)
    return found


def late_reading(where: str, taken: dict[str, list[float]]) -> Row:
    """A fused iteration of 400 parameters, against one that reads at once."""
    ratios = divide(taken["late"], taken["at once"])
    noise = abs(quantile(divide(taken["one"], taken["other"]), 0.5) - 1)
    middle = quantile(ratios, 0.5)
    return Row(
        f"fused step + update, 400 parameters, {where}: read late, against sync=True",
        "us",
        1e6 * quantile(taken["late"], 0.5),
        1e6 * quantile(taken["at once"], 0.5),
        (middle, quantile(ratios, 0.2), quantile(ratios, 0.8)),
        "late / at once",
        f"<= 1, two equal series differ by {noise:.3f}",
        middle <= 1 + noise,
        "Only ours: torch reads nothing there, and is wrong (its ranks skip one by one).",
    )


def divide(some: list[float], others: list[float]) -> list[float]:
    """Round by round."""
    return [one / other for one, other in zip(some, others, strict=True)]


def time_reading(rank: int, size: int, num_rounds: int) -> dict[str, list[float]]:
    """Seconds of an iteration, by when its verdict is read."""

    def way(sync: bool) -> Callable[[], float]:
        scaler = ShardedGradScaler("cpu", init_scale=1.0, growth_interval=10**9, sync=sync)
        return iteration(scaler, FusedNoStep(plain(400, 64)))

    taken: dict[str, list[float]] = {"late": [], "at once": [], "one": [], "other": []}
    # Whose gradients were made first counts: both orders, each for half of the rounds.
    for names in (("late", "at once"), ("at once", "late"), ("one", "other"), ("other", "one")):
        ways = {name: way(sync=name == "at once") for name in names}
        for name, seconds in in_turns(ways, num_rounds // 2).items():
            taken[name] += seconds
    return taken


def gating(num_rounds: int) -> list[Row]:
    """The seconds that gating adds, in passes that read and write parameters and state once."""
    found = []
    for size, (num, numel) in SIZES.items():
        for name, make in MAKERS.items():
            ways = {
                flag: step(make, num, numel, flag)
                for flag in ("plain", "on the host", "as on a device")
            }
            ways["pass"] = one_pass(make, num, numel)
            taken = in_turns(ways, num_rounds)
            for way, note in (("on the host", ON_HOST), ("as on a device", NOTE)):
                found.append(gated(f"{name}, {size}, flag {way}", taken, way, note))
    return found


def gated(what: str, taken: dict[str, list[float]], way: str, note: str) -> Row:
    """One row: a gated step beside a plain one, the difference in passes."""
    times = zip(taken["plain"], taken[way], taken["pass"], strict=True)
    passes = [(mine - ungated) / one for ungated, mine, one in times]
    middle = quantile(passes, 0.5)
    ratio = quantile(taken[way], 0.5) / quantile(taken["plain"], 0.5)
    return Row(
        f"gated {what}: {ratio:.2f} x the step",
        "us",
        1e6 * quantile(taken[way], 0.5),
        1e6 * quantile(taken["plain"], 0.5),
        (middle, quantile(passes, 0.2), quantile(passes, 0.8)),
        "added / one pass",
        "<= 1",
        middle <= 1,
        note,
    )


@contextmanager
def hidden_flags(hides: bool) -> Iterator[None]:
    """Within, a gate takes flags on the host for flags on a device."""
    knows = skip_on_device.__globals__["_is_on_host"]  # no part of the library is open to this
    if hides:
        skip_on_device.__globals__["_is_on_host"] = lambda found_inf: False
    try:
        yield
    finally:
        skip_on_device.__globals__["_is_on_host"] = knows


def step(make: Callable[..., Any], num: int, numel: int, flag: str) -> Callable[[], float]:
    """A function that steps once with a good verdict and returns the seconds of that.

    Args:
        make: Makes the optimizer.
        num: How many parameters it has.
        numel: How many elements each of them has.
        flag: "plain" for none, else where the gate is to find it.
    """
    optimizer = make(plain(num, numel))
    good = torch.zeros(())
    if flag != "plain":
        skip_on_device(optimizer)

    def run() -> float:
        if flag != "plain":
            optimizer.found_inf = good
        with hidden_flags(flag == "as on a device"):
            started = time.perf_counter()
            optimizer.step()
            return time.perf_counter() - started

    return run


def one_pass(make: Callable[..., Any], num: int, numel: int) -> Callable[[], float]:
    """A function that multiplies parameters and state by one, in place."""
    optimizer = make(plain(num, numel))
    optimizer.step()
    params = optimizer.param_groups[0]["params"]
    states = [v for p in params for v in optimizer.state[p].values() if isinstance(v, Tensor)]
    tensors = [p.detach() for p in params] + states

    def run() -> float:
        started = time.perf_counter()
        torch._foreach_mul_(tensors, 1.0)
        return time.perf_counter() - started

    return run
