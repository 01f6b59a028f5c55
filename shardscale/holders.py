"""What a parameter's mesh or wrapper says about the ranks that hold its gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.fsdp._init_utils import HYBRID_SHARDING_STRATEGIES
from torch.distributed.tensor import DTensor

from shardscale.records import Layout

__all__ = ["clean_name", "layout_of", "unsharded_shapes", "wrappers_of"]


def layout_of(param: Tensor, wrapper: Any) -> Layout:
    """Read a parameter's layout.

    Args:
        param: As the optimizer holds it.
        wrapper: The module that manages it, see ``wrappers_of``; None if there is none.
    """
    if isinstance(param, DTensor):
        return _on_a_mesh(param)
    if isinstance(wrapper, nn.parallel.DistributedDataParallel):
        ranks = dist.get_process_group_ranks(wrapper.process_group)
        return Layout("DDP", len(ranks), frozenset(ranks), tuple(ranks))
    if wrapper is not None:
        return _in_fsdp1(wrapper)
    return Layout("plain", 1, frozenset(), ())


def wrappers_of(model: nn.Module) -> dict[int, Any]:
    """For each parameter's id, the DDP or FSDP1 module that manages it; the innermost."""
    found: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            ignored = module.parameters_to_ignore
            for name, param in module.module.named_parameters():
                if name not in ignored:
                    found.setdefault(id(param), module)
    for module in model.modules():
        if isinstance(module, FullyShardedDataParallel) and module._handle is not None:
            flat = module._handle.flat_param
            found[id(flat)] = module
            for param in flat._params or ():
                found[id(param)] = module
    return found


def unsharded_shapes(wrappers: Iterable[Any]) -> set[tuple[int, ...]]:
    """The shapes that the parameters of FSDP1 units had before these were made."""
    handles = [unit._handle for unit in wrappers if isinstance(unit, FullyShardedDataParallel)]
    return {tuple(shape) for handle in handles if handle for shape in handle.flat_param._shapes}


def clean_name(model: nn.Module) -> Callable[[str], str]:
    """What turns a name in a model into that in the model that was wrapped."""
    ddp = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.parallel.DistributedDataParallel)
    }

    def clean(name: str) -> str:
        parts = name.split(".")
        # "module" is what DDP calls the model within.
        kept = [
            part
            for i, part in enumerate(parts)
            if part not in _WRAPPER_NAMES and not (part == "module" and ".".join(parts[:i]) in ddp)
        ]
        return ".".join(kept)

    return clean


_WRAPPER_NAMES = {"_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"}


def _on_a_mesh(param: DTensor) -> Layout:
    mesh, placements = param.device_mesh, param.placements
    everyone: list[int] = mesh.mesh.flatten().tolist()
    coordinate = mesh.get_coordinate()
    holders: list[int] = []
    # Outside the mesh a rank holds nothing.
    if coordinate is not None and any(placement.is_replicate() for placement in placements):
        # Along a replicated axis all hold the same; along any other one, only this coordinate.
        here = tuple(
            slice(None) if placement.is_replicate() else at
            for at, placement in zip(coordinate, placements, strict=True)
        )
        holders = mesh.mesh[here].flatten().tolist()
    kind = f"DTensor {placements}"
    spec = (mesh, placements)
    return Layout(kind, len(everyone), frozenset(everyone), tuple(holders), spec)


def _in_fsdp1(unit: Any) -> Layout:
    kind = f"FSDP1 {unit.sharding_strategy.name}"
    ranks = dist.get_process_group_ranks(unit.process_group)
    if unit.sharding_strategy == ShardingStrategy.NO_SHARD:
        return Layout(kind, len(ranks), frozenset(ranks), tuple(ranks))
    if unit.sharding_strategy in HYBRID_SHARDING_STRATEGIES:
        replicas = dist.get_process_group_ranks(unit._inter_node_pg)
        named = frozenset(ranks) | frozenset(replicas)
        return Layout(kind, len(ranks) * len(replicas), named, tuple(replicas))
    return Layout(kind, len(ranks), frozenset(ranks), ())
