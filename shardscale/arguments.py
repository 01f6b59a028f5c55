"""What the scaler's arguments may be."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shardscale.caller import warn_caller
from shardscale.errors import ConfigError

__all__ = ["as_max_norm", "as_number", "is_usable", "require_device_type"]


def is_usable(device: str) -> bool:
    """Whether a scaler for ``device`` can be enabled; warns as torch does if it cannot."""
    if device != "cuda" or not torch.cuda.amp.common.amp_definitely_not_available():
        return True
    warn_caller(
        "torch.cuda.amp.GradScaler is enabled, but CUDA is not available.  Disabling. "
        'A disabled scaler neither scales nor agrees. For training on the CPU pass device="cpu".',
    )
    return False


def require_device_type(device: str) -> None:
    """Refuse a type of device that torch does not know.

    Raises:
        ConfigError: it is none.
    """
    try:
        torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"device is {device!r}, but must be a type of device that torch knows, such as "
            '"cuda" or "cpu".'
        ) from error


def as_number(new_scale: float | Tensor) -> float:
    """The new scale as a Python number, from a number or a tensor of one element.

    Raises:
        ConfigError: it is neither.

    Sync: reads a tensor.
    """
    if isinstance(new_scale, Tensor):
        if new_scale.numel() != 1 or new_scale.requires_grad:
            raise ConfigError(
                "new_scale should be a float or a 1-element torch.cuda.FloatTensor or "
                "torch.FloatTensor with requires_grad=False; "
                f"found shape {tuple(new_scale.shape)}, requires_grad={new_scale.requires_grad}."
            )
        return float(new_scale.item())
    if isinstance(new_scale, bool) or not isinstance(new_scale, int | float):
        raise ConfigError(f"new_scale is {new_scale!r}, but must be a number or a tensor of one.")
    return float(new_scale)


def as_max_norm(max_norm: float | Tensor, device: torch.device) -> float | Tensor:
    """The largest norm as a number, or as a tensor, () float32, where ``device`` can look at it.

    Raises:
        ConfigError: it is negative, NaN, or a tensor of several elements.

    Sync: reads a tensor that is on another device.
    """
    if isinstance(max_norm, Tensor):
        if max_norm.numel() != 1 or max_norm.requires_grad:
            raise ConfigError(
                "max_norm must be a number or a tensor of one element without requires_grad; found "
                f"shape {tuple(max_norm.shape)}, requires_grad={max_norm.requires_grad}."
            )
        if device.type != "cpu" and max_norm.device == device and not max_norm.is_complex():
            return max_norm.reshape(()).float()
        max_norm = max_norm.item()
    try:
        number = float(max_norm)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(max_norm, str) or not number >= 0:
        raise ConfigError(f"max_norm is {max_norm!r}, but must be a number that is not negative.")
    return number
