"""The kernels in C for gradients on the host, where the extension could be built.

Each function takes all of a call or none of it: it answers ``False`` or ``None``, and has touched
nothing, if a tensor is not exactly a ``torch.Tensor``, not on the host, not dense or of another
dtype than float16, bfloat16, float32 and float64. ``_native.pyi`` describes them.

They work on memory behind torch's back: no dispatch mode sees them, and no version is counted up.
"""

from __future__ import annotations

import functools

import torch
from torch.distributed.tensor import DTensor

try:
    from shardscale.kernels.native._native import (
        addresses,
        check_,
        count,
        gather,
        init,
        instruction_set,
        instruction_sets,
        scale_,
        unscale_,
        use_instruction_set,
    )
except ImportError:  # no compiler was there when shardscale was installed
    _IS_BUILT = False
else:
    _IS_BUILT = True

__all__ = [
    "addresses",
    "available",
    "check_",
    "count",
    "gather",
    "instruction_set",
    "instruction_sets",
    "scale_",
    "unscale_",
    "use_instruction_set",
]


@functools.cache
def available() -> bool:
    """Whether the functions exist and can read torch's tensors; ask before the first use."""
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if not _IS_BUILT or capsule is None:
        return False
    try:
        init(torch.Tensor, torch.nn.Parameter, DTensor, capsule)
    except ValueError:  # a torch whose DLPack is of another major version
        return False
    return True
