"""What a part of the examination came to, in rows of words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from shardscale.doctor.codes import Failure
from shardscale.owners import say_ranks

__all__ = ["by_value", "Judged", "Section", "who_said"]

_AT_MOST = 8  # different sayings; a thousand ranks may all put the same thing differently


class Section(NamedTuple):
    """A table with a title; the rows have one length."""

    title: str
    rows: Sequence[tuple[str, ...]]


class Judged(NamedTuple):
    """What rank 0 makes of what all ranks found."""

    sections: Sequence[Section]
    failures: Sequence[Failure] = ()
    hand_on: Any = None
    """What all ranks have to know for the next part."""


def by_value(values: Mapping[int, str]) -> str:
    """What the ranks said: once if they all said the same, else who said what."""
    return who_said(values) if len(set(values.values())) > 1 else next(iter(values.values()))


def who_said(values: Mapping[int, str]) -> str:
    """``{0: "no", 1: "yes", 2: "no"}`` -> ``ranks 0, 2: no; rank 1: yes``."""
    said: dict[str, list[int]] = {}
    for rank in sorted(values):
        said.setdefault(values[rank], []).append(rank)
    words = [f"{say_ranks(ranks)}: {value}" for value, ranks in said.items()]
    if len(words) > _AT_MOST:
        others = say_ranks(rank for ranks in list(said.values())[_AT_MOST:] for rank in ranks)
        words = [*words[:_AT_MOST], f"more on {others}"]
    return "; ".join(words)
