"""The kernels by torch's multi-tensor operators: for every device and layout, in more passes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from operator import attrgetter

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

__all__ = ["check_", "count", "scale_", "unscale_"]

# Elements squared at a time on the CPU: a quarter of a megabyte of float64, which stays in the
# cache, and no more than torch works on without waking its other threads.
_CHUNK = 2**15
_DTYPE = attrgetter("dtype")


def unscale_(
    grads: Sequence[Tensor],
    inv_scale: Tensor,
    found_inf: Tensor,
    sum_squares: Tensor | None = None,
) -> None:
    """Multiply each gradient by ``inv_scale`` in place, looking for Inf and NaN on the way.

    Args:
        grads: Real strided tensors of any shape and floating dtype, all on the device of the rest.
        inv_scale: () float32. Exactly 1 leaves every bit alone.
        found_inf: () float32; becomes 1.0 if an element is not finite, is left alone otherwise. The
            scaled input is judged; where ``inv_scale`` exceeds 1, the product too. An
            ``inv_scale`` of 0 or that is not finite counts as found: it would make every step zero.
        sum_squares: () float64; the sum of the squared products, rounded as stored, is added to it.

    Sync: none on an accelerator.
    """
    _refuse_useless(inv_scale, found_inf)
    for group in _of_one_dtype(grads):
        if _amp_op_knows(group[0]):
            _amp_op_(group, found_inf, inv_scale)
            # On the host one look saves the pass that judges the product; a device is not asked.
            if not inv_scale.is_cpu or inv_scale.item() > 1:
                _judge_largest(group, found_inf, torch.ones_like(inv_scale))
        else:
            _judge_largest(group, found_inf, inv_scale)
            _multiply_(group, inv_scale)
        if sum_squares is not None:
            sum_squares += _sum_squares(group)


def check_(
    grads: Sequence[Tensor],
    inv_scale: Tensor,
    found_inf: Tensor,
    sum_squares: Tensor | None = None,
) -> None:
    """Judge gradients as :func:`unscale_` does, but leave them scaled.

    Args:
        grads: As there.
        inv_scale: () float32, what they will be multiplied by.
        found_inf: () float32; becomes 1.0 if an element, or its product, is not finite.
        sum_squares: () float64; the sum of the squared products, not rounded, is added to it.

    Sync: none on an accelerator.
    """
    _refuse_useless(inv_scale, found_inf)
    for group in _of_one_dtype(grads):
        if inv_scale.is_cpu and inv_scale.item() <= 1:
            _amp_op_(group, found_inf, torch.ones_like(inv_scale))  # only NaN payloads change
        else:
            _judge_largest(group, found_inf, inv_scale)
        if sum_squares is not None:
            sum_squares += _sum_squares(group, inv_scale.double())


def scale_(grads: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply each gradient by ``factor``, () float32, in place; exactly 1 leaves every bit alone.

    Sync: none on an accelerator.
    """
    if factor.is_cpu and factor.item() == 1:
        return
    for group in _of_one_dtype(grads):
        if _amp_op_knows(group[0]):
            _amp_op_(group, torch.zeros_like(factor), factor)
        else:
            _multiply_(group, factor)


def count(grads: Sequence[Tensor]) -> Tensor:
    """What is in each gradient: (n, 3) float64 there; Infs, NaNs, largest magnitude.

    The magnitude is NaN where there is a NaN, and 0 where there is no element.
    """
    rows = []
    for g in grads:
        largest = torch.linalg.vector_norm(g, float("inf")) if g.numel() else g.new_zeros(())
        rows.append(torch.stack([g.isinf().sum(), g.isnan().sum(), largest.double()]))
    return torch.stack(rows) if rows else torch.zeros((0, 3), dtype=torch.float64, device="cpu")


