"""Who holds which gradient, and which rank counts it in the norm."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.fsdp._init_utils import HYBRID_SHARDING_STRATEGIES
from torch.distributed.tensor import DTensor

from shardscale.comm import Communicator
from shardscale.errors import LayoutError

__all__ = ["Copies", "Layout", "Layouts", "distinct"]

Copies = Callable[[str, Tensor], "dist.ProcessGroup | Iterable[int] | None"]


def distinct(name: str, param: Tensor) -> None:
    """For ``attach(copies=)``: no other rank holds this gradient beside what its layout says.

    True of pipeline stages, of experts and of tensors sharded by hand.
    """
    del name, param


class Layout(NamedTuple):
    """Where one parameter's gradient lives; an owner counts it, so each value is counted once."""

    kind: str  # for people: "FSDP1 FULL_SHARD", "DDP", "DTensor (Shard(dim=0),)", "plain"
    num_ranks: int  # the ranks that this layout speaks of; others may hold copies, or other things
    is_owner: bool  # as far as this layout says: of replicas, the first


class Layouts:
    """What is known of a model's parameters: names, layouts, declared copies."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], str, Layout]] = {}
        self._copies: Copies | None = None

    def attach(self, model: nn.Module, copies: Copies | None) -> None:
        """Learn names and layouts of all parameters, as they are now."""
        if copies is not None:
            self._copies = copies
        wrappers = _wrappers(model)
        for name, param in model.named_parameters(remove_duplicate=True):
            layout = _layout_of(param, wrappers.get(id(param)))
            parts = [part for part in name.split(".") if part not in _WRAPPER_NAMES]
            if isinstance(model, nn.parallel.DistributedDataParallel):
                parts = parts[1:]  # "module", its name for what it wraps
            clean = ".".join(parts)
            self._known[id(param)] = (weakref.ref(param), clean, layout)

    def name_of(self, param: Tensor) -> str:
        """The parameter's name, or its shape where no model was attached."""
        known = self._lookup(param)
        return known[0] if known else f"a parameter of shape {tuple(param.shape)}"

    def is_owner(self, param: Tensor, comm: Communicator) -> bool:
        """Whether this rank counts the gradient in the norm.

        Raises:
            LayoutError: other ranks of the group may hold copies of it, and nothing tells.
        """
        if comm.size == 1:
            return True
        name, layout = self._lookup(param) or (self.name_of(param), _layout_of(param, None))
        if self._copies is None:
            if layout.num_ranks == comm.size:
                return layout.is_owner
            raise LayoutError(
                f"rank {comm.rank} of {comm.size}: the norm cannot be told, because {name} "
                f"({layout.kind}) speaks of {layout.num_ranks} of the group's {comm.size} ranks, "
                "and the others may hold copies of it or other parameters. Call "
                "scaler.attach(model) with the wrapped model; if that does not settle it, declare "
                "it with attach(model, copies=shardscale.distinct) or a function."
            )
        return layout.is_owner and _is_first(self._copies(name, param), name, comm)

    def describe(self, optimizer_params: Iterable[Tensor], comm: Communicator, kernel: str) -> str:
        """A table: parameter, local shape, layout, whether this rank counts it, kernel."""
        rows = [("parameter", "local shape", "layout", "counted here", "kernel")]
        for param in optimizer_params:
            known = self._lookup(param)
            layout = known[1] if known else _layout_of(param, None)
            try:
                counted = "yes" if self.is_owner(param, comm) else "no"
            except LayoutError:
                counted = "unknown"
            local = param._local_tensor if isinstance(param, DTensor) else param
            shape = "x".join(map(str, local.shape)) or "scalar"
            rows.append((self.name_of(param), shape, layout.kind, counted, kernel))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )

    def params(self) -> list[Tensor]:
        """The attached parameters that still exist."""
        return [param for ref, _, _ in self._known.values() if (param := ref()) is not None]

    def _lookup(self, param: Tensor) -> tuple[str, Layout] | None:
        known = self._known.get(id(param))
        # An id may be taken again by a parameter made after the attached one was dropped.
        if known is None or known[0]() is not param:
            return None
        return known[1], known[2]


_WRAPPER_NAMES = {"_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"}


def _wrappers(model: nn.Module) -> dict[int, Any]:
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


def _layout_of(param: Tensor, wrapper: Any) -> Layout:
    if isinstance(param, DTensor):
        mesh = param.device_mesh
        coordinate = mesh.get_coordinate() or [0] * mesh.ndim
        is_first = all(
            at == 0
            for at, placement in zip(coordinate, param.placements, strict=True)
            if placement.is_replicate()
        )
        return Layout(f"DTensor {param.placements}", mesh.size(), is_first)
    if isinstance(wrapper, nn.parallel.DistributedDataParallel):
        group = wrapper.process_group
        return Layout("DDP", group.size(), group.rank() == 0)
    if wrapper is not None:
        return _fsdp1_layout(wrapper)
    return Layout("plain", 1, True)


def _fsdp1_layout(unit: Any) -> Layout:
    kind = f"FSDP1 {unit.sharding_strategy.name}"
    group = unit.process_group
    if unit.sharding_strategy == ShardingStrategy.NO_SHARD:
        return Layout(kind, group.size(), group.rank() == 0)
    if unit.sharding_strategy in HYBRID_SHARDING_STRATEGIES:
        replicas = unit._inter_node_pg
        return Layout(kind, group.size() * replicas.size(), replicas.rank() == 0)
    return Layout(kind, group.size(), True)


def _is_first(
    copies: dist.ProcessGroup | Iterable[int] | None, name: str, comm: Communicator
) -> bool:
    if copies is None:
        return True
    if isinstance(copies, dist.ProcessGroup):
        ranks = dist.get_process_group_ranks(copies)
    else:
        ranks = list(copies)
    here = dist.get_rank() if dist.is_initialized() else comm.rank
    if here not in ranks:
        raise LayoutError(
            f"rank {here}: copies= says that {name} is held by ranks {ranks}, which leaves out "
            "this rank. Return the ranks that hold it, this one included, or None for nowhere else."
        )
    return here == min(ranks)
