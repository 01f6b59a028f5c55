"""Two scalers, torch's and ours, driven through the same calls and compared bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from shardscale import ShardedGradScaler

BOTH = pytest.mark.parametrize(
    "make", [torch.amp.GradScaler, ShardedGradScaler], ids=["torch", "ours"]
)


def parameter(grad: Tensor | None, value: float = 1.0) -> torch.nn.Parameter:
    """A parameter of the gradient's shape and dtype that has it."""
    shape, dtype = ((2,), torch.float32) if grad is None else (grad.shape, grad.dtype)
    param = torch.nn.Parameter(torch.full(shape, value, dtype=dtype))
    param.grad = grad
    return param


def sgd(*grads: Tensor | None, lr: float = 1.0, **options: Any) -> torch.optim.SGD:
    """Plain SGD over one parameter of ones for each gradient."""
    return torch.optim.SGD([parameter(g) for g in grads], lr=lr, **options)


def params_of(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def grad_of(optimizer: Any, index: int = 0) -> Tensor:
    grad = params_of(optimizer)[index].grad
    assert grad is not None
    return grad


def full(value: float, numel: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full((numel,), value, dtype=dtype)


def raised(call: Callable[[], Any]) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None


def assert_fails_alike(
    theirs: Callable[[], Any], ours: Callable[[], Any], text: str, kind: type[Exception]
) -> None:
    """Both raise ``kind``, and both messages begin with ``text``."""
    for call in (theirs, ours):
        error = raised(call)
        assert isinstance(error, kind), repr(error)
        assert str(error).startswith(text)


def assert_same_bits(one: Any, other: Any) -> None:
    """Equal, signs of zero included; any NaN equals any NaN. Takes tensors, and nests of them."""
    assert type(one) is type(other)
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        if one.is_sparse:
            assert one.is_coalesced() == other.is_coalesced()
            assert_same_bits(one._indices(), other._indices())
            assert_same_bits(one._values(), other._values())
            return
        one, other = one.detach(), other.detach()
        if one.is_complex():
            one, other = torch.view_as_real(one), torch.view_as_real(other)
        same = one == other
        if one.is_floating_point():
            same &= one.signbit() == other.signbit()
            same |= one.isnan() & other.isnan()
        assert same.all(), f"{one} differs from {other}"
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same_bits(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for mine, yours in zip(one, other, strict=True):
            assert_same_bits(mine, yours)
    else:
        assert one == other or (one != one and other != other)


def assert_same_optimizers(one: Any, other: Any) -> None:
    """The same parameters, gradients and state, bit for bit."""
    assert_same_bits([p.data for p in params_of(one)], [p.data for p in params_of(other)])
    assert_same_bits([p.grad for p in params_of(one)], [p.grad for p in params_of(other)])
    mine, yours = one.state_dict()["state"], other.state_dict()["state"]
    assert_same_bits({k: v for k, v in mine.items() if v}, {k: v for k, v in yours.items() if v})


def assert_same_scale(theirs: Any, ours: Any) -> None:
    assert_same_bits(theirs._scale, ours._scale)
    assert_same_bits(theirs._growth_tracker, ours._growth_tracker)
    assert theirs.get_scale() == ours.get_scale()


def run_verdicts(scaler: Any, verdicts: Sequence[bool]) -> list[tuple[float, int]]:
    """Scale and tracker after each iteration; True is a good one."""
    seen = []
    for good in verdicts:
        optimizer = sgd(full(1.0 if good else math.inf))
        scaler.scale(torch.ones(()))
        scaler.step(optimizer)
        scaler.update()
        seen.append((scaler._scale.item(), scaler._growth_tracker.item()))
    return seen
