"""An oracle in a scaler's place: it scales nothing, and is told what each step comes to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["told"]


def told(factors: Sequence[float | None]) -> type:
    """A class that a loop can use as its scaler.

    Args:
        factors: For each call of ``step`` what the optimizer sees: its gradients times this; None
            for a step that is skipped. 1 is what a right scaler does; another factor describes one
            that unscales wrongly.
    """
    remaining = iter(factors)

    class Told:
        def __init__(self, device: str, init_scale: float, growth_interval: int) -> None:
            del device, init_scale, growth_interval

        def scale(self, loss: Any) -> Any:
            return loss

        def unscale_(self, optimizer: Any) -> None:
            del optimizer

        @torch.no_grad()
        def step(self, optimizer: Any, *args: Any) -> Any:
            factor = next(remaining)
            if factor is None:
                return None
            for group in optimizer.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.mul_(factor)
            return optimizer.step(*args)

        def update(self) -> None: ...

        def get_scale(self) -> float:
            return 1.0

        def _found_inf_per_device(self, optimizer: Any) -> dict[Any, Any]:
            del optimizer
            return {}

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            del state

    return Told
