"""Decides whether the ranks agree, and says it in one line."""

from __future__ import annotations

from collections.abc import Sequence

from shardscale.demo.results import RankRow

__all__ = ["accuracy_text", "closing_line", "ranks_agree"]


def ranks_agree(rows: Sequence[RankRow], wrap: str) -> bool:
    """Return whether all ranks took the same steps and ended in the same state.

    Equal scale, applied and skipped steps; under DDP, where every rank holds all parameters, equal
    digests too. Under FSDP each rank holds another shard, and equal digests would be the error.
    """
    return len(_parties(rows, wrap)) == 1


def closing_line(rows: Sequence[RankRow], wrap: str) -> str:
    """Return the sentence the demo ends with: `agree: …` or `DIVERGED: …`."""
    first = rows[0]
    num_ranks, num_steps = len(rows), first.applied + first.skipped
    if ranks_agree(rows, wrap):
        same_bits = f", with the same parameters {first.digest}" if wrap == "ddp" else ""
        return (
            f"agree: {num_ranks} of {num_ranks} ranks applied {first.applied} of {num_steps} "
            f"steps, skipped {first.skipped}, and ended at scale {first.scale:.10g}{same_bits}; "
            f"test accuracy {accuracy_text(rows)}"
        )
    told = []
    for party in _parties(rows, wrap):
        one = party[0]
        who = _name_ranks([row.rank for row in party])
        params = f", parameters {one.digest}" if wrap == "ddp" else ""
        told.append(f"{who} skipped {one.skipped} (scale {one.scale:.10g}{params})")
    return f"DIVERGED: of {num_steps} steps {'; '.join(told)}; test accuracy {accuracy_text(rows)}"


def accuracy_text(rows: Sequence[RankRow]) -> str:
    """Return the accuracy in per cent; a range where the ranks' models differ."""
    low, high = min(row.accuracy for row in rows), max(row.accuracy for row in rows)
    return f"{100 * low:.1f} %" if low == high else f"{100 * low:.1f} to {100 * high:.1f} %"


def _parties(rows: Sequence[RankRow], wrap: str) -> list[list[RankRow]]:
    """Return the rows grouped by what has to be equal, in rank order."""
    parties: dict[tuple[float, int, int, str], list[RankRow]] = {}
    for row in rows:
        digest = row.digest if wrap == "ddp" else ""
        parties.setdefault((row.scale, row.applied, row.skipped, digest), []).append(row)
    return list(parties.values())


def _name_ranks(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
