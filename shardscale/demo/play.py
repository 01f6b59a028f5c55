"""Runs the demo from start to end on one machine: jobs, tables, closing line, exit code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from shardscale.demo.agreement import closing_line, ranks_agree
from shardscale.demo.options import JobOptions
from shardscale.demo.progress import show_progress
from shardscale.demo.record import write_record
from shardscale.demo.results import JobResult
from shardscale.demo.start import start_jobs
from shardscale.demo.table import job_title, overflow_text, side_by_side

__all__ = ["conclude", "exit_code", "make_console", "play", "torch_twin"]

Job = tuple[JobOptions, JobResult]


def play(options: JobOptions, *, compare: bool, json_path: Path | None) -> int:
    """Train, show what every rank ended with, and say whether they agree.

    Args:
        options: The job.
        compare: Whether to run the same job with torch's own scaler, too.
        json_path: Where to write the outcome, None for nowhere.

    Returns:
        The exit code.
    """
    console = make_console()
    asked = [options, torch_twin(options)] if compare else [options]
    with show_progress(console, asked) as on_tick:
        jobs = list(zip(asked, start_jobs(asked, on_tick), strict=True))
    conclude(console, jobs, json_path)
    return exit_code(jobs[0])


def torch_twin(options: JobOptions) -> JobOptions:
    """Return the same job as it is run with torch alone: FSDP1, its own scaler, fused AdamW."""
    return options._replace(wrap="fsdp1", optimizer="adamw", scaler="torch")


def make_console(*, quiet: bool = False) -> Console:
    """Return the console to show on; a file or a log gets lines wide enough for two tables."""
    console = Console(quiet=quiet)
    return console if console.is_terminal else Console(quiet=quiet, width=120)


def conclude(console: Console, jobs: Sequence[Job], json_path: Path | None) -> None:
    """Show the tables, write the record and say the closing line.

    Args:
        console: Where to show it.
        jobs: The job that was asked for, then what it is compared with.
        json_path: Where to write the outcome, None for nowhere.
    """
    console.print()
    console.print(overflow_text(*jobs[0]), highlight=False)
    console.print(side_by_side(jobs))
    if json_path:
        write_record(json_path, jobs)
    for job in jobs[1:]:
        _say(console, job, f"{job_title(job[0])}: ")
    _say(console, jobs[0], "")


def exit_code(job: Job) -> int:
    """Return 0 if the ranks of the job agree, 3 if they diverged."""
    return 0 if _agree(job) else 3


def _agree(job: Job) -> bool:
    return ranks_agree(job[1].rows, job[0].wrap)


def _say(console: Console, job: Job, prefix: str) -> None:
    line = prefix + closing_line(job[1].rows, job[0].wrap)
    style = "green" if _agree(job) else "red"
    console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)
