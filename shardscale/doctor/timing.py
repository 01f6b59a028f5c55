"""How long an all-reduce of one number takes, over each transport that the job has."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import torch
import torch.distributed as dist

from shardscale.doctor.codes import Code, Failure
from shardscale.doctor.sections import Judged, Section
from shardscale.owners import say_ranks

__all__ = ["judge", "median_times"]

_NUM_ROUNDS = 20


def median_times(devices: list[torch.device]) -> dict[str, float | str]:
    """Seconds an all-reduce took, by device; a sum that is wrong is told as it is.

    Collective: every rank of the job must call.
    Sync: the host waits for each.
    """
    return {device.type: _median_time(device) for device in devices}


def judge(found: Mapping[int, Mapping[str, float | str]]) -> Judged:
    """The slowest rank's median counts: it is what the others wait for."""
    rows, failures = [], []
    for kind in found[0]:
        of_kind = {rank: times[kind] for rank, times in found.items()}
        wrong = {rank: time_s for rank, time_s in of_kind.items() if isinstance(time_s, str)}
        times = {rank: time_s for rank, time_s in of_kind.items() if not isinstance(time_s, str)}
        if wrong:
            what = (
                f"the all-reduce on {kind} summed wrongly: {say_ranks(wrong)}: {wrong[min(wrong)]}."
            )
            failures.append(Failure(Code.ALL_REDUCE, what))
        if times:
            slowest = max(times, key=times.__getitem__)
            rows.append(
                (
                    kind,
                    f"median {statistics.median(times.values()) * 1e6:.0f} us",
                    f"slowest rank {slowest}: {times[slowest] * 1e6:.0f} us",
                )
            )
    return Judged([Section("all-reduce of one number", rows)], failures)


def _median_time(device: torch.device) -> float | str:
    rank, size = dist.get_rank(), dist.get_world_size()
    times = []
    for _ in range(_NUM_ROUNDS):
        number = torch.full((1,), rank + 1.0, dtype=torch.float64, device=device)
        started = time.perf_counter()
        dist.all_reduce(number)
        total = number.item()  # an accelerator's stream is waited for here
        times.append(time.perf_counter() - started)
        if total != size * (size + 1) / 2:
            return f"got {total:g} in place of {size * (size + 1) / 2:g}"
    return statistics.median(times)
