"""Which kernels gradients are given to: C on the host, Triton on a GPU, else torch's operators."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

# Where a mode watches operators (make_fx, fake tensors, counters of bytes), it is shown ours.
# torch.autograd.graph.increment_version takes longer to ask what a list is than to do this.
from torch._C import _increment_version, _len_torch_dispatch_stack
from torch.compiler import is_compiling

from shardscale.caller import warn_caller
from shardscale.errors import LayoutError
from shardscale.kernels import foreach, native, triton

__all__ = [
    "backend_name",
    "check_",
    "check_now_",
    "count",
    "is_dense",
    "scale_",
    "scale_now_",
    "unscale_",
    "unscale_now_",
]

_ADDRESSED = ("cpu", "cuda")
_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def unscale_(
    grads: Sequence[Tensor],
    inv_scale: Tensor,
    found_inf: Tensor,
    sum_squares: Tensor | None = None,
) -> None:
    """Multiply each gradient by ``inv_scale`` in place, looking for Inf and NaN on the way.

    Args:
        grads: Real strided tensors of any shape, device and floating dtype, whose elements do not
            share memory.
        inv_scale: () float32. Exactly 1 leaves every bit alone.
        found_inf: () float32; becomes 1.0 if an element is not finite, is left alone otherwise. The
            scaled input is judged; where ``inv_scale`` exceeds 1, the product too. An
            ``inv_scale`` of 0 or that is not finite counts as found: it would make every step zero.
        sum_squares: () float64; the sum of the squared products, rounded as stored, is added to it.

    Sync: none on an accelerator.
    """
    if is_compiling() or _len_torch_dispatch_stack():
        torch.ops.shardscale.unscale_(grads, inv_scale, found_inf, sum_squares)
    else:
        unscale_now_(grads, inv_scale, found_inf, sum_squares)


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
        sum_squares: () float64; the sum of the squared products is added to it. They are float32
            products, float64 ones for float64, and not rounded to what would be stored.

    Sync: none on an accelerator.
    """
    if is_compiling() or _len_torch_dispatch_stack():
        torch.ops.shardscale.check_(grads, inv_scale, found_inf, sum_squares)
    else:
        check_now_(grads, inv_scale, found_inf, sum_squares)


