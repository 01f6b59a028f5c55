"""Who holds which gradient, and which rank counts it in the norm."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from shardscale.errors import ConfigError, LayoutError, StageError
from shardscale.holders import (
    clean_name,
    layout_of,
    unsharded_shapes,
    wrappers_of,
)
from shardscale.owners import Holders, by_declaration, by_layout, require_inside, say_ranks
from shardscale.records import Layout, Members
from shardscale.withheld import Unit, units_of

__all__ = ["Copies", "Layouts", "distinct"]

Copies = Callable[[str, Tensor], "dist.ProcessGroup | DeviceMesh | Iterable[int] | None"]


def distinct(name: str, param: Tensor) -> None:
    """For ``attach(copies=)``: no other rank holds this gradient beside what its layout says.

    True of pipeline stages, of experts and of tensors sharded by hand.
    """
    del name, param


@dataclass
class _Known:
    """What is known of one parameter."""

    name: str
    layout: Layout
    # What tells that an id was not taken again: the parameter itself; or for a DTensor the module
    # that has it, because torch cannot move a model to another device or dtype while there is a
    # weak reference to one of its DTensors. Neither for a parameter of no attached model.
    ref: weakref.ref[Tensor] | None = None
    module: weakref.ref[nn.Module] | None = None
    copies: Copies | None = None
    is_owner: bool | None = None  # None: not asked yet
    is_summed: bool = False  # its gradient was Partial

    def is_of(self, param: Tensor) -> bool:
        """Whether this is still about the parameter with that id."""
        if self.ref is not None:
            return self.ref() is param
        if self.module is None or self.module() is None or not isinstance(param, DTensor):
            return False
        return self.layout.spec == (param._spec.mesh, param._spec.placements)


class Layouts:
    """What is known of parameters: names, layouts, declared copies."""

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}
        self._units: dict[int, Unit] = {}  # what can hold gradients back, by id
        self._loose: list[nn.Module] = []  # lists of parameters that nobody else may keep
        self._owned: dict[object, bool] = {}  # by mesh and placements, for unattached DTensors
        self._inside: dict[int, object] = {}  # meshes found to be in the group; kept, for their ids
        self._shapes: set[tuple[int, ...]] = set()  # of attached parameters, before any sharding
        self._is_checked = True  # whether all attached layouts were compared with the group
        self._is_in_use = True  # whether an optimizer was seen that holds what is attached

    def attach(self, model: nn.Module, copies: Copies | None) -> None:
        """Learn names and layouts of all parameters, as they are now.

        Raises:
            ConfigError: ``copies`` is no function.
        """
        if copies is not None and not callable(copies):
            raise ConfigError(
                f"copies is a {type(copies).__name__}, but must be a function of a parameter's "
                "name and the parameter that returns a process group, ranks, a mesh or None. For "
                'a mesh, for example: copies=lambda name, param: mesh["tp"].'
            )
        dropped = [key for key, known in self._known.items() if _is_dropped(known)]
        for key in dropped:
            del self._known[key]
        is_list = isinstance(model, nn.ParameterList | nn.ParameterDict)
        if is_list and any(isinstance(p, DTensor) for p in model.parameters()):
            self._loose = [*(m for m in self._loose if m is not model), model]
        self._units = {key: unit for key, unit in self._units.items() if unit.ref() is not None}
        clean = clean_name(model)
        for name, module in model.named_modules():
            self._units.update(units_of(clean(name), module))
        wrappers = wrappers_of(model)
        modules = {id(p): m for m in model.modules() for p in m._parameters.values()}
        for name, param in model.named_parameters():
            before = self._lookup(param)
            known = _Known(clean(name), layout_of(param, wrappers.get(id(param))))
            known.copies = copies or (before.copies if before else None)
            if isinstance(param, DTensor):
                known.module = weakref.ref(modules[id(param)])
            else:
                known.ref = weakref.ref(param)
            self._known[id(param)] = known
            self._shapes.add(tuple(param.shape))
        self._shapes |= unsharded_shapes(wrappers.values())
        self._is_checked = self._is_in_use = False

    def name_of(self, param: Tensor) -> str:
        """The parameter's name, or its shape where no model was attached."""
        return self._of(param).name

    def mark_summed(self, params: Iterable[Tensor]) -> None:
        """Remember, for ``describe``, that the gradients of these were Partial."""
        for param in params:
            self._of(param).is_summed = True

    def require_inside(self, sharded: Iterable[DTensor], members: Members) -> None:
        """No rank that holds a part of these, or of an attached model, may decide on its own.

        Raises:
            LayoutError: a mesh, or an attached DDP or FSDP1 unit, reaches out of the group.
        """
        if members.ranks is None:
            return
        if not self._is_checked:
            for param in self.params():
                if param.requires_grad:
                    known = self._of(param)
                    require_inside(known.name, known.layout, members)
            self._is_checked = True
        for param in sharded:
            mesh = param._spec.mesh
            if id(mesh) not in self._inside and param.requires_grad:
                known = self._of(param)
                require_inside(known.name, known.layout, members)
                self._inside[id(mesh)] = mesh

    def require_synced(self, params: Iterable[Tensor], members: Members) -> None:
        """No gradient may be held back from the other ranks when it is judged.

        Args:
            params: Of all optimizers of a call.
            members: The agreeing group.

        Raises:
            StageError: an attached model holds one of them back; names it.
        """
        if members.size == 1:  # nobody misses it
            return
        for text, cure, ref, held_by in self._units.values():
            unit = ref()
            held = unit is not None and held_by(unit)
            if not held:
                continue
            asked = set(map(id, params))
            mine = next((param for param in held if id(param) in asked), None)
            if mine is not None:
                raise StageError(
                    f"rank {members.rank} of {members.size}: {text} holds gradients back from "
                    f"the other ranks, that of {self.name_of(mine)} among them. To accumulate, "
                    f"{cure}; unscale, clip and step after it, once."
                )

    def require_in_use(self, params: Sequence[Tensor]) -> None:
        """Optimizers must hold the attached parameters, not ones that wrapping has replaced.

        Args:
            params: Of all optimizers of a call.

        Raises:
            LayoutError: parameters without a gradient look like attached ones, which have a
                gradient and are in none of these optimizers.
        """
        if self._is_in_use:
            return
        held = set(map(id, params))
        idle = [param for param in params if param.grad is None and self._lookup(param) is None]
        stale = [param for param in idle if tuple(param.shape) in self._shapes]
        waiting = [p for p in self.params() if p.grad is not None and id(p) not in held]
        if stale and waiting:
            raise LayoutError(
                f"{len(stale)} of the {len(params)} parameters in the optimizer have no gradient "
                f"and belong to no attached model, while {self.name_of(waiting[0])} there has one "
                "and is in no optimizer of this call. Wrapping has probably replaced the "
                "parameters: build the optimizer, and attach the model, after wrapping."
            )
        self._is_in_use = any(param.grad is not None for param in params)

    def is_owner(self, param: Tensor, members: Members) -> bool:
        """Whether this rank counts the gradient in the norm; the group may not change later.

        Raises:
            LayoutError: other ranks of the group may hold copies of it, and nothing tells.
        """
        if members.size == 1:
            return True
        known = self._lookup(param)
        if known is None:
            key = (param._spec.mesh, param._spec.placements) if isinstance(param, DTensor) else None
            if key is None or key not in self._owned:
                holders = _holders(self._of(param), param, members)
                self._owned[key] = holders.owner == members.here
            return self._owned[key]
        if known.is_owner is None:
            known.is_owner = _holders(known, param, members).owner == members.here
        return known.is_owner

    def describe(
        self,
        params: Iterable[Tensor],
        members: Members,
        kernel_of: Callable[[torch.device], str],
    ) -> str:
        """A table: parameter, local shape, layout, who holds it, who counts it, kernel."""
        rows = [("parameter", "local shape", "layout", "held by", "counted by", "kernel")]
        for param in params:
            known = self._of(param)
            try:
                holders, owner = _holders(known, param, members)
                counted = f"rank {owner}" if owner is not None else "another rank"
            except LayoutError:
                holders = f"{say_ranks(known.layout.holders or [members.here])} at least"
                counted = "unknown"
            if not param.requires_grad:
                counted = "nobody: frozen"
            local = param._local_tensor if isinstance(param, DTensor) else param
            shape = "x".join(map(str, local.shape)) or "scalar"
            kind = known.layout.kind + (", Partial gradient summed" if known.is_summed else "")
            rows.append((known.name, shape, kind, holders, counted, kernel_of(local.device)))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )

    def __len__(self) -> int:
        """How many parameters were attached."""
        return len(self._known)

    def params(self) -> list[Tensor]:
        """The attached parameters that still exist."""
        found = [_find(key, known) for key, known in self._known.items()]
        return [param for param in found if param is not None]

    def _lookup(self, param: Tensor) -> _Known | None:
        known = self._known.get(id(param))
        return known if known is not None and known.is_of(param) else None

    def _of(self, param: Tensor) -> _Known:
        name = f"a parameter of shape {tuple(param.shape)}"
        return self._lookup(param) or _Known(name, layout_of(param, None))


