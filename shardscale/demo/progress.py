"""Shows jobs while they train: live bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from shardscale.demo.options import JobOptions
from shardscale.demo.results import Tick
from shardscale.demo.table import job_title

__all__ = ["OnTick", "show_progress"]

OnTick = Callable[[int, Tick], None]
"""Takes the number of the job, as in the list that was announced, and its newest step."""


def show_progress(console: Console, jobs: Sequence[JobOptions]) -> AbstractContextManager[OnTick]:
    """Announce jobs, then show every tick that is passed to the function it yields.

    Args:
        console: Where to show it; whether it is a terminal decides how.
        jobs: The jobs, in the order in which they will run.
    """
    for job in jobs:
        ranks = "1 rank" if job.ranks == 1 else f"{job.ranks} ranks"
        console.print(f"{job.scaler}: {job_title(job)}, float16 on {ranks}", highlight=False)
    return _as_bars(console, jobs) if console.is_terminal else _as_lines(console, jobs)


@contextmanager
def _as_bars(console: Console, jobs: Sequence[JobOptions]) -> Iterator[OnTick]:
    columns = (
        TextColumn("{task.description}"),
        MofNCompleteColumn(),
        BarColumn(bar_width=16),
        TextColumn("{task.fields[numbers]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bars:
        tasks = [
            bars.add_task(job.scaler, total=job.steps, start=False, numbers="") for job in jobs
        ]
        bars.update(tasks[0], numbers="starting the ranks")
        before: dict[int, Tick] = {}

        def show(number: int, tick: Tick) -> None:
            if number not in before:
                bars.start_task(tasks[number])
            elif tick.skipped > before[number].skipped:
                bars.console.print(
                    f"{jobs[number].scaler}: step {tick.step} [yellow]skipped[/yellow], "
                    f"scale {before[number].scale:.10g} -> {tick.scale:.10g}",
                    highlight=False,
                )
            bars.update(tasks[number], completed=tick.step, numbers=_numbers(tick))
            before[number] = tick

        yield show


@contextmanager
def _as_lines(console: Console, jobs: Sequence[JobOptions]) -> Iterator[OnTick]:
    before: dict[int, Tick] = {}

    def show(number: int, tick: Tick) -> None:
        job = jobs[number]
        skipped = tick.skipped > (before[number].skipped if number in before else 0)
        if skipped or tick.step % max(1, job.steps // 10) == 0:
            step = f"step {tick.step:>{len(str(job.steps))}}/{job.steps}"
            mark = "  <- skipped" if skipped else ""
            console.print(f"{job.scaler}  {step}  {_numbers(tick)}{mark}", highlight=False)
        before[number] = tick

    yield show


def _numbers(tick: Tick) -> str:
    return f"loss {tick.loss:.4f}  scale {tick.scale:.10g}  skips {tick.skipped}"
