"""The records a job makes: a tick a step, a row a rank, and the result all ranks share."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["JobResult", "RankRow", "Tick"]


class Tick(NamedTuple):
    """One training step as one rank saw it."""

    step: int
    loss: float
    scale: float
    skipped: int


class RankRow(NamedTuple):
    """What one rank held when training was over."""

    rank: int
    scale: float
    applied: int
    skipped: int
    digest: str
    accuracy: float


class JobResult(NamedTuple):
    """The outcome of one job, the same on every rank.

    ``overflowed`` is the parameter whose gradient shard was made infinite, None if none was.
    """

    rows: tuple[RankRow, ...]
    ticks: tuple[Tick, ...]
    overflowed: str | None
    device: str
    seconds: float
