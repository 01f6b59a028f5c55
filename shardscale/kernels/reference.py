"""The kernels one tensor at a time, in the plainest words: the oracle of every kernel test."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["check_", "count", "scale_", "unscale_"]


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


def check_(
    grads: Sequence[Tensor],
    inv_scale: Tensor,
    found_inf: Tensor,
    sum_squares: Tensor | None = None,
) -> None:
    """Judge gradients as :func:`unscale_` does, on copies, so that they stay scaled.

    Args:
        grads: As there.
        inv_scale: () float32, what they will be multiplied by.
        found_inf: () float32; becomes 1.0 if an element, or its product as it would be stored, is
            not finite.
        sum_squares: () float64; the sum of the squared products is added to it. They are float32
            products, float64 ones for float64, and not rounded to what would be stored.
    """
    unscale_([g.clone() for g in grads], inv_scale, found_inf)
    if sum_squares is not None:
        for g in grads:
            wide = torch.float64 if g.dtype == torch.float64 else torch.float32
            product = g.to(wide) * inv_scale.item()
            sum_squares += product.double().square().sum().to(sum_squares.device)


def scale_(grads: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply each gradient by ``factor``, () float32, in place; 1 leaves every bit alone."""
    if factor.item() != 1:
        for g in grads:
            wide = torch.float64 if g.dtype == torch.float64 else torch.float32
            g.copy_(g.to(wide) * factor.item())


def count(grads: Sequence[Tensor]) -> Tensor:
    """What is in each gradient: (n, 3) float64 on the CPU; Infs, NaNs, largest magnitude.

    The magnitude is NaN where there is a NaN, and 0 where there is no element.

    Sync: reads the gradients.
    """
    rows = [
        (g.isinf().sum().item(), g.isnan().sum().item(), g.double().abs().max().item())
        if g.numel()
        else (0, 0, 0.0)
        for g in grads
    ]
    return torch.tensor(rows, dtype=torch.float64, device="cpu").view(-1, 3)
