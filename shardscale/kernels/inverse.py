"""The factor that undoes the scale."""

from __future__ import annotations

from torch import Tensor

__all__ = ["inverse_scale"]


def inverse_scale(scale: Tensor) -> Tensor:
    """``1 / scale``, () float32: the float64 reciprocal rounded to float32.

    Where a device has no float64, float32's own reciprocal; for powers of two they are the same.

    Source: ``torch.amp.GradScaler.unscale_``, whose bits these are.
    """
    if scale.device.type == "mps":
        return scale.reciprocal()
    return scale.double().reciprocal().float()
