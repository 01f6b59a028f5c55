"""Who holds which gradient, and which rank counts it in the norm."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardscale.comm import Members
from shardscale.errors import LayoutError
from shardscale.holders import Layout, layout_of, wrappers_of

__all__ = ["Copies", "Layouts", "distinct"]

Copies = Callable[[str, Tensor], "dist.ProcessGroup | Iterable[int] | None"]


def distinct(name: str, param: Tensor) -> None:
    """For ``attach(copies=)``: no other rank holds this gradient beside what its layout says.

    True of pipeline stages, of experts and of tensors sharded by hand.
    """
    del name, param


@dataclass
class _Known:
    """What is known of one parameter."""

    ref: weakref.ref[Tensor]  # an id may be taken again once the parameter is dropped
    name: str
    layout: Layout
    is_attached: bool
    copies: Copies | None = None
    is_owner: bool | None = None  # None: not asked yet
    is_summed: bool = False  # its gradient was Partial


class Layouts:
    """What is known of parameters: names, layouts, declared copies."""

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}
        self._inside: dict[int, object] = {}  # meshes found to be in the group; kept, for their ids
        self._is_checked = True  # whether all attached layouts were compared with the group
        self._is_in_use = True  # whether an optimizer was seen with a parameter that is attached

    def attach(self, model: nn.Module, copies: Copies | None) -> None:
        """Learn names and layouts of all parameters, as they are now."""
        wrappers = wrappers_of(model)
        for name, param in model.named_parameters(remove_duplicate=True):
            parts = [part for part in name.split(".") if part not in _WRAPPER_NAMES]
            if isinstance(model, nn.parallel.DistributedDataParallel):
                parts = parts[1:]  # "module", its name for what it wraps
            before = self._lookup(param)
            self._known[id(param)] = _Known(
                weakref.ref(param),
                ".".join(parts),
                layout_of(param, wrappers.get(id(param))),
                is_attached=True,
                copies=copies or (before.copies if before else None),
            )
        self._is_checked = self._is_in_use = False

    def name_of(self, param: Tensor) -> str:
        """The parameter's name, or its shape where no model was attached."""
        return self._learn(param).name

    def mark_summed(self, params: Iterable[Tensor]) -> None:
        """Remember, for ``describe``, that the gradients of these were Partial."""
        for param in params:
            self._learn(param).is_summed = True

    def require_inside(self, sharded: Iterable[DTensor], members: Members) -> None:
        """No rank that holds a part of these, or of an attached model, may decide on its own.

        Raises:
            LayoutError: a mesh, or an attached DDP or FSDP1 unit, reaches out of the group.
        """
        if members.ranks is None:
            return
        if not self._is_checked:
            for known in self._known.values():
                if known.ref() is not None:
                    _require_inside(known, members)
            self._is_checked = True
        for param in sharded:
            mesh = param._spec.mesh
            if id(mesh) not in self._inside:
                _require_inside(self._learn(param), members)
                self._inside[id(mesh)] = mesh

    def require_in_use(self, params: Sequence[Tensor]) -> None:
        """Optimizers must hold the attached parameters, not ones that wrapping has replaced.

        Args:
            params: Of all optimizers of a call.

        Raises:
            LayoutError: attached parameters have gradients, and these optimizers none at all.
        """
        if self._is_in_use:
            return
        self._is_in_use = any(self._learn(param).is_attached for param in params)
        idle = params and all(param.grad is None for param in params)
        if not self._is_in_use and idle:
            waiting = [param for param in self.params() if param.grad is not None]
            if waiting:
                raise LayoutError(
                    f"the optimizer holds {len(params)} parameters without a gradient, none of "
                    f"which belongs to the attached model, while {self.name_of(waiting[0])} there "
                    "has one. Wrapping has probably replaced the parameters: build the optimizer, "
                    "and attach the model, after wrapping."
                )

    def is_owner(self, param: Tensor, members: Members) -> bool:
        """Whether this rank counts the gradient in the norm; the group may not change later.

        Raises:
            LayoutError: other ranks of the group may hold copies of it, and nothing tells.
        """
        if members.size == 1:
            return True
        known = self._known.get(id(param))
        if known is None or known.is_owner is None or known.ref() is not param:
            known = self._learn(param)
            _, owner = _holders(known, param, members)
            known.is_owner = owner == members.here
        return known.is_owner

    def describe(self, params: Iterable[Tensor], members: Members, kernel: str) -> str:
        """A table: parameter, local shape, layout, who holds it, who counts it, kernel."""
        rows = [("parameter", "local shape", "layout", "held by", "counted by", "kernel")]
        for param in params:
            known = self._learn(param)
            try:
                holders, owner = _holders(known, param, members)
                counted = f"rank {owner}" if owner is not None else "another rank"
            except LayoutError:
                holders = f"{_ranks(known.layout.holders or [members.here])} at least"
                counted = "unknown"
            if not param.requires_grad:
                counted = "nobody: frozen"
            local = param._local_tensor if isinstance(param, DTensor) else param
            shape = "x".join(map(str, local.shape)) or "scalar"
            kind = known.layout.kind + (", Partial gradient summed" if known.is_summed else "")
            rows.append((known.name, shape, kind, holders, counted, kernel))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )

    def params(self) -> list[Tensor]:
        """The attached parameters that still exist."""
        attached = [known.ref() for known in self._known.values() if known.is_attached]
        return [param for param in attached if param is not None]

    def _lookup(self, param: Tensor) -> _Known | None:
        known = self._known.get(id(param))
        return known if known is not None and known.ref() is param else None

    def _learn(self, param: Tensor) -> _Known:
        known = self._lookup(param)
        if known is None:
            name = f"a parameter of shape {tuple(param.shape)}"
            known = _Known(weakref.ref(param), name, layout_of(param, None), is_attached=False)
            self._known[id(param)] = known
        return known


