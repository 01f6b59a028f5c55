"""The layout of a saved state: torch's five keys, and ours beside them.

Ours are one value, pairs of names and values, and no dictionary. torch.distributed.checkpoint saves
each entry of a dictionary by itself, and looks for those that the loading scaler would save: with a
state of another policy, or of another version, it would stop before this module could say why.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from shardscale.caller import warn_caller
from shardscale.errors import ConfigError, StateError
from shardscale.policy import DynamicScale, ScalePolicy
from shardscale.policy.base import as_float32
from shardscale.records import ScaleState
from shardscale.saved_values import (
    COUNT,
    CURE,
    INTEGER,
    LARGE_COUNT,
    NAME,
    NUMBER,
    PAIRS,
    SCALE,
    as_plain,
    read,
    shown,
    whole,
)

__all__ = ["Loaded", "from_state_dict", "to_state_dict"]

_VERSION = 2  # 1 had dictionaries

# What a policy's numbers may be in detail, the policy itself knows.
_TORCHS = {
    "scale": SCALE,
    "growth_factor": NUMBER,
    "backoff_factor": NUMBER,
    "growth_interval": INTEGER,
    "_growth_tracker": COUNT,
}
_MEGATRONS = {
    "scale": SCALE,
    "growth_tracker": COUNT,
    "hysteresis_tracker": INTEGER,  # counts on below 0
}
_OURS = {
    "policy": NAME,
    "policy_fields": PAIRS,
    "num_updates": LARGE_COUNT,
    "num_skipped": LARGE_COUNT,
}


class Loaded(NamedTuple):
    """What a state dict holds."""

    policy: ScalePolicy
    state: ScaleState  # on the CPU
    num_updates: int
    num_skipped: int


def to_state_dict(
    policy: ScalePolicy, state: ScaleState, num_updates: int, num_skipped: int
) -> dict[str, Any]:
    """The state as plain floats, ints and strings; ``torch.load(weights_only=True)`` takes it.

    Sync: reads the scale and the trackers.
    """
    ours = {
        "version": _VERSION,
        "policy": type(policy).__name__,
        "policy_fields": tuple(_fields_of(policy).items()),
        "hysteresis_tracker": int(state.hysteresis_tracker.item()),
        "num_updates": num_updates,
        "num_skipped": num_skipped,
    }
    return _in_torchs_keys(
        policy, state.scale.item(), int(state.growth_tracker.item()), tuple(ours.items())
    )


def from_state_dict(saved: Mapping[str, Any], policy: ScalePolicy, where: str = "") -> Loaded:
    """Read a state of ours, of torch's or of Megatron-Core's; nothing is changed.

    Args:
        saved: What ``state_dict`` of this class, of one of torch's or of Megatron-Core's
            ``DynamicGradScaler`` gave. A number may be NumPy's, or a tensor of one element.
        policy: The policy of the scaler that loads; its numbers are replaced by the saved ones.
        where: Such as ``rank 1 of 4``, for the errors.

    Raises:
        StateError: the state is no dictionary, empty, of an unknown layout, of a newer version, or
            of another policy.
        KeyError: one of torch's keys is missing; a StateError, too.
        ConfigError: a saved value is not of its kind, or out of range.

    Collective: none.
    """
    try:
        return _loaded(saved, policy)
    except (ConfigError, StateError) as error:
        if where:  # at the end: where torch has the same mistake, its text comes first
            error.args = (f"{error} This is {where}.",)
        raise


def _loaded(saved: Mapping[str, Any], policy: ScalePolicy) -> Loaded:
    if not isinstance(saved, Mapping):
        raise StateError(f"the state dict is {shown(saved)}, but must be a dictionary. {CURE}")
    if len(saved) == 0:
        raise StateError(
            "The source state dict is empty, possibly because it was saved "
            "from a disabled instance of GradScaler."
        )
    saved = _as_torchs(saved, policy)
    ours = _ours_of(saved, type(policy).__name__)
    policy = _with_saved_numbers(policy, saved, dict(ours.get("policy_fields", ())))
    state = policy.init(_clamped(saved["scale"], policy), "cpu")
    tracker = torch.tensor(saved["_growth_tracker"], dtype=torch.int32)
    if "hysteresis_tracker" in ours:
        most = getattr(policy, "hysteresis", 2**31 - 1)
        tolerated = read(ours, {"hysteresis_tracker": whole(0, most)})["hysteresis_tracker"]
        state = state._replace(hysteresis_tracker=torch.tensor(tolerated, dtype=torch.int32))
    return Loaded(
        policy,
        state._replace(growth_tracker=tracker),
        ours.get("num_updates", 0),
        ours.get("num_skipped", 0),
    )


def _in_torchs_keys(
    policy: ScalePolicy, scale: object, growth_tracker: object, ours: tuple[tuple[str, Any], ...]
) -> dict[str, Any]:
    return {
        "scale": scale,
        # torch has no policy that keeps the scale; growing by 1 does.
        "growth_factor": getattr(policy, "growth_factor", 1.0),
        "backoff_factor": getattr(policy, "backoff_factor", 1.0),
        "growth_interval": getattr(policy, "growth_interval", 2**31 - 1),
        "_growth_tracker": growth_tracker,
        "shardscale": ours,
    }


def _as_torchs(saved: Mapping[str, Any], policy: ScalePolicy) -> dict[str, Any]:
    """A state of any known layout in torch's keys, and ours as it was saved."""
    if any(key in saved for key in _TORCHS if key != "scale"):
        missing = [key for key in _TORCHS if key not in saved]
        if missing:
            raise _MissingKeyError(
                f"the state dict lacks {missing}; it has {_keys_of(saved)}. {CURE}"
            )
        return {**read(saved, _TORCHS), "shardscale": saved.get("shardscale", ())}
    if all(key in saved for key in _MEGATRONS):
        return _from_megatron(policy, **read(saved, _MEGATRONS))
    raise StateError(
        f"the state dict has the keys {_keys_of(saved)}, but a scaler's has torch's, "
        f"{[*_TORCHS]}, or Megatron-Core's, {[*_MEGATRONS]}. Pass what the scaler's own "
        "state_dict() gave; in a checkpoint of a whole job it lies below a key of its own."
    )


