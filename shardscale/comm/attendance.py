"""What a roll call has found, in sentences: who did not come, who did, and how far each had got."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["Attendance", "Crew", "Place", "tell"]

_NAMED = 8  # so many ranks are named; a large job has no use for a list of all that came


class Place(NamedTuple):
    """How far a rank has got."""

    verdict: int  # of the group: 1 for its first
    step: int | None  # the scaler's number of updates; None where the communicator was not told

    def __str__(self) -> str:
        return f"verdict {self.verdict}" + ("" if self.step is None else f" (step {self.step})")

    @property
    def short(self) -> str:
        """The step where it is known; that is what people count."""
        return f"verdict {self.verdict}" if self.step is None else f"step {self.step}"


class Attendance(NamedTuple):
    """What was found in the store, or told by the ranks. They are numbered in the group."""

    answered: dict[int, Place]  # they are there now, waiting for this verdict
    late: dict[int, Place]  # where they last waited for long
    hosts: dict[int, str]  # of every rank that has made a scaler, or its side of the communicator


class Crew(NamedTuple):
    """The ranks of a group, and how to name them."""

    rank: int  # this one's number in the group
    size: int
    host: str  # this one's
    in_job: tuple[int, ...] | None = None  # their numbers in the job, where those are others

    @property
    def myself(self) -> str:
        """This rank, as an error begins: ``rank 1 of 4 (n2)``."""
        return f"rank {self.rank} of {self.size} ({self._where(self.rank, self.host)})"

    def name(self, ranks: Iterable[int], hosts: dict[int, str]) -> str:
        """Some ranks with their hosts: ``ranks 0 (n1), 2 (n3)``."""
        ranks = sorted(ranks)
        named = []
        for rank in ranks[:_NAMED]:
            where = self._where(rank, hosts.get(rank))
            named.append(f"{rank} ({where})" if where else f"{rank}")
        rest = f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else ""
        return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(named) + rest

    def _where(self, rank: int, host: str | None) -> str:
        number = [] if self.in_job is None else [f"rank {self.in_job[rank]} of the job"]
        return ", ".join(number + ([host] if host else []))


def tell(found: Attendance, crew: Crew, place: Place, last: Place | None) -> str:
    """Who is missing from a verdict, and who is not.

    Args:
        found: What the roll call has found.
        crew: The ranks that should have come.
        place: The verdict.
        last: The newest one that is complete, in which all ranks took part; None before the first.
    """
    here = {r for r, at in found.answered.items() if at.verdict == place.verdict} - {crew.rank}
    elsewhere = {r: at for r, at in found.answered.items() if at.verdict != place.verdict}
    late = {r for r, at in found.late.items() if at.verdict == place.verdict}
    silent = late - found.answered.keys() - {crew.rank}
    missing = set(range(crew.size)) - {crew.rank} - here - elsewhere.keys() - silent
    others = _places(elsewhere, crew, found.hosts)
    if not missing and not silent:
        if elsewhere:
            return f"The ranks do not make the same calls: {others}."
        return (
            "All ranks came, so a connection broke or the ranks entered different collectives of "
            "this group in between. Make the same calls in the same order on all of them."
        )
    sentences = []
    if missing:
        sentences.append(f"Did not come: {_missing(missing, crew, found.hosts, last)}.")
    if silent:
        sentences.append(f"Came, but no longer there: {crew.name(silent, found.hosts)}.")
    if here:
        step = "" if place.step is None else f" at {place.short}"
        sentences.append(f"Came: {crew.name(here, found.hosts)}{step}.")
        # A communicator that is used without a scaler, or inside another one, knows of no step.
        alike = {place.step, None}
        astray = {r: found.answered[r] for r in here if found.answered[r].step not in alike}
        if step and astray:
            sentences.append(f"But {_places(astray, crew, found.hosts, short=True)}.")
    elif not silent:
        sentences.append("No other rank came.")
    if elsewhere:
        sentences.append(f"Elsewhere: {others}.")
    if missing:
        sentences.append(
            "Every rank must make every call of the scaler; if one is slow, raise timeout_s."
        )
    return " ".join(sentences)


def _missing(missing: set[int], crew: Crew, hosts: dict[int, str], last: Place | None) -> str:
    if last is not None:
        return f"{crew.name(missing, hosts)}, last heard of at {last.short}"
    made_one = missing & hosts.keys()
    parts = []
    if made_one:
        parts.append(f"{crew.name(made_one, hosts)}, ready but never at a verdict")
    if missing - made_one:
        parts.append(f"{crew.name(missing - made_one, hosts)}, never heard of")
    return "; ".join(parts)


def _places(
    places: dict[int, Place], crew: Crew, hosts: dict[int, str], short: bool = False
) -> str:
    ranks_at: dict[str, list[int]] = {}
    for rank, place in places.items():
        ranks_at.setdefault(place.short if short else str(place), []).append(rank)
    return ", ".join(
        f"{crew.name(ranks, hosts)} {'was' if len(ranks) == 1 else 'were'} at {at}"
        for at, ranks in ranks_at.items()
    )
