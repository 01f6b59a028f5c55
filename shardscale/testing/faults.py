"""Faults by address: this rank, this step, this parameter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from shardscale.errors import ConfigError

__all__ = ["inject"]


def inject(
    *, rank: int, step: int, param: str | None = None, value: float = math.inf
) -> Callable[[Iterable[tuple[str, Tensor]] | nn.Module, int, int], str | None]:
    """A fault to be planted into one gradient of one rank at one step.

    Args:
        rank: The rank whose local gradient is overwritten.
        step: The step, as the caller counts them.
        param: A parameter's name, or the end of one (``"w2"`` finds ``"layer.w2"``). None: the
            first whose gradient has an element on that rank.
        value: What the first element of the local gradient becomes.

    Returns:
        A function of (model or its named parameters, this rank, this step), to be called between
        ``backward`` and the scaler on every rank at every step. It returns the name of the
        parameter it touched, or None where this is not the place or the rank has no element.

    Raises:
        ConfigError: from the returned function, at the fault's rank and step, if no parameter has
            that name.

    >>> weight = torch.nn.Parameter(torch.ones(3))
    >>> weight.grad = torch.ones(3)
    >>> plant = inject(rank=0, step=7)
    >>> plant([("weight", weight)], 0, 6), plant([("weight", weight)], 0, 7), weight.grad
    (None, 'weight', tensor([inf, 1., 1.]))
    """

    def plant(
        model: Iterable[tuple[str, Tensor]] | nn.Module, this_rank: int, this_step: int
    ) -> str | None:
        if (this_rank, this_step) != (rank, step):
            return None
        named = list(model.named_parameters() if isinstance(model, nn.Module) else model)
        chosen = [
            (n, p) for n, p in named if param is None or n == param or n.endswith("." + param)
        ]
        if not chosen:
            names = ", ".join(name for name, _ in named)
            raise ConfigError(f"rank {rank}: no parameter is called {param!r}. There are: {names}.")
        for name, parameter in chosen:
            grad = getattr(parameter.grad, "_local_tensor", parameter.grad)  # a DTensor's own shard
            if grad is not None and grad.numel() > 0:
                with torch.no_grad():
                    grad[(0,) * grad.dim()] = value
                return name
        return None

    return plant
