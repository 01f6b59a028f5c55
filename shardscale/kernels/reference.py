"""The kernels one tensor at a time, in the plainest words: the oracle of every kernel test."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["check_", "scale_", "unscale_"]


def unscale_(
    grads: Sequence[Tensor],
    inv_scale: Tensor,
    found_inf: Tensor,
    sum_squares: Tensor | None = None,
) -> None:
    """Multiply each gradient by ``inv_scale`` in place, looking for Inf and NaN on the way.

    Args:
        grads: Real dense tensors of any shape, device and floating dtype.
        inv_scale: () float32. Exactly 1 leaves every bit alone.
        found_inf: () float32; becomes 1.0 if an element is not finite, is left alone otherwise. The
            scaled input is judged; where ``inv_scale`` exceeds 1, the product too. An
            ``inv_scale`` of 0 or that is not finite counts as found: it would make every step zero.
        sum_squares: () float64; the sum of the squared products, rounded as stored, is added to it.
    """
    factor = inv_scale.item()
    if not 0 < factor < float("inf"):
        found_inf.fill_(1.0)
    for g in grads:
        if not g.isfinite().all():
            found_inf.fill_(1.0)
        if factor != 1:
            wide = torch.float64 if g.dtype == torch.float64 else torch.float32
            g.copy_(g.to(wide) * factor)
        if factor > 1 and not g.isfinite().all():
            found_inf.fill_(1.0)
        if sum_squares is not None:
            sum_squares += g.double().square().sum().to(sum_squares.device)


def check_(grads: Sequence[Tensor], inv_scale: Tensor, found_inf: Tensor) -> None:
    """Judge gradients as :func:`unscale_` does, on copies, so that they stay scaled."""
    unscale_([g.clone() for g in grads], inv_scale, found_inf)


def scale_(grads: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply each gradient by ``factor``, () float32, in place; 1 leaves every bit alone."""
    if factor.item() != 1:
        for g in grads:
            wide = torch.float64 if g.dtype == torch.float64 else torch.float32
            g.copy_(g.to(wide) * factor.item())
