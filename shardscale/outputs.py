"""Scale what a model may return: a tensor, or any nest of tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["map_tensors", "scale_gradient", "times_scale"]


def map_tensors(fn: Callable[[Tensor], Tensor], outputs: Any) -> Any:
    """The same structure with ``fn`` applied to its tensors.

    Lists, tuples, namedtuples and kinds of dict keep their type; other iterables are mapped lazily.

    Raises:
        ValueError: something is neither a tensor nor an iterable of them.

    >>> map_tensors(lambda t: t + 1, {"a": [Tensor([1.0])]})
    {'a': [tensor([2.])]}
    """
    if isinstance(outputs, Tensor):
        return fn(outputs)
    if type(outputs) is dict:  # as below, in words that torch.compile can trace
        return {key: map_tensors(fn, value) for key, value in outputs.items()}
    if isinstance(outputs, Mapping):
        mapped = copy.copy(outputs) if isinstance(outputs, MutableMapping) else {}
        mapped.update({key: map_tensors(fn, value) for key, value in outputs.items()})
        return mapped
    if isinstance(outputs, Iterable) and not isinstance(outputs, str | bytes):
        lazily = (map_tensors(fn, value) for value in outputs)
        if hasattr(outputs, "_make"):
            return outputs._make(lazily)
        return type(outputs)(lazily) if isinstance(outputs, list | tuple) else lazily
    raise ValueError(
        "outputs must be a Tensor or an iterable of Tensors, "
        f"but a {type(outputs).__name__} was found."
    )


def times_scale(output: Tensor, scale: Tensor) -> Tensor:
    """``output * scale``, where a 16-bit output is taken to float32 first.

    Args:
        output: Any shape and floating dtype.
        scale: () float32, on any device.
    """
    return _wide(output) * scale.to(output.device, non_blocking=not output.is_cpu)


def scale_gradient(loss: Tensor, scale: Tensor) -> Tensor:
    """``loss`` with its value unchanged and its gradient multiplied by ``scale``, () float32."""
    scaled: Tensor = _ScaleGradient.apply(loss, scale)  # type: ignore[no-untyped-call]
    return scaled


class _ScaleGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by the scale of the moment it was applied."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, scale: Tensor) -> Tensor:
        # update() may change the scale in place before the backward pass comes by.
        ctx.scale = scale.to(loss.device, copy=True)
        return loss.clone()  # not a view: schedules that split the backward pass detach it in place

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.scale, None


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
