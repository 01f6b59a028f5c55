"""The contract of a scale policy."""

from __future__ import annotations

import math
import struct
from typing import Protocol

import torch
from torch import Tensor

from shardscale.errors import ConfigError
from shardscale.records import ScaleState

__all__ = ["LARGEST_SCALE", "SMALLEST_SCALE", "ScalePolicy", "as_float32", "first_state"]

# Below the smallest normal float32 the inverse overflows, and every later step would be skipped.
SMALLEST_SCALE = 2.0**-126
LARGEST_SCALE = torch.finfo(torch.float32).max


class ScalePolicy(Protocol):
    """Decides the next scale; an immutable value whose ``repr`` tells all of its numbers.

    All ranks must hold equal policies: the repr is part of the message in which ranks agree.
    """

    def init(self, init_scale: float, device: torch.device | str) -> ScaleState:
        """The first state, with this scale.

        Args:
            init_scale: The scale to begin with.
            device: Where the state's tensors are made.

        Raises:
            ConfigError: the scale is not finite, not positive or outside the policy's range.
        """
        ...

    def next_state(self, state: ScaleState, found_inf: Tensor) -> ScaleState:
        """The state after one iteration; new tensors, ``state`` is left alone.

        Must be a pure function, and branch-free: the tensors may live on a device and must not be
        read. The same state and flag must give the same bits on every rank.

        Args:
            state: The state that the iteration ran with.
            found_inf: () float32, 1.0 if any step of the iteration was bad, else 0.0.
        """
        ...


def as_float32(number: float) -> float:
    """The float32 nearest to it, which is what a scale can be; Inf beyond the largest."""
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise ConfigError(f"{number!r} is a {type(number).__name__}, but a scale is a number.")
    try:
        rounded: float = struct.unpack("f", struct.pack("f", number))[0]
    except OverflowError:
        return math.copysign(math.inf, number)
    return rounded


def first_state(
    init_scale: float,
    device: torch.device | str,
    hysteresis: int = 1,
    min_scale: float = SMALLEST_SCALE,
    max_scale: float = LARGEST_SCALE,
) -> ScaleState:
    """A state with this scale and fresh trackers.

    Raises:
        ConfigError: the scale is not finite, not positive or outside the range.
    """
    rounded = as_float32(init_scale)
    if not (math.isfinite(rounded) and min_scale <= rounded <= max_scale):
        raise ConfigError(
            f"the scale is {init_scale!r}, but must be a finite number in "
            f"[{min_scale:g}, {max_scale:g}]. To widen the range, pass a policy with other "
            "min_scale and max_scale."
        )
    return ScaleState(
        torch.tensor(rounded, dtype=torch.float32, device=device),
        torch.tensor(0, dtype=torch.int32, device=device),
        torch.tensor(hysteresis, dtype=torch.int32, device=device),
    )
