"""Nothing of torch's class is reached through ours: the inheritance is for ``isinstance`` alone."""

from __future__ import annotations

import inspect
import types

import pytest
import torch
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler as TorchShardedGradScaler

from shardscale import ShardedGradScaler

OF_EVERY_CLASS = {"__module__", "__dict__", "__weakref__", "__doc__", "__firstlineno__"}
OF_EVERY_CLASS |= {"__static_attributes__", "__annotations__"}
# Both of torch's classes and whatever they may one day inherit from.
TORCHS = [k for cls in (torch.amp.GradScaler, TorchShardedGradScaler) for k in cls.__mro__[:-1]]
NAMES = sorted({name for cls in TORCHS for name in vars(cls)} - OF_EVERY_CLASS)


def owner_of(name: str) -> type | None:
    return next((cls for cls in ShardedGradScaler.__mro__ if name in vars(cls)), None)


@pytest.mark.parametrize("name", [n for n in NAMES if hasattr(torch.amp.GradScaler, n)])
def test_every_name_of_torchs_scaler_is_ours(name: str):
    """A release of torch that adds a method fails here, before it acts on one rank alone."""
    owner = owner_of(name)
    assert owner is not None
    assert owner.__module__.startswith("shardscale"), f"{name} comes from {owner}"


def test_the_names_are_those_we_know():
    """The list above is not empty, and holds what matters."""
    assert {"step", "update", "unscale_", "scale", "__getstate__", "_maybe_opt_step"} <= set(NAMES)


@pytest.mark.parametrize(
    "name",
    [
        n
        for n, member in vars(torch.amp.GradScaler).items()
        if isinstance(member, types.FunctionType) and n not in ("__init__", "__setstate__")
    ],
)
def test_parameters_that_torch_takes_by_position_stay_where_they_are(name: str):
    """Names may be wider (``optimizers`` for ``optimizer``); number and order stay."""

    def positions(cls: type) -> list[inspect.Parameter]:
        found = inspect.signature(getattr(cls, name)).parameters.values()
        return [p for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]

    theirs, ours = positions(torch.amp.GradScaler), positions(ShardedGradScaler)
    assert len(ours) == len(theirs)
    for their, our in zip(theirs, ours, strict=True):
        assert our.name.rstrip("s") == their.name.rstrip("s")
        assert their.default is inspect.Parameter.empty or our.default == their.default
