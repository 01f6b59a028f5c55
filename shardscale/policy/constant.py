"""A scale that never moves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shardscale.policy.base import first_state
from shardscale.records import ScaleState

__all__ = ["ConstantScale"]


@dataclass(frozen=True)
class ConstantScale:
    """Keep the scale fixed; bad steps are still skipped.

    For bfloat16 (scale 1 makes the scaler a guard against Inf and NaN) and for finding out whether
    a moving scale is to blame.

    >>> import torch
    >>> policy = ConstantScale()
    >>> state = policy.init(1024.0, "cpu")
    >>> policy.next_state(state, torch.tensor(1.0)).scale.item()
    1024.0
    """

    def init(self, init_scale: float, device: torch.device | str) -> ScaleState:
        """The state with this scale, () float32.

        Raises:
            ConfigError: the scale is not a finite positive number.
        """
        return first_state(init_scale, device)

    def next_state(self, state: ScaleState, found_inf: Tensor) -> ScaleState:
        """The same scale again, whatever ``found_inf`` () float32 says.

        Sync: none.
        """
        del found_inf
        return state
