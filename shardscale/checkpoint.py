"""Ranks that hold different states, brought back to one of them: on all together, when asked."""

from __future__ import annotations

from typing import Any, NamedTuple

from shardscale.caller import warn_caller
from shardscale.drift import differences
from shardscale.errors import MissingRankError, StateError
from shardscale.owners import say_ranks
from shardscale.scaler import ShardedGradScaler

__all__ = ["reconcile"]


# Where ranks differ in these, no state of one fits another.
_NO_STATE = ("scaler (in order of making)", "policy")


class _Holding(NamedTuple):
    """What one rank's scaler holds."""

    scaler: int  # which of the group's scalers it is
    policy: str  # in the words that the ranks compare at every verdict
    state: dict[str, Any]  # of ``state_dict()``

    def fields(self) -> dict[str, object]:
        """What may differ, by the names that a DisagreementError has for it."""
        ours = dict(self.state["shardscale"])
        return {
            "scaler (in order of making)": self.scaler,
            "policy": self.policy,
            "scale": self.state["scale"],
            "growth_tracker": self.state["_growth_tracker"],
            "hysteresis_tracker": ours["hysteresis_tracker"],
            "number of updates": ours["num_updates"],
            "number of skips": ours["num_skipped"],
        }


def reconcile(scaler: ShardedGradScaler) -> bool:
    """Where the ranks hold different states, give all of them that with the smallest scale.

    A scale that is too small costs a little accuracy until it has grown, one that is too large
    costs skipped steps. Of equal scales that of the lowest rank is taken, trackers and counters
    included. What differed is told in a warning.

    For ranks that have loaded different files, before the first step or after the DisagreementError
    that says so; on gradients that were made before, no step may follow. As ``load_state_dict``, it
    begins anew: ``last_report()`` is None. Parameters and optimizers are not looked at: whoever
    loaded another scale may have loaded another model, too.

    Args:
        scaler: On each rank the one that the others agree with.

    Returns:
        Whether anything differed; the same on every rank. False for a scaler that is alone or
        disabled.

    Raises:
        StateError: the ranks hold scalers of different policies, or not the same one of several; on
            every rank, and nothing was changed.
        MissingRankError: a rank did not come within ``timeout_s``, 60 seconds if none was given;
            nothing was changed on this rank.

    Collective: every rank of the group must call.
    Sync: reads the scale and the trackers.
    """
    bond = scaler._judge.bond
    comm = bond.communicator()
    if comm is None or not scaler.is_enabled():
        return False
    here = f"rank {comm.rank} of {comm.size}"
    mine = _Holding(bond.ordinal, repr(scaler._policy), scaler.state_dict())
    answers = comm.all_gather_object(mine)
    holdings = {r: each for r, each in enumerate(answers) if isinstance(each, _Holding)}
    missing = [r for r in range(comm.size) if r not in holdings]
    if missing:
        raise MissingRankError(
            f"{here}: reconcile() was waiting for {say_ranks(missing)}, and changed nothing here. "
            "Call it on every rank of the group; if one is slow, raise timeout_s."
        )
    told = {r: each.fields() for r, each in holdings.items()}
    differing = differences(told)
    unfit = "; ".join(f"{field}: {differing[field]}" for field in _NO_STATE if field in differing)
    if unfit:
        raise StateError(
            f"{here}: no rank's state fits all others, and nothing was changed. {unfit}. Build the "
            "scalers alike on every rank, reconcile them in the same order, and where a policy's "
            "numbers were loaded, load the same state_dict."
        )
    chosen = min(holdings, key=lambda r: (holdings[r].state["scale"], r))
    # Also where nothing differs: the ranks may still remember different verdicts.
    scaler.load_state_dict(holdings[chosen].state)
    if differing:
        what = "; ".join(f"{field}: {values}" for field, values in differing.items())
        warn_caller(
            f"{here}: the ranks held different states, and all have taken over that of rank "
            f"{chosen}, whose scale is the smallest. {what}."
        )
    return bool(differing)
