"""Take device time and host time of one call apart, on a GPU or, the same way, on the host."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import memory
import torch

__all__ = ["Clock", "Seconds"]

FLUSH_BYTES = 256 * 2**20  # larger than any GPU's L2
CALIBRATION_CYCLES = 10**7
SHORTEST_SLEEP_S, LONGEST_SLEEP_S = 0.5e-3, 50e-3


class Seconds(NamedTuple):
    """What one call took."""

    device: float
    """From the start of its first kernel to the end of its last one; on the host, all of it."""
    host: float
    """Until it returned, having enqueued its kernels."""


class HostEvent:
    """Stands in for a device's event where the host does the work itself."""

    def record(self) -> None:
        """This moment."""
        self.moment = time.perf_counter()

    def elapsed_time(self, other: HostEvent) -> float:
        """Milliseconds from this moment to the other, as torch's events give them."""
        return 1000 * (other.moment - self.moment)


class Clock:
    """Times calls on one device.

    On a GPU a call begins with a cold L2, and behind a kernel that sleeps for about twice as long
    as the host needs to enqueue the call: so its kernels run back to back, as they do in training,
    where the host is ahead.

    Args:
        device: A GPU or the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._is_gpu = device.type == "cuda"
        if self._is_gpu:
            self._flush = torch.zeros(FLUSH_BYTES, dtype=torch.uint8, device=device)
            self._cycles_per_s = self._calibrate()

    def time(self, call: Callable[[], None], num_calls: int = 1, sleep_s: float = 0.0) -> Seconds:
        """The mean of ``num_calls`` calls in a row; a GPU sleeps for ``sleep_s`` before."""
        start, end = self._event(), self._event()
        self.synchronize()
        if self._is_gpu:
            self._flush.zero_()
            torch.cuda._sleep(round(sleep_s * self._cycles_per_s))
        start.record()
        started = time.perf_counter()
        for _ in range(num_calls):
            call()
        host = time.perf_counter() - started
        end.record()
        self.synchronize()
        return Seconds(start.elapsed_time(end) / 1000 / num_calls, host / num_calls)

    def sleep_for(self, call: Callable[[], None], close: Callable[[], None]) -> float:
        """Warm a call up; the seconds of sleep that hide its enqueueing.

        Args:
            call: What will be timed.
            close: What is needed after each call.
        """
        if not self._is_gpu:
            return 0.0  # nothing is enqueued
        for _ in range(2):
            host = self.time(call).host
            close()
        return min(max(2 * host, SHORTEST_SLEEP_S), LONGEST_SLEEP_S)

    def largest_temporary(self, call: Callable[[], None]) -> int:
        """Bytes that a call allocates: at its peak on a GPU, the largest piece on the host."""
        if not self._is_gpu:
            return memory.largest_allocation(call)
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before

    def synchronize(self) -> None:
        """Wait until the device has nothing left to do."""
        if self._is_gpu:
            torch.cuda.synchronize(self.device)

    def _event(self) -> Any:
        return torch.cuda.Event(enable_timing=True) if self._is_gpu else HostEvent()

    def _calibrate(self) -> float:
        """Cycles of torch's sleeping kernel in a second."""
        torch.cuda._sleep(CALIBRATION_CYCLES)
        start, end = self._event(), self._event()
        self.synchronize()
        start.record()
        torch.cuda._sleep(CALIBRATION_CYCLES)
        end.record()
        self.synchronize()
        return CALIBRATION_CYCLES / (start.elapsed_time(end) / 1000)
