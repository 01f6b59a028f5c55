"""Time several ways of doing one thing in turns, so that what disturbs one disturbs the others."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

__all__ = ["Row", "compare", "in_turns", "quantile"]

Name = TypeVar("Name")
Taken = TypeVar("Taken")


class Row(NamedTuple):
    """One line of a result: a number of ours, torch's beside it, and what was hoped for."""

    what: str
    unit: str  # "us", "MiB", "x" or "" for a count
    ours: float
    theirs: float | str | None  # a word where torch has no number, None where nothing is compared
    ratio: tuple[float, float, float] | None  # median, p20, p80 of what `of` names, round by round
    of: str  # "torch / ours", "ours / torch"; empty where no ratio is meant
    goal: str
    reached: bool | None
    note: str = ""


def in_turns(ways: Mapping[Name, Callable[[], Taken]], num_rounds: int) -> dict[Name, list[Taken]]:
    """Seconds of each way in each round; every second round runs them in reverse order.

    Args:
        ways: By name, a function that does the thing once and returns the seconds that counted,
            as one number or as several.
        num_rounds: Rounds that are kept; a tenth as many, at least one, come first and are not.
    """
    taken: dict[Name, list[Taken]] = {name: [] for name in ways}
    num_warm = max(1, num_rounds // 10)
    for i in range(num_warm + num_rounds):
        names = list(ways) if i % 2 else list(reversed(ways))
        for name in names:
            seconds = ways[name]()
            if i >= num_warm:
                taken[name].append(seconds)
    return taken


def compare(
    what: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    at_least: float | None = None,
    note: str = "",
) -> Row:
    """How many times less ours takes than torch's, from seconds in the same rounds."""
    ratios = [t / o for o, t in zip(ours, theirs, strict=True)]
    middle = quantile(ratios, 0.5)
    return Row(
        what,
        "us",
        1e6 * quantile(ours, 0.5),
        1e6 * quantile(theirs, 0.5),
        (middle, quantile(ratios, 0.2), quantile(ratios, 0.8)),
        "torch / ours",
        "" if at_least is None else f">= {at_least:g} x less",
        None if at_least is None else middle >= at_least,
        note,
    )


def quantile(numbers: Sequence[float], at: float) -> float:
    """The number below which the fraction ``at`` lies."""
    if at == 0.5:
        return statistics.median(numbers)
    return sorted(numbers)[round(at * (len(numbers) - 1))]