class _MissingKeyError(StateError, KeyError):
    """What torch raises for the same mistake, with a message that is no repr."""

    __str__ = Exception.__str__


def _from_megatron(
    policy: ScalePolicy, *, scale: float, growth_tracker: int, hysteresis_tracker: int
) -> dict[str, Any]:
    """Megatron-Core's state, a scale and two counts, in our layout.

    Factors, interval, hysteresis and smallest scale are no part of it; they stay the policy's.

    Source: ``DynamicGradScaler`` in megatron/core/optimizer/grad_scaler.py of Megatron-LM, read in
        November 2026. Its hysteresis tracker counts as ours, but on below 0.
    """
    most = getattr(policy, "hysteresis", None)
    if most is None:  # a policy that tolerates nothing has nothing to count
        return _in_torchs_keys(policy, scale, growth_tracker, ())
    if hysteresis_tracker > most:
        warn_caller(
            f"the state dict tolerates {hysteresis_tracker} more bad steps, but this scaler's "
            f"policy has hysteresis={most}, so {most} is taken. To go on as before, give the "
            "policy the hysteresis, factors and interval that the state was saved with.",
        )
    tolerated = min(max(hysteresis_tracker, 0), most)
    return _in_torchs_keys(policy, scale, growth_tracker, (("hysteresis_tracker", tolerated),))


def _ours_of(saved: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """What is ours in a state in torch's keys, for a policy of that class.

    The hysteresis tracker is left as it was saved: its range is the policy's to say.
    """
    ours = dict(read(saved, {"shardscale": PAIRS})["shardscale"])
    # Before all else: another version's values may be of other kinds.
    version = read(ours, {"version": whole(1, 2**31 - 1)}).get("version", _VERSION)
    if version > _VERSION:
        raise StateError(
            f"the state dict has layout version {version}, but this shardscale reads up to "
            f"{_VERSION}. Install the version that saved it, or a newer one."
        )
    ours |= read(ours, _OURS)
    if ours.get("policy", kind) != kind:
        raise StateError(
            f"the state dict was saved with policy {ours['policy']}, but this scaler has {kind}. "
            f"Make the scaler with policy={ours['policy']}(...), or drop the key 'shardscale' to "
            "load it as one of torch's states."
        )
    return ours


def _with_saved_numbers(
    policy: ScalePolicy, saved: Mapping[str, Any], fields: Mapping[str, Any]
) -> ScalePolicy:
    if not _is_dataclass(policy):
        return policy
    numbers = {
        name: as_plain(value) if isinstance(getattr(policy, name, None), int | float) else value
        for name, value in fields.items()
    }
    if isinstance(policy, DynamicScale) and saved["growth_factor"] != 1.0:
        for name in ("growth_factor", "backoff_factor", "growth_interval"):
            numbers[name] = saved[name]
    if not numbers:
        return policy
    try:
        changed: ScalePolicy = dataclasses.replace(policy, **numbers)  # type: ignore[type-var]
    except Exception as error:  # whatever a policy, also one of the caller's own, says to them
        raise ConfigError(
            f"the state dict holds {shown(numbers)}, of which no {type(policy).__name__} can be "
            f"made: {str(error).rstrip('.')}. {CURE}"
        ) from error
    return changed


def _clamped(scale: float, policy: ScalePolicy) -> float:
    low = getattr(policy, "min_scale", 0.0)
    high = getattr(policy, "max_scale", math.inf)
    scale = as_float32(scale)
    inside = min(max(scale, low), high)
    if inside != scale:
        warn_caller(
            f"the state dict holds the scale {scale:g}, which lies outside the policy's range "
            f"[{low:g}, {high:g}]; {inside:g} is taken instead.",
        )
    return float(inside)


def _keys_of(saved: Mapping[Any, Any]) -> str:
    return shown(sorted(key if isinstance(key, str) else shown(key) for key in saved))


def _fields_of(policy: Any) -> dict[str, Any]:
    return dataclasses.asdict(policy) if _is_dataclass(policy) else {}


def _is_dataclass(policy: object) -> bool:
    return dataclasses.is_dataclass(policy) and not isinstance(policy, type)
