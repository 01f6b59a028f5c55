"""The kernels in C for gradients on the host, where the extension could be built.

Each function takes all of a call or none of it: it answers ``False`` or ``None``, and has touched
nothing, if a tensor is not exactly a ``torch.Tensor``, not on the host, not dense or of another
dtype than float16, bfloat16, float32 and float64. ``_native.pyi`` describes them.

They work on memory behind torch's back: no dispatch mode sees them, and no version is counted up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

try:
    from shardscale.kernels.native import _native
except ImportError:  # no compiler was there when shardscale was installed
    _native = None  # type: ignore[assignment]

__all__ = [
    "Gathered",
    "Survey",
    "check_",
    "count",
    "gather",
    "scale_",
    "survey",
    "unscale_",
    "why_not",
]


class Survey(NamedTuple):
    """Where gradients lie, each field in their order."""

    addresses: bytes  # int64
    numels: bytes  # int64
    dtypes: bytes  # one each: float16 0, bfloat16 1, float32 2, float64 3


class Gathered(NamedTuple):
    """Gradients as they are found at their parameters."""

    params: list[Tensor]  # those that have one, in their order
    grads: list[Tensor]  # of each of these, its local part
    firsts: list[DTensor]  # of all that require a gradient, the first on each mesh


def unscale_(
    grads: Sequence[Tensor],
    inv_scale: Tensor,
    found_inf: Tensor,
    sum_squares: Tensor | None = None,
) -> bool:
    """``kernels.unscale_`` in one pass, by as many threads as torch has; whether it was done.

    The bits of the sum depend on the gradients alone, not on the threads or the processor.
    """
    return _IS_READY and _native.unscale_(
        grads, inv_scale, found_inf, sum_squares, torch.get_num_threads
    )


def check_(
    grads: Sequence[Tensor],
    inv_scale: Tensor,
    found_inf: Tensor,
    sum_squares: Tensor | None = None,
) -> bool:
    """``kernels.check_`` in one pass that only reads; whether it was done."""
    return _IS_READY and _native.check_(
        grads, inv_scale, found_inf, sum_squares, torch.get_num_threads
    )


def scale_(grads: Sequence[Tensor], factor: Tensor) -> bool:
    """``kernels.scale_`` in one pass, in none if the factor is 1; whether it was done."""
    return _IS_READY and _native.scale_(grads, factor, torch.get_num_threads)


def count(grads: Sequence[Tensor]) -> Tensor | None:
    """``kernels.count``; None of gradients that the other functions do not take."""
    counts = _native.count(grads, torch.get_num_threads) if _IS_READY else None
    if counts is None:
        return None
    return torch.tensor(counts, dtype=torch.float64, device="cpu").view(-1, 3)


def gather(params: Sequence[Tensor]) -> Gathered | None:
    """Read the gradients of parameters, if nothing about any of them is unusual.

    No memory is looked at, so it serves gradients on a GPU too.

    Returns:
        None if something is, or the extension is not there: a type, dtype or device that is not
        known, a gradient that is not contiguous or has no memory, a DTensor's with another
        ``_spec`` than its parameter, or two that overlap.
    """
    found = _native.gather(params) if _IS_READY else None
    return None if found is None else Gathered(*found)


def survey(grads: Sequence[Tensor]) -> Survey | None:
    """Where gradients lie, if all of them are dense and on one device; None also without C."""
    found = _native.survey(grads) if _IS_READY else None
    return None if found is None else Survey(*found)


def why_not() -> str | None:
    """None where the kernels work, else the reason in a sentence."""
    if _native is None:
        return (
            "the C extension is not there. Install shardscale where there is a C compiler and "
            "Python's headers (Debian: gcc, python3-dev), or from a wheel."
        )
    if not _IS_READY:
        return f"the C extension cannot read the tensors of torch {torch.__version__}."
    return None


def _learn() -> bool:
    """Teach the extension to read torch's tensors; whether it is there and can."""
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if _native is None or capsule is None:
        return False
    try:
        _native.init(torch.Tensor, torch.nn.Parameter, DTensor, capsule)
    except ValueError:  # a torch whose DLPack is of another major version
        return False
    return True


_IS_READY = _learn()
