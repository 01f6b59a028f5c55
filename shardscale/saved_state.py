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
from torch import Tensor

from shardscale.caller import warn_caller
from shardscale.errors import ConfigError, StateError
from shardscale.policy import DynamicScale, ScalePolicy
from shardscale.policy.base import as_float32
from shardscale.records import ScaleState

__all__ = ["Loaded", "from_state_dict", "to_state_dict"]

_VERSION = 2  # 1 had dictionaries
_TORCH_KEYS = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")
_MEGATRON_KEYS = ("scale", "growth_tracker", "hysteresis_tracker")


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


def from_state_dict(saved: Mapping[str, Any], policy: ScalePolicy) -> Loaded:
    """Read a state of ours, of torch's or of Megatron-Core's; nothing is changed.

    Args:
        saved: What ``state_dict`` of this class, of one of torch's or of Megatron-Core's
            ``DynamicGradScaler`` gave.
        policy: The policy of the scaler that loads; its numbers are replaced by the saved ones.

    Raises:
        StateError: the state is empty, of an unknown layout, of a newer version, or of another
            policy.
        KeyError: one of torch's keys is missing.
        ConfigError: a saved number is out of range.
    """
    if len(saved) == 0:
        raise StateError(
            "The source state dict is empty, possibly because it was saved "
            "from a disabled instance of GradScaler."
        )
    saved = _as_torchs(saved, policy)
    ours = dict(saved.get("shardscale", ()))
    if ours.get("version", _VERSION) > _VERSION:
        raise StateError(
            f"the state dict has layout version {ours['version']}, but this shardscale reads up to "
            f"{_VERSION}. Install the version that saved it, or a newer one."
        )
    _require_same_kind(ours, policy)
    policy = _with_saved_numbers(policy, saved, dict(ours.get("policy_fields", ())))
    state = policy.init(_clamped(saved["scale"], policy), "cpu")
    tracker = torch.tensor(_as_count(saved["_growth_tracker"]), dtype=torch.int32)
    hysteresis = ours.get("hysteresis_tracker")
    if hysteresis is not None:
        state = state._replace(hysteresis_tracker=torch.tensor(hysteresis, dtype=torch.int32))
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


def _as_torchs(saved: Mapping[str, Any], policy: ScalePolicy) -> Mapping[str, Any]:
    if any(key in saved for key in _TORCH_KEYS[1:]):
        missing = [key for key in _TORCH_KEYS if key not in saved]
        if missing:
            raise KeyError(f"the state dict lacks {missing}; it has {sorted(saved)}")
        return saved
    if all(key in saved for key in _MEGATRON_KEYS):
        return _from_megatron(policy, *(saved[key] for key in _MEGATRON_KEYS))
    raise StateError(
        f"the state dict has the keys {sorted(map(str, saved))}, but a scaler's has torch's, "
        f"{[*_TORCH_KEYS]}, or Megatron-Core's, {[*_MEGATRON_KEYS]}. Pass what the scaler's own "
        "state_dict() gave; in a checkpoint of a whole job it lies below a key of its own."
    )


def _from_megatron(
    policy: ScalePolicy, scale: Any, growth_tracker: object, hysteresis_tracker: Any
) -> dict[str, Any]:
    """Megatron-Core's state, () or (1,) float32 and two ints, in our layout.

    Factors, interval, hysteresis and smallest scale are no part of it; they stay the policy's.

    Source: ``DynamicGradScaler`` in megatron/core/optimizer/grad_scaler.py of Megatron-LM, read in
        November 2026. Its hysteresis tracker counts as ours, but on below 0.
    """
    if isinstance(scale, Tensor) and scale.numel() == 1:
        scale = scale.item()
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


def _require_same_kind(ours: Mapping[str, Any], policy: ScalePolicy) -> None:
    kind = type(policy).__name__
    if ours.get("policy", kind) != kind:
        raise StateError(
            f"the state dict was saved with policy {ours['policy']}, but this scaler has {kind}. "
            f"Make the scaler with policy={ours['policy']}(...), or drop the key 'shardscale' to "
            "load it as one of torch's states."
        )


def _with_saved_numbers(
    policy: ScalePolicy, saved: Mapping[str, Any], fields: Mapping[str, Any]
) -> ScalePolicy:
    if isinstance(policy, DynamicScale) and saved["growth_factor"] != 1.0:
        numbers = {
            "growth_factor": saved["growth_factor"],
            "backoff_factor": saved["backoff_factor"],
            "growth_interval": saved["growth_interval"],
        }
        return dataclasses.replace(policy, **{**fields, **numbers})
    if _is_dataclass(policy) and fields:
        changed: ScalePolicy = dataclasses.replace(policy, **fields)  # type: ignore[type-var]
        return changed
    return policy


def _clamped(scale: float, policy: ScalePolicy) -> float:
    low = getattr(policy, "min_scale", 0.0)
    high = getattr(policy, "max_scale", math.inf)
    if not (isinstance(scale, int | float) and math.isfinite(scale) and scale > 0):
        raise ConfigError(
            f"the state dict holds the scale {scale!r}, but a scale must be finite and positive."
        )
    scale = as_float32(scale)
    inside = min(max(scale, low), high)
    if inside != scale:
        warn_caller(
            f"the state dict holds the scale {scale:g}, which lies outside the policy's range "
            f"[{low:g}, {high:g}]; {inside:g} is taken instead.",
        )
    return float(inside)


def _as_count(tracker: object) -> int:
    if not (isinstance(tracker, int) and 0 <= tracker < 2**31):
        raise ConfigError(
            f"the state dict holds the growth tracker {tracker!r}, but it must be an integer "
            "from 0 to 2147483647."
        )
    return tracker


def _fields_of(policy: Any) -> dict[str, Any]:
    return dataclasses.asdict(policy) if _is_dataclass(policy) else {}


def _is_dataclass(policy: object) -> bool:
    return dataclasses.is_dataclass(policy) and not isinstance(policy, type)
