"""torch's getters and setters of the numbers by which the scale moves."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from shardscale.errors import ConfigError
from shardscale.policy import ScalePolicy

__all__ = ["Factors"]


class Factors:
    """Mixed into the scaler; the numbers are its policy's. A disabled one changes nothing."""

    if TYPE_CHECKING:
        _enabled: bool
        _policy: ScalePolicy

    def get_growth_factor(self) -> float:
        """What the scale grows by; 1.0 where the policy has no growth."""
        return float(getattr(self._policy, "growth_factor", 1.0))

    def set_growth_factor(self, new_factor: float) -> None:
        """Change it, on all ranks alike.

        Raises:
            ConfigError: out of range, or the policy has no such number.
        """
        self._change_policy(growth_factor=new_factor)

    def get_backoff_factor(self) -> float:
        """What the scale is reduced by; 1.0 where the policy has no backoff."""
        return float(getattr(self._policy, "backoff_factor", 1.0))

    def set_backoff_factor(self, new_factor: float) -> None:
        """Change it, on all ranks alike.

        Raises:
            ConfigError: out of range, or the policy has no such number.
        """
        self._change_policy(backoff_factor=new_factor)

    def get_growth_interval(self) -> int:
        """Good steps in a row before the scale grows; 2^31 - 1 where the policy has no growth."""
        return int(getattr(self._policy, "growth_interval", 2**31 - 1))

    def set_growth_interval(self, new_interval: int) -> None:
        """Change it, on all ranks alike.

        Raises:
            ConfigError: out of range, or the policy has no such number.
        """
        self._change_policy(growth_interval=new_interval)

    def _change_policy(self, **changes: Any) -> None:
        if not self._enabled:
            return
        name = next(iter(changes))
        if not hasattr(self._policy, name):
            raise ConfigError(
                f"{name} cannot be set: policy {type(self._policy).__name__} has no such number."
            )
        self._policy = dataclasses.replace(self._policy, **changes)  # type: ignore[type-var]
