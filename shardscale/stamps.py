"""Which scale an optimizer's gradients were made with, and whether they are divided by it yet."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from shardscale.records import Agreement

__all__ = ["Stamps"]


class _Mark(NamedTuple):
    """One gradient as it was: where it lies, and how often it had been written to."""

    storage: StorageWeakRef  # keeps no memory, and its number is given to no other while it lives
    version: int


class _Unscaled(NamedTuple):
    """An optimizer whose gradients were unscaled, and closed by an update before it stepped."""

    optimizer: Any  # kept, so that its id is not taken by another
    marks: list[_Mark]
    agreement: Agreement


@dataclass
class Iteration:
    """What happened since the newest ``begin``, or since the scaler was made."""

    has_begun: bool
    stamp: Tensor | None = None  # () float32: its scale, if that may have changed since
    stepped: dict[int, Any] = field(default_factory=dict)  # by id; kept, so that no other has it
    unscaled: dict[int, _Unscaled] = field(default_factory=dict)


class _Kept(NamedTuple):
    """Gradients that were there, not zero, when a new iteration began."""

    marks: list[_Mark]
    made_with: Tensor  # () float32: the scale they were made with, or that of now if they are zero


class Stamps:
    """The scales of one scaler's iterations, as far as gradients made with them are still there.

    ``begin`` opens an iteration, ``close`` precedes each change of the scale. An optimizer that has
    not stepped since the last ``begin`` has gradients of that iteration, whatever the scale is now.

    Args:
        attached: Gives the parameters of attached models. Their gradients are looked at also before
            the optimizer that has them was ever seen.
    """

    def __init__(self, attached: Callable[[], Sequence[Tensor]] = tuple) -> None:
        self.iteration = Iteration(has_begun=False)
        self._attached = attached
        self._known: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._kept: dict[int, _Kept] = {}
        self._complete: tuple[int, int] | None = None  # so many optimizers had all parameters

    def begin(self, newest: Tensor) -> None:
        """A new iteration: gradients made from here on have the scale ``newest``, () float32.

        Sync: none on an accelerator.
        """
        if self.iteration.stamp is not None:
            for key, optimizer in self._known.items():
                if key not in self.iteration.stepped:
                    is_unscaled = self.verdict_that_unscaled(optimizer) is not None
                    self._keep(key, _params(optimizer), newest, is_unscaled)
            self._keep(_UNSEEN, self._params_unseen(), newest)
        self.open()

    def open(self) -> None:
        """``begin`` where the call is compiled: gradients that are left over are not looked at."""
        # Reads nothing that differs from one iteration to the next: there is nothing to guard.
        self.iteration = Iteration(has_begun=True)

    def close(self, scale: Tensor, unscaled: Iterable[tuple[Any, Agreement]]) -> None:
        """The scale is about to change.

        Args:
            scale: () float32, as it still is.
            unscaled: Optimizers that have not stepped although their gradients are unscaled, with
                their verdicts.
        """
        # Whoever never begins scales by hand, with the scale that is newest then.
        if self.iteration.stamp is None and self.iteration.has_begun:
            self.iteration.stamp = scale.clone()
        for optimizer, agreement in unscaled:
            mine = _Unscaled(optimizer, _marks(_params(optimizer)), agreement)
            self.iteration.unscaled[id(optimizer)] = mine

    def mark_stepped(self, optimizers: Sequence[Any]) -> None:
        """These optimizers have consumed their gradients."""
        for key in _by_id(optimizers):
            self._kept.pop(key, None)
            self.iteration.unscaled.pop(key, None)
        if self.iteration.has_begun:
            self.iteration.stepped.update(_by_id(optimizers))

    def of(self, optimizers: Sequence[Any], newest: Tensor) -> Tensor:
        """The scale, () float32, that these optimizers' gradients were made with."""
        stamp = self.iteration.stamp
        if stamp is None or self.iteration.stepped.keys() >= _by_id(optimizers).keys():
            return newest
        return stamp

    def verdict_that_unscaled(self, optimizer: Any) -> Agreement | None:
        """The verdict with which gradients were unscaled before an update, if they still are.

        Whatever has been written to since then holds something else.
        """
        found = self.iteration.unscaled.get(id(optimizer))
        return found.agreement if found and found.marks == _marks(_params(optimizer)) else None

    def made_before(self, optimizer: Any) -> Tensor | None:
        """The scale of an earlier iteration whose gradients are still part of this optimizer's.

        Returns:
            () float32, equal to this iteration's scale where all is well; None if nothing is left.
        """
        key = id(optimizer) if id(optimizer) in self._known else _UNSEEN
        try:
            self._known[id(optimizer)] = optimizer
        except TypeError:  # a container that no weak reference can be made to is not watched
            return None
        kept = self._kept.get(key)
        return kept.made_with if kept and _any_left(kept, _params(optimizer)) else None

    def _params_unseen(self) -> list[Tensor]:
        """Attached parameters to train that are in no optimizer seen so far."""
        attached = self._attached()
        if self._complete == (len(self._known), len(attached)):
            return []
        seen = {id(p) for optimizer in self._known.values() for p in _params(optimizer)}
        unseen = [p for p in attached if p.requires_grad and id(p) not in seen]
        if not unseen:
            self._complete = len(self._known), len(attached)
        return unseen

    def _keep(
        self, key: int, params: Sequence[Tensor], newest: Tensor, is_unscaled: bool = False
    ) -> None:
        marks = _marks(params)
        if not marks:
            self._kept.pop(key, None)
            return
        stamp = self.iteration.stamp
        assert stamp is not None
        before = torch.ones_like(newest) if is_unscaled else stamp
        if newest.is_cpu and before.item() == newest.item() and key not in self._kept:
            return  # on the host it costs nothing to know
        earlier = self._kept.get(key)
        if earlier and _any_left(earlier, params):
            before = torch.where(earlier.made_with == stamp, before, earlier.made_with)
        # Gradients that were set to zero in place are there, but carry nothing.
        made_with = torch.where(_any_nonzero(params, newest), before, newest)
        self._kept[key] = _Kept(marks, made_with)


_UNSEEN = 0  # is no object's id; the attached parameters whose optimizer was not seen yet


def _params(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _local_grads(params: Sequence[Tensor]) -> list[Tensor]:
    local = [getattr(p.grad, "_local_tensor", p.grad) for p in params]
    # What is neither plain nor sharded by DTensor has no memory that could be asked for here.
    return [g for g in local if type(g) is Tensor and g.layout == torch.strided]


def _marks(params: Sequence[Tensor]) -> list[_Mark]:
    grads = _local_grads(params)
    return [_Mark(StorageWeakRef(g.untyped_storage()), g._version) for g in grads]


def _any_left(kept: _Kept, params: Sequence[Tensor]) -> bool:
    before = {mark.storage.cdata for mark in kept.marks}
    return any(g.untyped_storage()._cdata in before for g in _local_grads(params))


def _any_nonzero(params: Sequence[Tensor], newest: Tensor) -> Tensor:
    """() bool on the device of ``newest``.

    Sync: none on an accelerator, unless the gradients are on another device.
    """
    found = torch.zeros_like(newest, dtype=torch.bool)
    for g in _local_grads(params):
        found = found | g.any().to(newest.device)
    return found


def _by_id(optimizers: Sequence[Any]) -> dict[int, Any]:
    # A call without optimizers is one on behalf of the other ranks' ones; 0 is no object's id.
    return {id(o): o for o in optimizers} or {0: None}
