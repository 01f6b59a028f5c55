"""Makes one element of one rank's gradients infinite, as a float16 overflow would."""

from __future__ import annotations

from torch import nn

from shardscale.demo.model import plain_name
from shardscale.demo.options import Injection
from shardscale.testing import inject

__all__ = ["overflow_"]


def overflow_(model: nn.Module, injection: Injection, rank: int, step: int) -> str | None:
    """Write inf into the local gradient shard at the injection's address.

    Args:
        model: The wrapped model, after backward.
        injection: The address. Where its rank holds no element of the named parameter, the first
            parameter of which it does hold some is taken instead.
        rank: This rank.
        step: This step.

    Returns:
        The plain name of the parameter that was overflowed, None on any other rank or step.
    """
    named = [(plain_name(name), parameter) for name, parameter in model.named_parameters()]
    for param in (injection.param, None):
        plant = inject(rank=injection.rank, step=injection.step, param=param)
        if touched := plant(named, rank, step):
            return touched
    return None
