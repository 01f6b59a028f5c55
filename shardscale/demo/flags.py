"""The options of the demo on the command line, for `shardscale demo` and launch/train.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shardscale.demo.optimizers import OPTIMIZERS
from shardscale.demo.scalers import SCALERS
from shardscale.demo.wrap import WRAPS

__all__ = [
    "Checkpoint",
    "Comm",
    "Inject",
    "Json",
    "Optimizer",
    "Ranks",
    "SaveEvery",
    "Scaler",
    "StepLog",
    "Steps",
    "Verbose",
    "Wrap",
]

Ranks = Annotated[
    int | None,
    typer.Option("--ranks", help="Processes to train on.", show_default="one per GPU, or 4 on CPU"),
]
Wrap = Annotated[
    str | None,
    typer.Option("--wrap", metavar="|".join(WRAPS), help="Parallelism.", show_default="fsdp2"),
]
Optimizer = Annotated[
    str | None,
    typer.Option(
        "--optimizer",
        metavar="NAME",
        help=f"Optimizer: {', '.join(OPTIMIZERS)}.",
        show_default="adamw",
    ),
]
Scaler = Annotated[
    str | None,
    typer.Option(
        "--scaler", metavar="|".join(SCALERS), help="Gradient scaler.", show_default="shardscale"
    ),
]
Inject = Annotated[
    str | None,
    typer.Option(
        "--inject",
        metavar="RANK:STEP[:PARAM]",
        help="Overflow one shard of one rank at one step, or 'none'.",
        show_default="rank 1, half-way",
    ),
]
Steps = Annotated[int, typer.Option("--steps", help="Training steps.")]
Json = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write the outcome to this file, too."),
]
Comm = Annotated[
    str,
    typer.Option(
        "--comm", metavar="torch|mpi", help="What the scaler agrees over: torch.distributed or MPI."
    ),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint",
        metavar="FOLDER",
        help="Save here, also at the end and when told to stop; go on from the newest there.",
    ),
]
SaveEvery = Annotated[int, typer.Option("--save-every", help="Steps between two checkpoints.")]
StepLog = Annotated[
    Path | None,
    typer.Option(
        "--step-log", metavar="FOLDER", help="Write a line for each step, a file for each rank."
    ),
]
Verbose = Annotated[
    bool, typer.Option("--verbose", help="Have every rank say who it is, not only the first.")
]
