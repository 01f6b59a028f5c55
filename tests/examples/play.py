"""Run the examples on CPU ranks and read what they print."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import re
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from torch.optim import optimizer

from tests.ranks.pool import RankPool

__all__ = ["EXAMPLES", "NAMES", "SIZES", "Printed", "play", "read", "refusals"]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))

# "1, 2 or 4 ranks" stands behind each command, "1 to 8 ranks" where the number does not matter.
_SIZES = re.compile(r"    torchrun --nproc-per-node 4 examples/(\w+)\.py  # ([^#]+) ranks")


def _sizes(name: str) -> str:
    lines = map(_SIZES.fullmatch, (EXAMPLES / f"{name}.py").read_text().splitlines())
    (found,) = (line[2] for line in lines if line and line[1] == name)
    return found


SIZES = {name: _sizes(name) for name in NAMES}
"""On how many ranks an example says that it runs."""

_STEP = re.compile(r"step (\d+): loss (\S+), norm (\S+), (stepped|skipped)")
# Where more than one thing is trained, each of the others has such a line that begins with a name.
_RANKS = re.compile(r"(?:(\w+): )?steps taken and scale, rank by rank: (.*)")


class Printed(NamedTuple):
    """What rank 0 of an example has printed."""

    losses: list[float]
    norms: list[float]
    outcomes: list[str]
    """"stepped" or "skipped"."""
    ranks: list[tuple[int, float]]
    """Of each rank, how many steps it has really taken, and its scale."""
    others: dict[str, list[tuple[int, float]]]
    """The same of what else is trained, by its name."""
    table: str
    """What `describe()` gave."""
    text: str
    """All but the table, as it was printed."""


def play(pool: RankPool, name: str, size: int) -> Printed:
    """Run an example on so many ranks; nobody but rank 0 may print.

    On two ranks the optimizers are foreach, as torch's are on a GPU unless they are told.
    """
    first, *others = pool.run(_main, size, name=name, prefers_foreach=size == 2)
    assert others == [""] * (size - 1)
    return read(first)


def read(output: str) -> Printed:
    """Take an example's output apart; a line that is none of the expected is an error."""
    lines = output.splitlines()
    end = next(i for i, line in enumerate(lines) if _RANKS.fullmatch(line))
    steps = [_STEP.fullmatch(line) for line in lines[:end]]
    assert all(steps) and [int(step[1]) for step in steps] == list(range(end)), output
    found = list(takewhile(bool, map(_RANKS.fullmatch, lines[end:])))
    ranks = {line[1]: ast.literal_eval(line[2]) for line in found}
    table = end + len(found)
    return Printed(
        [float(step[2]) for step in steps],
        [float(step[3]) for step in steps],
        [step[4] for step in steps],
        ranks.pop(None),
        ranks,
        "\n".join(lines[table:]),
        "\n".join(lines[:table]),
    )


def refusals(pool: RankPool, names: list[str], size: int) -> dict[str, str]:
    """How each example ends on a number of ranks that it cannot run on."""
    _, *last = pool.run(_refuse, size, names=names)
    assert last[:-1] == last[1:]
    return last[0]


def _refuse(rank: int, size: int, names: list[str]) -> dict[str, str]:
    """Nothing may be sent before: rank 0 is not there, and a collective would wait for it."""
    return {name: _end_of(name) for name in names if rank > 0}


def _end_of(name: str) -> str:
    try:
        importlib.import_module(f"examples.{name}").main("cpu")
    except SystemExit as end:
        return str(end)
    return "it went through"


def _main(rank: int, size: int, name: str, prefers_foreach: bool) -> str:
    if prefers_foreach:  # the process is this rank's own, so nothing has to be put back
        optimizer._get_foreach_kernels_supported_devices = lambda: ["cpu"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        importlib.import_module(f"examples.{name}").main("cpu")
    return printed.getvalue()
