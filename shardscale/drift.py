"""When the ranks do not belong together: who differs, in what, and what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from shardscale.owners import say_ranks
from shardscale.records import Call

__all__ = ["account", "differences", "explain"]

_GO_ON = "load the same state_dict everywhere to go on"
_CURE = (
    "Make the same calls with the same arguments on every rank, build the scaler alike on all of "
    f"them, and {_GO_ON}."
)
_RECONCILE = (
    "Where they only loaded different states, reconcile(scaler) of shardscale.checkpoint, called "
    "on all of them, takes over that with the smallest scale."
)
# What a loaded state brings; a policy of other numbers is no state to take over.
_OF_THE_STATE = {
    "number of updates",
    "updates by replays of a graph",
    "scale",
    "scale of these gradients",
    "growth_tracker",
    "hysteresis_tracker",
}


def account(call: Call, fault: Exception | None = None) -> dict[str, object]:
    """What this rank tells the others about its side of a call that failed.

    Sync: reads the scale and the trackers.
    """
    return {
        "error": f"{type(fault).__name__}: {fault}" if fault else None,
        "method": call.method,
        "max_norm": _number(call.max_norm),
        "number of updates": call.num_updates,
        "updates by replays of a graph": _number(call.num_replayed),
        "call since the last update": call.ordinal,
        "scaler (in order of making)": call.scaler,
        "scale": call.state.scale.item(),
        "scale of these gradients": call.stamp.item(),
        "growth_tracker": call.state.growth_tracker.item(),
        "hysteresis_tracker": call.state.hysteresis_tracker.item(),
        "policy": call.policy,
    }


def explain(accounts: Sequence[object], rank: int) -> str:
    """A message that names the ranks and their values, from what they told.

    Args:
        accounts: In rank order, each rank's :func:`account`, or None where it did not answer.
        rank: This rank.
    """
    told = {r: a for r, a in enumerate(accounts) if isinstance(a, dict)}
    silent = [r for r in range(len(accounts)) if r not in told]
    faults = {r: str(a["error"]) for r, a in told.items() if a["error"] is not None}
    parts = [f"rank {r} raised {error.rstrip('.')}" for r, error in faults.items()]
    differing = {} if faults else differences(told)
    parts += [f"{field}: {values}" for field, values in differing.items()]
    if silent:
        parts.append(f"{say_ranks(silent)} did not answer")
    if not parts:
        parts.append("their earlier verdicts had different bits, or they drifted apart before")
    head = f"rank {rank} of {len(accounts)}: the ranks disagree, so no rank moved its parameters"
    cure = f"Mend the error of {say_ranks([*faults])}, and {_GO_ON}." if faults else _CURE
    if differing and differing.keys() <= _OF_THE_STATE:
        cure = f"{cure} {_RECONCILE}"
    return f"{head}. {'; '.join(parts)}. {cure}"


def differences(told: Mapping[int, Mapping[str, object]]) -> dict[str, str]:
    """The fields in which ranks differ, and in words which of them holds what.

    Args:
        told: What each rank said, the same fields each.
    """
    found = {}
    for field in next(iter(told.values()), {}):
        holders: dict[str, list[int]] = {}
        for r, row in told.items():
            holders.setdefault(repr(row[field]), []).append(r)
        if len(holders) > 1:
            found[field] = ", ".join(f"{value} on {say_ranks(rs)}" for value, rs in holders.items())
    return found


def _number(value: float | Tensor | None) -> float | None:
    return value.item() if isinstance(value, Tensor) else value
