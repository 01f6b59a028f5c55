"""The tables at the end of the demo: one row a rank, one table a job."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.columns import Columns
from rich.console import RenderableType
from rich.table import Table

from shardscale.demo.agreement import accuracy_text
from shardscale.demo.options import JobOptions
from shardscale.demo.results import JobResult
from shardscale.demo.scalers import scaler_title

__all__ = ["job_title", "overflow_text", "side_by_side"]


def job_title(options: JobOptions) -> str:
    """Return what tells one job of the demo from another, in a few words."""
    scaler = scaler_title(options.scaler, options.wrap)
    return f"{scaler}, {options.wrap.upper()}, {options.optimizer}"


def overflow_text(options: JobOptions, result: JobResult) -> str:
    """Return a sentence about the overflow that was put into the job."""
    if options.inject is None:
        return "No overflow was injected."
    rank, step, param = options.inject
    if result.overflowed is None:
        return f"No overflow was injected: this run began after step {step}."
    instead = f" (it holds nothing of {param})" if param not in (None, result.overflowed) else ""
    return f"Overflowed at step {step}: rank {rank}, its shard of {result.overflowed}{instead}."


def side_by_side(jobs: Sequence[tuple[JobOptions, JobResult]]) -> RenderableType:
    """Return the tables of the jobs, next to each other where the console is wide enough."""
    return Columns([_table(options, result) for options, result in jobs], padding=(0, 4))


def _table(options: JobOptions, result: JobResult) -> Table:
    table = Table(
        title=job_title(options),
        caption=f"test accuracy {accuracy_text(result.rows)}, {result.seconds:.1f} s",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("rank", justify="right")
    table.add_column("scale", justify="right")
    table.add_column("applied", justify="right")
    table.add_column("skipped", justify="right")
    table.add_column("parameters" if options.wrap == "ddp" else "its shard")
    for row in result.rows:
        steps = (str(row.applied), str(row.skipped))
        table.add_row(str(row.rank), f"{row.scale:.10g}", *steps, row.digest)
    return table