def scale_(grads: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply each gradient by ``factor``, () float32, in place.

    Exactly 1 leaves every bit alone, and no gradient is read.

    Sync: none on an accelerator.
    """
    if is_compiling() or _len_torch_dispatch_stack():
        torch.ops.shardscale.scale_(grads, factor)
    else:
        scale_now_(grads, factor)


def unscale_now_(
    grads: Sequence[Tensor],
    inv_scale: Tensor,
    found_inf: Tensor,
    sum_squares: Tensor | None = None,
) -> None:
    """:func:`unscale_` past all that watches operators: what the operator of that name does."""
    if not native.unscale_(grads, inv_scale, found_inf, sum_squares):
        _on_each_device("unscale_", grads, inv_scale, found_inf, sum_squares)
    _increment_version(grads)


def check_now_(
    grads: Sequence[Tensor],
    inv_scale: Tensor,
    found_inf: Tensor,
    sum_squares: Tensor | None = None,
) -> None:
    """:func:`check_` past all that watches operators."""
    if not native.check_(grads, inv_scale, found_inf, sum_squares):
        _on_each_device("check_", grads, inv_scale, found_inf, sum_squares)


def scale_now_(grads: Sequence[Tensor], factor: Tensor) -> None:
    """:func:`scale_` past all that watches operators."""
    if factor.is_cpu and factor.item() == 1:
        return
    if not native.scale_(grads, factor):
        for backend, device, group in _groups(grads):
            local = factor.to(device, non_blocking=device.type != "cpu")
            if backend.scale_(group, local) is False:
                foreach.scale_(group, local)
    _increment_version(grads)


def count(grads: Sequence[Tensor]) -> Tensor:
    """What is in each gradient: (n, 3) float64 on the CPU; Infs, NaNs, largest magnitude.

    The magnitude is NaN where there is a NaN, and 0 where there is no element.

    Sync: one read for each device.
    """
    rows: dict[int, Tensor] = {}
    for backend, _, group in _groups(grads):
        counts = backend.count(group)
        if counts is None:
            counts = foreach.count(group)
        rows.update(zip(map(id, group), counts.cpu(), strict=True))
    if not rows:
        return torch.zeros((0, 3), dtype=torch.float64, device="cpu")
    return torch.stack([rows[id(g)] for g in grads])


def backend_name(device: torch.device) -> str:
    """What the kernels for dense gradients on a device are called: native, triton or foreach.

    Sync: on a GPU the first time, when a kernel is tried there.
    """
    return _backend_of(device).__name__.rsplit(".", 1)[-1]


def _on_each_device(
    kernel: str,
    grads: Sequence[Tensor],
    inv_scale: Tensor,
    found_inf: Tensor,
    sum_squares: Tensor | None,
) -> None:
    """Run a kernel of each group's backend, with a flag and a sum on the group's own device."""
    for backend, device, group in _groups(grads) if grads else [(foreach, found_inf.device, [])]:
        factor = inv_scale.to(device, non_blocking=device.type != "cpu")
        flag, squares = found_inf, sum_squares
        # Neither torch's default dtype nor its default device may decide what a new tensor is.
        if device != found_inf.device:
            flag = torch.zeros((), dtype=torch.float32, device=device)
        if sum_squares is not None and device != sum_squares.device:
            squares = torch.zeros((), dtype=torch.float64, device=device)
        if getattr(backend, kernel)(group, factor, flag, squares) is False:
            getattr(foreach, kernel)(group, factor, flag, squares)
        if flag is not found_inf:
            found_inf.copy_(torch.maximum(found_inf, flag.to(found_inf.device)))
        if sum_squares is not None and squares is not None and squares is not sum_squares:
            sum_squares += squares.to(sum_squares.device)


def _groups(grads: Sequence[Tensor]) -> Iterator[tuple[ModuleType, torch.device, list[Tensor]]]:
    """Gradients of one device that go to one backend.

    Those with gaps, and tensors of a class of their own, go to torch's operators.
    """
    if grads and native.survey(grads) is not None:
        yield _backend_of(grads[0].device), grads[0].device, list(grads)  # nothing to sort
        return
    groups: dict[tuple[ModuleType, torch.device], list[Tensor]] = {}
    for i, g in enumerate(grads):
        if type(g) is Tensor and g.device.type in _ADDRESSED and g.numel() and not g.data_ptr():
            raise LayoutError(
                f"gradient {i}, of shape {tuple(g.shape)}, has elements, but no memory: it was "
                "freed. Keep gradients until they are unscaled."
            )
        is_known = type(g) is Tensor and g.dtype in _DTYPES and is_dense(g)
        backend = _backend_of(g.device) if is_known else foreach
        groups.setdefault((backend, g.device), []).append(g)
    for (backend, device), group in groups.items():
        yield backend, device, group


def is_dense(grad: Tensor) -> bool:
    """Whether elements that do not share memory lie without gaps, in whatever order."""
    reach = sum((n - 1) * stride for n, stride in zip(grad.shape, grad.stride(), strict=True))
    return grad.numel() == 0 or reach + 1 == grad.numel()


@functools.cache
def _backend_of(device: torch.device) -> ModuleType:
    if device.type == "cpu":
        reason = native.why_not()
        backend: ModuleType = native
    elif device.type == "cuda":  # ROCm calls its devices so, too
        reason = triton.why_not(device)
        backend = triton
    else:
        return foreach
    if reason is None:
        return backend
    warn_caller(f"Gradients on {device} are unscaled by torch's own operators: {reason}")
    return foreach
