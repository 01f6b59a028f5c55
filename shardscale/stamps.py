"""Which scale an optimizer's gradients were made with, and whether they are divided by it yet."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from shardscale.records import Agreement

__all__ = ["Stamps", "Unscaled", "those_alive"]

# Optimizers, told apart by identity and not kept alive: id -> weak reference.
_Refs = dict[int, Any]


class Unscaled(NamedTuple):
    """Gradients that were unscaled, and closed by an update before their optimizer stepped."""

    # Where they lie. Such a reference keeps no memory, and its number is given to no other storage
    # while it lives. What lies elsewhere was made since; what was only written to was not.
    places: frozenset[StorageWeakRef]
    agreement: Agreement  # that of their unscaling

    def made_since(self, params: Iterable[Tensor]) -> set[int]:
        """The ids of those parameters whose gradients are not among them."""
        return {id(p) for p in params if not (found := _places([p])) or not found <= self.places}


class _Kept(NamedTuple):
    """Gradients that were there, not zero, when a new iteration began."""

    places: frozenset[StorageWeakRef]
    made_with: Tensor  # () float32: the scale they were made with, or that of now if they are zero


@dataclass
class Iteration:
    """What happened since the newest ``begin``, or since the scaler was made."""

    has_begun: bool
    graph_task: int = -1  # of the backward pass inside which it began; -1 outside
    stamp: Tensor | None = None  # () float32: its scale, if that may have changed since
    in_graph: bool = False  # whether the stamp was made by a graph that is captured
    stepped: _Refs = field(default_factory=dict)
    unscaled: list[tuple[Any, Unscaled]] = field(default_factory=list)  # a weak reference first
    num_unscaled_empty: int = 0  # unscaled calls without an optimizer, likewise closed


class Attached(Protocol):
    """The parameters of attached models."""

    def __len__(self) -> int: ...

    def params(self) -> list[Tensor]:
        """Those that still exist."""
        ...


class Stamps:
    """The scales of one scaler's iterations, as far as gradients made with them are still there.

    ``begin`` opens an iteration, ``close`` precedes each change of the scale. An optimizer that has
    not stepped since the last ``begin`` has gradients of that iteration, whatever the scale is now.

    Args:
        attached: Of these parameters the gradients are looked at also before the optimizer that has
            them was ever seen.
    """

    def __init__(self, attached: Attached | None = None) -> None:
        self.iteration = Iteration(has_begun=False)
        self._attached = attached
        self._known: _Refs = {}
        self._kept: dict[int, _Kept] = {}
        self._num_complete = 0  # so many attached parameters were all in optimizers that are known

    def begin(self, newest: Tensor) -> None:
        """A new iteration: gradients made from here on have the scale ``newest``, () float32.

        Sync: none on an accelerator.
        """
        if self.iteration.stamp is not None:
            self._look_at_what_is_left(newest)
        self.open()
        self.iteration.graph_task = torch._C._current_graph_task_id()

    def open(self) -> None:
        """``begin`` where the call is compiled: gradients that are left over are not looked at."""
        # Reads nothing that differs from one iteration to the next: there is nothing to guard.
        self.iteration = Iteration(has_begun=True)

    def close(
        self,
        scale: Tensor,
        unscaled: Iterable[tuple[Any, Agreement]],
        num_empty: int,
        captured: bool = False,
    ) -> None:
        """The scale is about to change.

        Args:
            scale: () float32, as it still is.
            unscaled: Optimizers that have not stepped although their gradients are unscaled, with
                their verdicts.
            num_empty: How many calls without an optimizer have unscaled and not stepped.
            captured: Whether this is part of a graph.
        """
        iteration = self.iteration
        # Whoever never begins scales by hand, with the scale that is newest then.
        if not iteration.has_begun:
            return
        if iteration.stamp is None:
            iteration.stamp, iteration.in_graph = scale.clone(), captured
        for optimizer, agreement in unscaled:
            mine = Unscaled(_places(_params(optimizer)), agreement)
            iteration.unscaled.append((_weak(optimizer), mine))
        iteration.num_unscaled_empty += num_empty

    def mark_stepped(self, optimizers: Sequence[Any]) -> None:
        """These optimizers have consumed their gradients."""
        for optimizer in optimizers or [_NOBODY]:
            self._kept.pop(id(optimizer), None)
            if self.iteration.has_begun:
                self.iteration.stepped[id(optimizer)] = _weak(optimizer)

    def of(self, optimizers: Sequence[Any], newest: Tensor) -> Tensor:
        """The scale, () float32, that these optimizers' gradients were made with.

        Calls without optimizers are taken for calls with one and the same. Whoever makes them
        cannot tell the second optimizer of other ranks from the first one's next iteration.
        """
        stamp, stepped = self.iteration.stamp, self.iteration.stepped
        if stamp is None or all(_has(stepped, one) for one in optimizers or [_NOBODY]):
            return newest
        return stamp

    def unscaled_before(self, optimizer: Any) -> Unscaled | None:
        """The gradients of an optimizer that were unscaled before an update of this iteration."""
        if not self.iteration.unscaled or _has(self.iteration.stepped, optimizer):
            return None
        mine = [found for ref, found in self.iteration.unscaled if ref() is optimizer]
        return mine[-1] if mine else None

    def made_before(self, optimizer: Any) -> Tensor | None:
        """The scale of an earlier iteration whose gradients are still part of this optimizer's.

        Returns:
            () float32, equal to this iteration's scale where all is well; None if nothing is left.
        """
        key = id(optimizer) if _has(self._known, optimizer) else _UNSEEN
        if key == _UNSEEN:
            self._known[id(optimizer)] = _weak(optimizer)
        kept = self._kept.get(key)
        return kept.made_with if kept and kept.places & _places(_params(optimizer)) else None

    def _look_at_what_is_left(self, newest: Tensor) -> None:
        if len(self._known) > len(self.iteration.stepped):  # else none is gone
            self._known = {key: ref for key, ref in self._known.items() if ref() is not None}
        waiting = [one for one in those_alive(self._known) if not _has(self.iteration.stepped, one)]
        unseen = self._params_unseen()
        if waiting or unseen or self._kept:
            kept = {id(one): self._keep(id(one), _params(one), newest, one) for one in waiting}
            kept[_UNSEEN] = self._keep(_UNSEEN, unseen, newest)
            self._kept = {key: found for key, found in kept.items() if found is not None}

    def _params_unseen(self) -> list[Tensor]:
        """Attached parameters to train that are in no optimizer seen so far."""
        if self._attached is None or self._num_complete == len(self._attached):
            return []
        seen = {id(p) for optimizer in those_alive(self._known) for p in _params(optimizer)}
        unseen = [p for p in self._attached.params() if p.requires_grad and id(p) not in seen]
        if not unseen:
            self._num_complete = len(self._attached)
        return unseen

    def _keep(
        self, key: int, params: Sequence[Tensor], newest: Tensor, optimizer: Any = None
    ) -> _Kept | None:
        places = _places(params)
        stamp = self.iteration.stamp
        assert stamp is not None
        before = stamp
        if optimizer is not None and self.unscaled_before(optimizer):
            before = torch.ones_like(newest)
        earlier = self._kept.get(key)
        # On the host it costs nothing to know.
        changed = not newest.is_cpu or before.item() != newest.item()
        if not places or not (changed or earlier):
            return None
        if earlier and earlier.places & places:
            before = torch.where(earlier.made_with == stamp, before, earlier.made_with)
        # Gradients that were set to zero in place are there, but carry nothing.
        return _Kept(places, torch.where(_any_nonzero(params, newest), before, newest))


class _Nobody:
    """Stands for an optimizer in calls without one."""

    param_groups = ()


_NOBODY = _Nobody()
_UNSEEN = 0  # is no object's id; the attached parameters whose optimizer was not seen yet


def those_alive(refs: _Refs) -> list[Any]:
    """The optimizers behind the references that still exist."""
    return [one for ref in refs.values() if (one := ref()) is not None]


def _has(refs: _Refs, optimizer: Any) -> bool:
    ref = refs.get(id(optimizer))
    return ref is not None and ref() is optimizer


def _weak(optimizer: Any) -> Any:
    try:
        return weakref.ref(optimizer)
    except TypeError:  # a container that no weak reference can be made to
        return lambda: optimizer


def _params(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _local_grads(params: Sequence[Tensor]) -> list[Tensor]:
    local = [getattr(p.grad, "_local_tensor", p.grad) for p in params if p.grad is not None]
    local = [getattr(g, "elem", g) for g in local]  # of a collective that is still under way
    local = [g._values() if g.layout == torch.sparse_coo else g for g in local]
    # What is of another kind has no memory that could be asked for here.
    return [g for g in local if type(g) is Tensor and g.layout == torch.strided]


def _places(params: Sequence[Tensor]) -> frozenset[StorageWeakRef]:
    return frozenset(StorageWeakRef(g.untyped_storage()) for g in _local_grads(params))


def _any_nonzero(params: Sequence[Tensor], newest: Tensor) -> Tensor:
    """() bool on the device of ``newest``.

    Sync: none on an accelerator, unless the gradients are on another device.
    """
    found = torch.zeros_like(newest, dtype=torch.bool)
    for g in _local_grads(params):
        found = found | g.any().to(newest.device)
    return found
