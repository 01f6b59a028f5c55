"""The gradient scalers the demo can train with, by the name of `--scaler`."""

from __future__ import annotations

import torch
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler as TorchSharded

import shardscale

__all__ = ["SCALERS", "make_scaler", "scaler_title"]

SCALERS = ("shardscale", "torch")

# Short, so that even a run of a few seconds sees the scale grow, overflow by
# itself and back off again; the default of 2000 steps would show a constant.
_GROWTH_INTERVAL = 50


def make_scaler(
    name: str, wrap: str, device_type: str, comm: shardscale.Communicator | None = None
) -> torch.amp.GradScaler:
    """Construct a scaler; torch's is the one its documentation names for this wrapping.

    Args:
        name: A name in ``SCALERS``.
        wrap: A name in ``WRAPS``.
        device_type: "cpu" or "cuda".
        comm: What shardscale's agrees over; None for the process group.
    """
    if name == "shardscale":
        return shardscale.ShardedGradScaler(
            device_type, growth_interval=_GROWTH_INTERVAL, comm=comm
        )
    if wrap == "fsdp1":
        return TorchSharded(device_type, growth_interval=_GROWTH_INTERVAL)
    return torch.amp.GradScaler(device_type, growth_interval=_GROWTH_INTERVAL)


def scaler_title(name: str, wrap: str) -> str:
    """Return the dotted name of the class that `make_scaler` constructs."""
    if name == "shardscale":
        return "shardscale.ShardedGradScaler"
    return "torch ShardedGradScaler" if wrap == "fsdp1" else "torch.amp.GradScaler"
