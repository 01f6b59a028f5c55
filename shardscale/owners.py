"""Which rank counts a gradient in the norm, from its layout or from what was declared."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from shardscale.errors import LayoutError
from shardscale.records import Layout, Members

__all__ = ["Holders", "by_declaration", "by_layout", "require_inside", "say_ranks"]


class Holders(NamedTuple):
    """Who holds what this rank holds of a parameter."""

    text: str  # for people
    owner: int | None  # who counts it; None where it is neither this rank nor one it can name


def by_layout(name: str, layout: Layout, members: Members) -> Holders | None:
    """The holders where the layout speaks of the whole group; None where it does not.

    Raises:
        LayoutError: it reaches out of the group.
    """
    if members.size == 1:
        return Holders(say_ranks([members.here]), members.here)
    require_inside(name, layout, members)
    holders = layout.holders or (members.here,)
    if layout.num_ranks != members.size:
        return None
    return Holders(say_ranks(holders), holders[0])


def by_declaration(name: str, layout: Layout, members: Members, declared: object) -> Holders:
    """The holders where ``attach(copies=)`` has told of those besides the layout's.

    Args:
        name: The parameter's.
        layout: Its layout.
        members: The agreeing group.
        declared: What the function returned: group, mesh, ranks, or None for nowhere else.

    Raises:
        LayoutError: it names no ranks, leaves out this one, reaches out of the group or contradicts
            the layout.
    """
    require_inside(name, layout, members)
    holders: Sequence[int] = layout.holders or [members.here]
    copies = [members.here] if declared is None else _copies(name, layout, members, declared)
    if len(copies) == 1 or len(holders) == 1:
        holders = copies if len(copies) > 1 else holders
        return Holders(say_ranks(holders), holders[0])
    text = f"{say_ranks(holders)}; copies: {say_ranks(copies)}"
    # Of copies of copies, the first of the first counts.
    if members.here == holders[0]:
        return Holders(text, copies[0])
    return Holders(text, holders[0] if members.here == copies[0] else None)


def require_inside(name: str, layout: Layout, members: Members) -> None:
    """No rank that a layout names may lie outside of the agreeing group.

    Raises:
        LayoutError: it names the ranks.
    """
    outside = layout.ranks - members.ranks if members.ranks is not None else None
    if outside:
        assert members.ranks is not None
        raise LayoutError(
            f"rank {members.rank} of {members.size}: {name} ({layout.kind}) is held by "
            f"{say_ranks(layout.ranks)}, but this scaler agrees with {say_ranks(members.ranks)} "
            f"only, so {say_ranks(outside)} would step or skip without the others. Make the scaler "
            "with a process_group= of all ranks that hold a part of the model, or with none for "
            "the whole job."
        )


def _copies(name: str, layout: Layout, members: Members, declared: object) -> Sequence[int]:
    """The ranks that hold the same as this one besides its layout, in order."""
    ranks = _as_ranks(declared)
    start = f"rank {members.here}: copies= says"
    if ranks is None:
        raise LayoutError(
            f"{start} {declared!r} for {name}, but must return a process group that this "
            "rank is in, ranks, a mesh, or None for nowhere else."
        )
    start = f"{start} that {name} is held by {say_ranks(ranks)},"
    if members.here not in ranks:
        raise LayoutError(
            f"{start} which leaves out this rank. Return the ranks that hold it, this one "
            "included, or None for nowhere else."
        )
    if members.ranks is not None and not members.ranks.issuperset(ranks):
        raise LayoutError(
            f"{start} but this scaler agrees with {say_ranks(members.ranks)} only. Return ranks of "
            "that group, or make the scaler with a process_group= of all of them."
        )
    others = layout.ranks - set(layout.holders) - {members.here}
    if not others.isdisjoint(ranks):
        raise LayoutError(
            f"{start} but its layout, {layout.kind}, has other parts on {say_ranks(others)}. "
            "Return only ranks that the layout does not speak of, or None."
        )
    return ranks


def _as_ranks(declared: object) -> list[int] | None:
    """Ranks in the whole job, in order; None if this is no way to name them."""
    try:
        if isinstance(declared, dist.ProcessGroup):
            declared = dist.get_process_group_ranks(declared)
        if isinstance(declared, DeviceMesh):
            declared = declared.mesh.flatten().tolist()
        return sorted({operator.index(rank) for rank in declared}) or None  # type: ignore[attr-defined]
    except (TypeError, ValueError, KeyError):
        return None


def say_ranks(ranks: Iterable[int]) -> str:
    """Ranks for people: ``[0, 1, 2, 5]`` -> ``ranks 0-2, 5``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    texts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return ("rank " if sum(map(len, runs)) == 1 else "ranks ") + ", ".join(texts)
