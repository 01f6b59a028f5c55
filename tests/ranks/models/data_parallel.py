"""Data parallelism: every rank sees its own batch; the model is copied, sharded, or both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.nn.parallel import DistributedDataParallel

from tests.ranks.models.laid import Laid, Layout, averaging, full
from tests.ranks.models.net import make_net

__all__ = ["LAYOUTS", "held_back", "shard_each_layer"]

ALL_SIZES = (2, 3, 4, 8)


def _ddp(size: int, dtype: torch.dtype) -> Laid:
    net = make_net(dtype)
    return averaging(DistributedDataParallel(net), size, lambda: full(net), dtype)


def _fsdp1(strategy: ShardingStrategy, use_orig_params: bool) -> Callable[..., Laid]:
    def lay(size: int, dtype: torch.dtype) -> Laid:
        group = None
        if strategy is ShardingStrategy.HYBRID_SHARD:
            mesh = init_device_mesh("cpu", (2, size // 2))
            group = (mesh.get_group(1), mesh.get_group(0))
        model = FullyShardedDataParallel(
            make_net(dtype),
            process_group=group,
            sharding_strategy=strategy,
            use_orig_params=use_orig_params,
            device_id=torch.device("cpu"),
        )

        def whole() -> dict[str, Tensor]:
            with FullyShardedDataParallel.summon_full_params(model):
                return full(model.module)

        return averaging(model, size, whole, dtype)

    return lay


def shard_each_layer(net: nn.Module, mesh: DeviceMesh, **options) -> None:
    """FSDP2 units as in practice: each layer with a weight matrix, then the rest."""
    layers = [layer for layer in net.children() if isinstance(layer, nn.Linear)]
    for layer in [*layers, net]:
        fully_shard(layer, mesh=mesh, **options)


def _fsdp2(param_dtype: torch.dtype | None = None) -> Callable[..., Laid]:
    def lay(size: int, dtype: torch.dtype) -> Laid:
        net = make_net(dtype)
        policy = MixedPrecisionPolicy(param_dtype, torch.float32 if param_dtype else None)
        shard_each_layer(net, init_device_mesh("cpu", (size,)), mp_policy=policy)
        return averaging(net, size, lambda: full(net), dtype)

    return lay


def _hsdp(size: int, dtype: torch.dtype) -> Laid:
    net = make_net(dtype)
    shard_each_layer(net, init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("r", "s")))
    return averaging(net, size, lambda: full(net), dtype)


@contextmanager
def held_back(model: nn.Module) -> Iterator[None]:
    """Gradients made within have not met those of other ranks."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)
    else:
        with model.no_sync():
            yield


LAYOUTS = {
    "DDP": Layout(_ddp, (1, *ALL_SIZES)),
    **{
        f"FSDP1 {strategy.name} {'original' if use_orig_params else 'flat'}": Layout(
            _fsdp1(strategy, use_orig_params), ALL_SIZES
        )
        for strategy in (
            ShardingStrategy.FULL_SHARD,
            ShardingStrategy.SHARD_GRAD_OP,
            ShardingStrategy.NO_SHARD,
        )
        for use_orig_params in (False, True)
    },
    "FSDP1 HYBRID_SHARD": Layout(_fsdp1(ShardingStrategy.HYBRID_SHARD, True), (4, 8)),
    # On four and eight ranks the bias of three leaves some of them without an element.
    "FSDP2": Layout(_fsdp2(), (1, *ALL_SIZES)),
    "FSDP2 float16": Layout(_fsdp2(torch.float16), ALL_SIZES),
    "FSDP2 bfloat16": Layout(_fsdp2(torch.bfloat16), ALL_SIZES),
    "HSDP": Layout(_hsdp, (4, 8)),
}