def _of_one_dtype(grads: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    dtypes = dict.fromkeys(map(_DTYPE, grads))  # in their order, so that sums are reproducible
    for dtype in dtypes:
        yield list(grads) if len(dtypes) == 1 else [g for g in grads if g.dtype == dtype]


def _amp_op_(group: list[Tensor], found_inf: Tensor, inv_scale: Tensor) -> None:
    torch._amp_foreach_non_finite_check_and_unscale_(group, found_inf, inv_scale)


def _amp_op_knows(grad: Tensor) -> bool:
    # On CUDA the operator refuses bfloat16, and judges float64 after rounding it to float32.
    return grad.is_cpu or grad.dtype in (torch.float32, torch.float16)


def _refuse_useless(inv_scale: Tensor, found_inf: Tensor) -> None:
    if inv_scale.is_cpu:
        if not 0 < inv_scale.item() < math.inf:
            found_inf.fill_(1.0)
        return
    useful = (inv_scale > 0) & (inv_scale < math.inf)
    found_inf.copy_(torch.where(useful, found_inf, 1.0))


def _judge_largest(group: list[Tensor], found_inf: Tensor, inv_scale: Tensor) -> None:
    """Judge a group by each tensor's largest magnitude, which its dtype holds; NaN prevails."""
    filled = [g for g in group if g.numel()]
    if not filled:
        return
    scaled = torch.stack(torch._foreach_norm(filled, float("inf")))
    product = (scaled.double() * inv_scale.double()).to(scaled.dtype)
    bad = ~(scaled.isfinite() & product.isfinite()).all()
    found_inf.copy_(torch.maximum(found_inf, bad.float()))


def _multiply_(group: list[Tensor], factor: Tensor) -> None:
    if group[0].dtype == torch.float64:
        torch._foreach_mul_(group, factor.double())
        return
    # A 0-dim factor would be rounded to the gradient's dtype first; a 1-dim one is not.
    for g in group:
        flat = g.view(1) if g.dim() == 0 else g
        torch.mul(flat, factor.view(1), out=flat)


def _sum_squares(group: list[Tensor], factor: Tensor | float = 1.0) -> Tensor:
    """The sum of (factor times gradient) squared; a factor is () float64."""
    if group[0].device.type == "cpu":
        return _sum_squares_on_host(group, factor)
    filled = [g for g in group if g.numel()]
    if not filled:
        return torch.zeros((), dtype=torch.float64, device=group[0].device)
    norms = torch._foreach_norm(filled, 2, dtype=torch.float64)
    return (torch.stack(norms) * factor).square().sum()


def _sum_squares_on_host(group: list[Tensor], factor: Tensor | float = 1.0) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    for batch in _batches(group):
        flat = batch[0].flatten() if len(batch) == 1 else _flatten_dense_tensors(batch)
        # float64 holds the square of every float32, and its sums are exact enough for any number.
        wide = flat.double() if isinstance(factor, float) else flat.double() * factor
        total += torch.linalg.vector_norm(wide).square()
    return total


def _batches(group: list[Tensor]) -> Iterator[list[Tensor]]:
    """All elements of all gradients, at most ``_CHUNK`` at a time."""
    batch: list[Tensor] = []
    room = _CHUNK
    for g, numel in zip(group, map(Tensor.numel, group), strict=True):
        if numel > room and batch:
            yield batch
            batch, room = [], _CHUNK
        if numel > _CHUNK:
            yield from ([piece] for piece in _pieces(g))
        else:
            batch.append(g)
            room -= numel
    if batch:
        yield batch


def _pieces(g: Tensor) -> Iterator[Tensor]:
    """All elements of a gradient as views of at most ``_CHUNK``: none is copied whole."""
    if g.numel() <= _CHUNK:
        yield g
        return
    # A sum knows no order: a dense tensor of any permutation is read as its memory lies.
    g = g.permute(sorted(range(g.dim()), key=g.stride, reverse=True))
    if g.is_contiguous():
        yield from g.view(-1).split(_CHUNK)
        return
    rows = max(1, _CHUNK // max(1, g[0].numel()))
    for block in g.split(rows):
        yield from [block] if block.numel() <= _CHUNK else _pieces(block[0])
