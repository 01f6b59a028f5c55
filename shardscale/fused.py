"""Optimizers that take the flag and the scale themselves, and skip without the host knowing."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["can_fold", "is_fused", "leaves_scaled", "step_fused", "takes_grad_scaler"]


def is_fused(optimizer: Any) -> bool:
    """Whether the optimizer reads ``grad_scale`` and ``found_inf`` in its own step."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def leaves_scaled(optimizer: Any) -> bool:
    """Whether its gradients are judged only, because its own kernel divides them by the scale."""
    return is_fused(optimizer) and not getattr(optimizer, "_is_gated", False)


def can_fold(optimizer: Any) -> bool:
    """Whether its kernel can clip, because we tell it what to divide the gradients by."""
    return leaves_scaled(optimizer) and not takes_grad_scaler(optimizer)


def takes_grad_scaler(optimizer: Any) -> bool:
    """Whether it is of the older kind that takes the scaler itself: ``step(grad_scaler=...)``."""
    if not is_fused(optimizer):
        return False
    step = optimizer.step
    return _names_grad_scaler(getattr(step, "__func__", step))


def step_fused(
    optimizer: Any,
    grad_scale: Tensor | None,
    found_inf: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Call ``optimizer.step`` with the agreed flag; it is called on a skip too.

    Args:
        optimizer: One for which :func:`is_fused` holds.
        grad_scale: () float32, what the gradients are to be divided by, times the optimizer's own
            ``grad_scale`` if it has one. None: they are unscaled, and only its own counts.
        found_inf: () float32, exactly 0.0 or 1.0.
        args: For ``optimizer.step``.
        kwargs: For ``optimizer.step``.

    Sync: none, but for the first step of an SGD with momentum.
    """
    own = getattr(optimizer, "grad_scale", None)
    if grad_scale is not None and own is not None:
        grad_scale = grad_scale * own
    without_momentum = _params_without_momentum(optimizer)
    grad_scale = own if grad_scale is None else grad_scale
    if not found_inf.is_cpu and any(p.is_cpu for g in optimizer.param_groups for p in g["params"]):
        # torch's fused step sends them to its parameters' device without blocking, and the kernel
        # for the CPU would read memory that has not arrived.
        found_inf = found_inf.to("cpu")
        grad_scale = None if grad_scale is None else grad_scale.to("cpu")
    optimizer.grad_scale = grad_scale
    optimizer.found_inf = found_inf
    try:
        returned = optimizer.step(*args, **kwargs)
    finally:
        for name in ("grad_scale", "found_inf"):
            if hasattr(optimizer, name):  # a step that raised may have taken them off already
                delattr(optimizer, name)
    # torch's fused SGD allocates the momentum buffer before its kernel finds out that the step is
    # skipped. What it then leaves is uninitialised memory that the next step takes for momentum.
    if without_momentum and found_inf.item():
        for param in without_momentum:
            optimizer.state[param].pop("momentum_buffer", None)
            if not optimizer.state[param]:
                del optimizer.state[param]
    return returned


def _params_without_momentum(optimizer: Any) -> list[Tensor]:
    if not isinstance(optimizer, torch.optim.SGD) or not leaves_scaled(optimizer):
        return []
    return [
        param
        for group in optimizer.param_groups
        if group["momentum"]
        for param in group["params"]
        if param.grad is not None and optimizer.state[param].get("momentum_buffer") is None
    ]


@functools.lru_cache(maxsize=32)
def _names_grad_scaler(step: Callable[..., Any]) -> bool:
    return "grad_scaler" in inspect.signature(step).parameters
