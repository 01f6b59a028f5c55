"""Measure all sets, one after the other, and keep what is there after each."""

from __future__ import annotations

import functools
import gc
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import record
import torch
from clocks import Clock, Seconds
from gradient_sets import SETS, SWEEP_BYTES, GradientSet, odd, single
from held_gradients import HeldGradients, takes_operator
from kernel_goals import Facts, comparisons, no_large_temporary, small_tensor
from kernel_ways import Way, kernel_ways, scaler_ways, step_ways
from plot_roofline import draw
from side_by_side import Row, in_turns, quantile

__all__ = ["DTYPES", "Bench", "Limits", "name_of"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SWEEP = "single gradients"
# A call on the host that is shorter is timed several times in a row.
ENOUGH_BYTES = 2**20


class Limits(NamedTuple):
    """How much is measured."""

    num_rounds: int
    max_bytes: int
    """Of the gradients of one set; with an optimizer's state four times as many are in memory."""
    max_numel: int
    sweep_bytes: Sequence[int] = SWEEP_BYTES
    deadline_s: float = float("inf")
    """Seconds from the beginning after which no case starts."""


class Bench:
    """One run of a command.

    Args:
        clock: Times the calls, and says where.
        limits: How much is measured.
        env: What a reader must know to repeat it.
        theme: The beginning of the result's name.
        folder: Where results go; None to record nothing.
        plot: Where the plot goes; None for beside the result.
    """

    def __init__(
        self,
        clock: Clock,
        limits: Limits,
        env: dict[str, Any],
        theme: str,
        folder: Path | None,
        plot: Path | None,
    ) -> None:
        self.clock, self.limits, self.env, self.theme = clock, limits, env, theme
        self.folder, self.plot = folder, plot
        self.started = time.monotonic()
        self.longest_s = 0.0
        self.groups: dict[str, list[Row]] = {}
        self.times: dict[str, dict[str, Any]] = {}
        self.roofline: list[dict[str, Any]] = []
        self.wrong: list[str] = []
        self.recorded: Path | None = None

    def run(self, only: Sequence[str], more: Mapping[str, Callable[[], list[Row]]]) -> int:
        """Measure, and stop at a signal or at the deadline; the exit status.

        Args:
            only: Words of the sets to measure, and ``sweep``; in the order of importance.
            more: Further tables by their title, made last.
        """
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            self.check()
            for title, measure in [*self.cases(only), *more.items()]:
                self.measure(title, measure)
        except KeyboardInterrupt:
            self.env["stopped"] = "before the end, by a signal"
            print("\nStopped before the end.", flush=True)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # from here on it ends by itself
        self.keep()
        self.draw()
        if self.wrong:
            print(f"\nWRONG, whatever the times: {'; '.join(self.wrong)}")
        return 1 if self.wrong else 0

    def check(self) -> None:
        """Compare ours with torch's bit for bit, before anything is timed."""
        for dtype in DTYPES:
            self.compare_bits(HeldGradients(odd(2**16), dtype, self.clock.device), "odd sizes")

    def cases(self, only: Sequence[str]) -> list[tuple[str, Callable[[], list[Row]]]]:
        """Title and function of each case; float16, which trains least, comes last."""
        found: list[tuple[str, Callable[[], list[Row]]]] = []
        for dtypes in (DTYPES[:2], DTYPES[2:]):
            for word in only:
                for dtype in dtypes:
                    if word == "sweep":
                        measure = functools.partial(self.sweep, dtype)
                        found.append((f"{SWEEP}, {name_of(dtype)}", measure))
                        continue
                    numel = min(self.limits.max_bytes // dtype.itemsize, self.limits.max_numel)
                    gradients = SETS[word](numel)
                    measure = functools.partial(
                        self.case, gradients, dtype, word in ("llama", "many_small")
                    )
                    found.append((f"{gradients.name}, {name_of(dtype)}", measure))
        return found

    def measure(self, title: str, measure: Callable[[], list[Row]]) -> None:
        """One case: print its table and keep everything again; unless time is too short."""
        begun = time.monotonic()
        if begun - self.started + self.longest_s > self.limits.deadline_s:
            self.env.setdefault("left out at the deadline", []).append(title)
            print(f"\nLeft out, for the deadline is near: {title}", flush=True)
            return
        try:
            self.groups[title] = measure()
        except Exception as error:  # noqa: BLE001 - the cases after it are worth having
            self.wrong.append(f"{title}: {type(error).__name__}: {error}")
            print(f"\nFailed: {self.wrong[-1]}", flush=True)
            return
        seconds = time.monotonic() - begun
        self.longest_s = max(self.longest_s, seconds)
        print(f"\n## {title} ({seconds:.0f} s)\n\n{record.table(self.groups[title])}", flush=True)
        self.keep()

    def case(self, gradients: GradientSet, dtype: torch.dtype, has_step: bool) -> list[Row]:
        """All ways on one set."""
        gc.collect()  # scalers and optimizers lie in cycles, and keep the set before in memory
        held = HeldGradients(gradients, dtype, self.clock.device)
        title = f"{gradients.name}, {name_of(dtype)}"
        self.compare_bits(held, gradients.name)
        ways = {**kernel_ways(held), **scaler_ways(held)}
        taken = self.in_turns(ways, held)
        temporaries = no_large_temporary(self.temporaries(ways))
        self.times[title] = summaries(taken, ways, held)
        if has_step:
            del ways  # and with it the buffer for copies: the optimizer's state is large
            gc.collect()
            ways = step_ways(held)
            taken |= self.in_turns(ways, held)
            self.times[title] |= summaries({name: taken[name] for name in ways}, ways, held)
        return [*comparisons(self.facts(held), taken), temporaries]

    def sweep(self, dtype: torch.dtype) -> list[Row]:
        """Single gradients of all sizes, for the plot."""
        rows = []
        gc.collect()
        for nbytes in self.limits.sweep_bytes:
            gradients = single(nbytes, dtype.itemsize)
            held = HeldGradients(gradients, dtype, self.clock.device)
            ways = kernel_ways(held, only_unscale=True)
            num_calls = 1
            if self.clock.device.type == "cpu":
                num_calls = max(1, min(200, ENOUGH_BYTES // nbytes))
            taken = self.in_turns(ways, held, num_calls)
            self.roofline += points(taken, self.facts(held))
            rows += small_tensor(self.facts(held), taken)
        return rows

    def in_turns(
        self, ways: Mapping[str, Way], held: HeldGradients, num_calls: int = 1
    ) -> dict[str, list[Seconds]]:
        """Device and host seconds of each way in each round."""
        sleeps = {name: self.clock.sleep_for(way.call, way.close) for name, way in ways.items()}

        def timed(name: str) -> Seconds:
            held.restore()
            seconds = self.clock.time(ways[name].call, num_calls, sleeps[name])
            ways[name].close()
            return seconds

        return in_turns(
            {name: functools.partial(timed, name) for name in ways}, self.limits.num_rounds
        )

    def temporaries(self, ways: Mapping[str, Way]) -> dict[str, int]:
        """Bytes that each call of ours allocates."""
        found = {}
        for name, way in ways.items():
            if name.startswith("ours: "):
                found[name] = self.clock.largest_temporary(way.call)
                way.close()
        return found

    def facts(self, held: HeldGradients) -> Facts:
        """What decides on the goals for these gradients."""
        device = self.clock.device
        return Facts(
            device.type,
            held.dtype,
            held.nbytes,
            len(held.grads),
            takes_operator(held.dtype, device),
        )

    def compare_bits(self, held: HeldGradients, what: str) -> None:
        """Note if ours is not torch's; the run goes on, since its times may explain why."""
        what = f"{what}, {name_of(held.dtype)}"
        difference = held.differs_from_torch()
        if difference:
            self.wrong.append(f"{what}: other {difference} than torch's")
        verdict = f"DIFFERS in {difference}" if difference else "bits as torch"
        print(f"{what}: {verdict}", flush=True)

    def keep(self) -> None:
        """Write all that was measured so far."""
        if self.folder is None or not self.groups:
            return
        if self.wrong:
            self.env["wrong"] = self.wrong
        times = {"times": self.times, "roofline": self.roofline}
        path = record.keep(self.theme, self.env, self.groups, self.folder, times)
        print(f"\nkept in {path}", flush=True)
        self.recorded = path

    def draw(self) -> None:
        """The plot of the single gradients, if there are any."""
        picture = self.plot or (self.recorded and self.recorded.with_suffix(".png"))
        if self.roofline and picture:
            print(draw({**self.env, "roofline": self.roofline}, picture))


def summaries(
    taken: Mapping[str, Sequence[Seconds]], ways: Mapping[str, Way], held: HeldGradients
) -> dict[str, dict[str, Any]]:
    """Median, p20 and p80 of each way's times, and the rate of its least traffic."""
    found = {}
    for name, times in taken.items():
        device_s = quantile([seconds.device for seconds in times], 0.5)
        found[name] = {
            "device_us": [1e6 * q for q in spread([seconds.device for seconds in times])],
            "host_us": [1e6 * q for q in spread([seconds.host for seconds in times])],
            "traffic_bytes": ways[name].passes * held.nbytes,
            "gb_per_s": ways[name].passes * held.nbytes / device_s / 1e9,
        }
    return found


def points(taken: Mapping[str, Sequence[Seconds]], facts: Facts) -> list[dict[str, Any]]:
    """How near each way comes to the rooflines: their time over its own, round by round."""
    found = []
    for name, times in taken.items():
        point: dict[str, Any] = {
            "way": name,
            "dtype": name_of(facts.dtype),
            "nbytes": facts.nbytes,
            "torch_checks": facts.torch_checks,
        }
        point["device_us"] = [1e6 * q for q in spread([seconds.device for seconds in times])]
        for roofline in ("copy_", "mul_"):
            pairs = zip(taken[roofline], times, strict=True)
            point[f"of_{roofline}"] = spread([roof.device / own.device for roof, own in pairs])
        found.append(point)
    return found


def spread(numbers: Sequence[float]) -> list[float]:
    """Median, p20 and p80."""
    return [quantile(numbers, at) for at in (0.5, 0.2, 0.8)]


def name_of(dtype: torch.dtype) -> str:
    """``float32`` for torch.float32."""
    return str(dtype).removeprefix("torch.")
