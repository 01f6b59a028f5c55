"""The options of the demo on the command line, for `shardscale demo` and launch/train.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shardscale.demo.optimizers import OPTIMIZERS
from shardscale.demo.scalers import SCALERS
from shardscale.demo.wrap import WRAPS

__all__ = ["Inject", "Json", "Optimizer", "Ranks", "Scaler", "Steps", "Wrap"]

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
