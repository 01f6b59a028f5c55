"""A scale that grows while all goes well and backs off when a step was bad."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from shardscale.errors import ConfigError
from shardscale.policy.base import LARGEST_SCALE, SMALLEST_SCALE, as_float32, first_state
from shardscale.records import ScaleState

__all__ = ["DynamicScale"]


@dataclass(frozen=True)
class DynamicScale:
    """Double after many good steps, halve after a bad one.

    .. code-block:: text

        bad step:   growth_tracker = 0;  hysteresis_tracker -= 1
                    if hysteresis_tracker <= 0:  scale = max(scale * backoff_factor, min_scale)
        good step:  growth_tracker += 1
                    if growth_tracker >= growth_interval:
                        growth_tracker = 0;  hysteresis_tracker = hysteresis
                        scale = min(scale * growth_factor, max_scale), unless that overflows

    With ``hysteresis=1`` and the default range this is torch's rule bit for bit, but for the floor
    and for ``>=`` where torch has ``==``: an interval lowered below the tracker still grows.

    Args:
        growth_factor: What the scale is multiplied by after ``growth_interval`` good steps; > 1.
        backoff_factor: What it is multiplied by after a bad step; in (0, 1).
        growth_interval: Good steps in a row before it grows; >= 1.
        hysteresis: Bad steps since the last growth before it backs off; >= 1.
        min_scale: The scale never falls below it; at least 2^-126, where its inverse is finite.
            Rounded to float32, as the scale is.
        max_scale: The scale never grows beyond it; rounded likewise.

    Raises:
        ConfigError: a number is outside its range.

    Source: torch's ``_amp_update_scale_``; hysteresis as in Megatron-Core's ``DynamicGradScaler``,
        where only growth refills it.

    >>> import torch
    >>> policy = DynamicScale(growth_interval=2)
    >>> state = policy.init(8.0, "cpu")
    >>> for found_inf in (0.0, 0.0, 1.0):
    ...     state = policy.next_state(state, torch.tensor(found_inf))
    ...     print(state.scale.item(), state.growth_tracker.item())
    8.0 1
    16.0 0
    8.0 0
    """

    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    hysteresis: int = 1
    min_scale: float = SMALLEST_SCALE
    max_scale: float = LARGEST_SCALE

    def __post_init__(self) -> None:
        for name in ("growth_factor", "backoff_factor"):
            value = getattr(self, name)
            _require(isinstance(value, int | float), f"{name} is {value!r}, but must be a number.")
            # All ranks compare the repr: 2, 2.0 and a NumPy 2.0 are one number.
            object.__setattr__(self, name, float(value))
        _require(
            1 < self.growth_factor < math.inf,
            f"growth_factor is {self.growth_factor!r}, but must be a finite number greater than 1. "
            "To keep the scale fixed, pass policy=ConstantScale().",
        )
        _require(
            0 < self.backoff_factor < 1,
            f"backoff_factor is {self.backoff_factor!r}, but must lie between 0 and 1. "
            "To keep the scale fixed, pass policy=ConstantScale().",
        )
        for name in ("growth_interval", "hysteresis"):
            value = getattr(self, name)
            _require(
                isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31,
                f"{name} is {value!r}, but must be an integer from 1 to 2147483647.",
            )
        for name in ("min_scale", "max_scale"):
            # A bound that no scale can be equal to would be passed by on either side.
            object.__setattr__(self, name, as_float32(getattr(self, name)))
        _require(
            SMALLEST_SCALE <= self.min_scale <= self.max_scale <= LARGEST_SCALE,
            f"the range of the scale is [{self.min_scale!r}, {self.max_scale!r}], but must be "
            f"ordered and lie within [{SMALLEST_SCALE:g}, {LARGEST_SCALE:g}].",
        )

    def init(self, init_scale: float, device: torch.device | str) -> ScaleState:
        """The first state: this scale, no good steps, all bad steps still tolerated.

        Raises:
            ConfigError: the scale is not finite or outside [min_scale, max_scale].
        """
        return first_state(init_scale, device, self.hysteresis, self.min_scale, self.max_scale)

    def next_state(self, state: ScaleState, found_inf: Tensor) -> ScaleState:
        """The state after an iteration whose flag is ``found_inf``, () float32.

        Sync: none.
        """
        overflowed = found_inf > 0
        clean_steps = torch.where(overflowed, 0, state.growth_tracker + 1)
        due = clean_steps >= self.growth_interval

        grown = _times(state.scale, self.growth_factor)
        # A scale that has itself overflowed could never back off again.
        grown = torch.where(grown < math.inf, grown.clamp(max=self.max_scale), state.scale)
        reduced = _times(state.scale, self.backoff_factor).clamp(self.min_scale, self.max_scale)

        backs_off, tolerated = self._spend(state.hysteresis_tracker, overflowed, due)
        scale = torch.where(due, grown, state.scale)
        return ScaleState(
            torch.where(backs_off, reduced, scale),
            torch.where(due, 0, clean_steps),
            tolerated,
        )

    def _spend(
        self, hysteresis_tracker: Tensor, overflowed: Tensor, due: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Whether the scale backs off, and the next hysteresis tracker."""
        if self.hysteresis == 1:  # every bad step backs off, there is nothing to count
            return overflowed, hysteresis_tracker
        left = torch.where(overflowed, hysteresis_tracker - 1, hysteresis_tracker)
        # A long run of bad steps must not count below what int32 holds.
        left = left.clamp(min=0)
        return overflowed & (left == 0), torch.where(due, self.hysteresis, left)


def _times(scale: Tensor, factor: float) -> Tensor:
    # torch multiplies in float64 and rounds once. For a factor that float32 holds, the float32
    # product is that same number, on devices without float64 too.
    if as_float32(factor) == factor:
        return scale * factor
    return (scale.double() * factor).float()


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ConfigError(otherwise)