def _is_dropped(known: _Known) -> bool:
    ref = known.ref or known.module
    return ref is None or ref() is None


def _find(key: int, known: _Known) -> Tensor | None:
    """The parameter with that id, if it still is the one that is known."""
    if known.ref is not None:
        return known.ref()
    module = known.module() if known.module is not None else None
    params = module._parameters.values() if module is not None else ()
    return next((p for p in params if id(p) == key and p is not None and known.is_of(p)), None)


def _holders(known: _Known, param: Tensor, members: Members) -> Holders:
    if known.copies is not None and members.size > 1:
        declared = known.copies(known.name, param)
        return by_declaration(known.name, known.layout, members, declared)
    found = by_layout(known.name, known.layout, members)
    if found is not None:
        return found
    layout = known.layout
    start = f"rank {members.rank} of {members.size}: the norm cannot be told, because {known.name}"
    few = f"speaks of {layout.num_ranks} of the group's {members.size} ranks"
    if known.ref is None and known.module is None:
        raise LayoutError(
            f"{start} ({layout.kind}) is not a parameter of an attached model and {few}. Call "
            "scaler.attach(model) with the model as it is wrapped for training; if it was attached "
            "before, its parameters have been replaced since."
        )
    raise LayoutError(
        f"{start} ({layout.kind}) {few}, and the others may hold copies of it or other parameters. "
        "Say which with scaler.attach(model, copies=...), the model wrapped as for training: "
        "shardscale.distinct if they hold other parameters (pipeline stages, experts, shards made "
        "by hand), a function that returns the group if they hold copies (layers outside a "
        "tensor-parallel plan)."
    )
