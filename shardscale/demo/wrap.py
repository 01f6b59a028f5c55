"""The ways the demo spreads its model over the ranks, by the name of `--wrap`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor

__all__ = ["WRAPS", "local"]


def _ddp(model: nn.Module, device: torch.device) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model.to(device))


def _fsdp1(model: nn.Module, device: torch.device) -> nn.Module:
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({nn.Linear}),
        device_id=device,
        use_orig_params=True,
    )


def _fsdp2(model: nn.Module, device: torch.device) -> nn.Module:
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model.children():
        # Small layers stay gathered until backward; on CPU the waiting costs most.
        fully_shard(layer, mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)
    return model


WRAPS: dict[str, Callable[[nn.Module, torch.device], nn.Module]] = {
    "ddp": _ddp,
    "fsdp1": _fsdp1,
    "fsdp2": _fsdp2,
}


def local(tensor: Tensor) -> Tensor:
    """Return the piece of a parameter or gradient that this rank holds, without a copy."""
    piece: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return piece.detach()
