"""The kernels as operators of torch's, so that compiled code calls them as they are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.library import Library, register_fake

from shardscale.kernels import dispatch

__all__ = ["LIBRARY"]

# What an operator writes is declared, so the compiler neither copies its arguments nor moves reads
# and writes of them past it. Eager code calls the kernels directly: the dispatcher wraps every
# tensor of a list, and with 3000 of them that costs as much as the kernel.
LIBRARY = Library("shardscale", "DEF")
_FOUND = "Tensor inv_scale, Tensor({}!) found_inf, Tensor({}!)? sum_squares=None"


def _register(name: str, schema: str, kernel: Callable[..., None]) -> None:
    LIBRARY.define(f"{name}({schema}) -> ()")
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    register_fake(f"shardscale::{name}", _writes_only, lib=LIBRARY)


def _writes_only(*_: torch.Tensor) -> None:
    """No output: what is known of the arguments before the call holds after it."""


_register("unscale_", "Tensor(a!)[] grads, " + _FOUND.format("b", "c"), dispatch.unscale_now_)
_register("check_", "Tensor[] grads, " + _FOUND.format("a", "b"), dispatch.check_now_)
_register("scale_", "Tensor(a!)[] grads, Tensor factor", dispatch.scale_now_)