_WRAPPER_NAMES = {"_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"}


def _require_inside(known: _Known, members: Members) -> None:
    assert members.ranks is not None
    outside = known.layout.ranks - members.ranks
    if outside:
        raise LayoutError(
            f"rank {members.rank} of {members.size}: {known.name} ({known.layout.kind}) is held by "
            f"{_ranks(known.layout.ranks)}, but this scaler agrees with {_ranks(members.ranks)} "
            f"only, so {_ranks(outside)} would step or skip without the others. Make the scaler "
            "with a process_group= of all ranks that hold a part of the model, or with none for "
            "the whole job."
        )


def _holders(known: _Known, param: Tensor, members: Members) -> tuple[str, int | None]:
    """Who holds what this rank holds of a parameter, for people; the rank that counts it.

    The owner is None where it is neither this rank nor one that this rank can name.
    """
    layout = known.layout
    holders: Sequence[int] = layout.holders or [members.here]
    if members.size == 1:
        return _ranks([members.here]), members.here
    if members.ranks is not None:
        _require_inside(known, members)
    if known.copies is not None:
        copies = _copies(known, param, members)
        if len(copies) > 1 and len(holders) > 1:
            both = f"{_ranks(holders)}; copies: {_ranks(copies)}"
            # Of copies of copies, the first of the first counts.
            if members.here == holders[0]:
                return both, copies[0]
            return both, holders[0] if members.here == copies[0] else None
        holders = copies if len(copies) > 1 else holders
        return _ranks(holders), holders[0]
    if layout.num_ranks == members.size:
        return _ranks(holders), holders[0]
    why = "" if known.is_attached else "is not a parameter of an attached model and "
    raise LayoutError(
        f"rank {members.rank} of {members.size}: the norm cannot be told, because {known.name} "
        f"({layout.kind}) {why}speaks of {layout.num_ranks} of the group's {members.size} ranks, "
        "and the others may hold copies of it or other parameters. Call scaler.attach(model) with "
        "the model as it is wrapped for training; if that does not settle it, declare it with "
        "attach(model, copies=shardscale.distinct) or a function."
    )


def _copies(known: _Known, param: Tensor, members: Members) -> Sequence[int]:
    """The ranks that hold the same as this one besides its layout, in order."""
    assert known.copies is not None
    declared = known.copies(known.name, param)
    if declared is None:
        return [members.here]
    if isinstance(declared, dist.ProcessGroup):
        declared = dist.get_process_group_ranks(declared)
    ranks = sorted(set(declared))
    if members.here not in ranks:
        raise LayoutError(
            f"rank {members.here}: copies= says that {known.name} is held by {_ranks(ranks)}, "
            "which leaves out this rank. Return the ranks that hold it, this one included, or None "
            "for nowhere else."
        )
    if members.ranks is not None and not members.ranks.issuperset(ranks):
        raise LayoutError(
            f"rank {members.here}: copies= says that {known.name} is held by {_ranks(ranks)}, but "
            f"this scaler agrees with {_ranks(members.ranks)} only. Return ranks of that group, or "
            "make the scaler with a process_group= of all of them."
        )
    return ranks


def _ranks(ranks: Iterable[int]) -> str:
    """Ranks for people, runs of more than two shortened: "ranks 0-3, 8"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    texts = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return ("rank " if sum(map(len, runs)) == 1 else "ranks ") + ", ".join(texts)
