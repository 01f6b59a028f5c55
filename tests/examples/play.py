"""Run the examples on CPU ranks and read what they print."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import re
from pathlib import Path
from typing import NamedTuple

from tests.ranks.pool import RankPool

__all__ = ["EXAMPLES", "NAMES", "Printed", "play", "read"]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))

_STEP = re.compile(r"step (\d+): loss (\S+), norm (\S+), (stepped|skipped)")
_RANKS = "steps taken and scale, rank by rank: "


class Printed(NamedTuple):
    """What rank 0 of an example has printed."""

    losses: list[float]
    norms: list[float]
    outcomes: list[str]
    """"stepped" or "skipped"."""
    ranks: list[tuple[int, float]]
    """Of each rank, how many steps it has really taken, and its scale."""
    table: str
    """What `describe()` gave."""


def play(pool: RankPool, name: str, size: int) -> Printed:
    """Run an example on so many ranks; nobody but rank 0 may print."""
    first, *others = pool.run(_main, size, name=name)
    assert others == [""] * (size - 1)
    return read(first)


def read(output: str) -> Printed:
    """Take an example's output apart; a line that is none of the expected is an error."""
    lines = output.splitlines()
    end = next(i for i, line in enumerate(lines) if line.startswith(_RANKS))
    steps = [_STEP.fullmatch(line) for line in lines[:end]]
    assert all(steps) and [int(step[1]) for step in steps] == list(range(end)), output
    return Printed(
        [float(step[2]) for step in steps],
        [float(step[3]) for step in steps],
        [step[4] for step in steps],
        ast.literal_eval(lines[end].removeprefix(_RANKS)),
        "\n".join(lines[end + 1 :]),
    )


def _main(rank: int, size: int, name: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        importlib.import_module(f"examples.{name}").main("cpu")
    return printed.getvalue()
