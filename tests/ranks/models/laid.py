"""The network as one rank holds it, and what a test may look at there."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.ranks.models.net import batch

__all__ = [
    "Laid",
    "Layout",
    "averaging",
    "equal",
    "full",
    "local",
    "local_grads",
    "spoil",
    "whole_bits",
]


class Laid(NamedTuple):
    """The network as one rank holds it."""

    model: nn.Module
    backward: Callable[..., None]
    """``backward(scaler, step)`` accumulates this rank's scaled gradients of one batch."""
    whole: Callable[[], dict[str, Tensor]]
    """All parameters in full, named as in ``make_net``; a collective."""
    num_batches: int
    """How many different batches the ranks see together in one step."""
    copies: Callable[..., object] | None = None
    """What the scaler must be told with ``attach(copies=)``."""
    num_sums: int = 0
    """How many all-reduces it takes to sum the Partial gradients that a backward pass leaves."""


class Layout(NamedTuple):
    """A way to lay the network out over the ranks."""

    lay: Callable[..., Laid]
    """``lay(size, dtype)``, called on each of ``size`` ranks; the dtype is that of parameters."""
    sizes: tuple[int, ...]
    """The numbers of ranks to test it on."""


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, detached and sharing its memory."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_grads(model: nn.Module) -> list[Tensor]:
    """The gradients of which this rank holds any element, as plain tensors."""
    grads = [local(p.grad) for p in model.parameters() if p.grad is not None]
    return [g for g in grads if g.numel()]


def spoil(model: nn.Module, rank: int, bad_rank: int, value: float) -> None:
    """On one rank, overwrite the last element of the first gradient that it holds."""
    if rank == bad_rank:
        local_grads(model)[0].view(-1)[-1] = value


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether the same names stand for equal tensors."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def whole_bits(laid: Laid) -> dict[str, Tensor]:
    """All float32 parameters in full, as integers, so that NaN equals itself; a collective."""
    return {name: p.view(torch.int32) for name, p in laid.whole().items()}


def full(net: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters, DTensors gathered; a collective of their meshes."""
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in net.named_parameters()
    }


def averaging(
    model: nn.Module,
    num_batches: int,
    whole: Callable[[], dict[str, Tensor]],
    dtype: torch.dtype,
    copies: Callable[..., object] | None = None,
) -> Laid:
    """A layout that averages gradients; the loss is multiplied, so that they come out as a sum.

    Neighbouring ranks see the same batch where there are fewer batches than ranks.
    """
    ranks_per_batch = dist.get_world_size() // num_batches

    def backward(scaler, step: int) -> None:
        x = batch(dist.get_rank() // ranks_per_batch, step, dtype)
        scaler.scale(model(x).float().sum() * num_batches).backward()

    return Laid(model, backward, whole, num_batches, copies)
