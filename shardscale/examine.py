"""What one rank finds in its own gradients, before any other rank is asked."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from shardscale import kernels
from shardscale.backward import refuse_optimizers_in_backward
from shardscale.errors import LayoutError, StageError
from shardscale.layouts import Layouts
from shardscale.placements import align_
from shardscale.records import Members, ScaleState, ShardStats
from shardscale.shards import LocalShards, local_shards, params_of, require_apart
from shardscale.stages import Entry, Stages
from shardscale.stamps import Stamps, those_alive

__all__ = ["Examiner", "Question", "divisor_of", "leave_to_step", "nothing_found", "stamp_of"]


class Question(NamedTuple):
    """What a method of the scaler wants judged."""

    method: str
    optimizers: Sequence[Any]
    mistake: StageError | None = None  # a call-order error that this rank has already found
    max_norm: float | Tensor | None = None  # asks for the norm, too; a tensor is () float32
    leaves_scaled: Callable[[Any], bool] = lambda optimizer: False  # judged, but not multiplied


class Examiner:
    """Looks at the gradients of one question.

    Args:
        layouts: Names of parameters, and who counts them.
        stages: What is known of the optimizers.
        stamps: Which scales their gradients have.
        members: The ranks that agree.
    """

    def __init__(self, layouts: Layouts, stages: Stages, stamps: Stamps, members: Members) -> None:
        self._layouts = layouts
        self._stages = stages
        self._stamps = stamps
        self._members = members
        self._gathered: kernels.Gathered | None = None  # of all that is asked about

    def prepare(self, optimizers: Sequence[Any], timeout_s: float | None) -> None:
        """Bring DTensor gradients to their parameters' placements, and refuse wrong optimizers.

        Args:
            optimizers: Those of the question.
            timeout_s: Seconds that a sum of Partial gradients may take; None for the default.

        Raises:
            LayoutError: a gradient cannot be judged; names the parameter.
            StageError: a wrapper holds gradients back; names it.

        Collective: the ranks of a mesh that has Partial gradients sum these.
        """
        params = list(chain.from_iterable(map(params_of, optimizers)))
        gathered = kernels.gather(params)
        sharded: list[DTensor] = []
        if gathered is not None:  # every gradient is placed as its parameter
            sharded = gathered.firsts
        elif DTensor in set(map(type, params)):
            sharded = list({id(p): p for p in params if isinstance(p, DTensor)}.values())
            summed = align_(sharded, self._layouts.name_of, timeout_s)
            self._layouts.mark_summed(summed)
        self._gathered = gathered
        self._layouts.require_inside(sharded, self._members)
        self._layouts.require_synced(params, self._members)
        self._layouts.require_in_use(params)
        self._require_unshared(optimizers)

    def measure(
        self, question: Question, state: ScaleState
    ) -> tuple[ShardStats, list[list[Tensor]]]:
        """What this rank finds, and the gradients it found it in, for each optimizer.

        Raises:
            LayoutError: a gradient cannot be judged; names the parameter.
            StageError: an optimizer has stepped inside backward.

        Sync: none on an accelerator.
        """
        found_inf = torch.zeros_like(state.scale)
        squares = None if question.max_norm is None else _zero_squares(state)
        if isinstance(question.max_norm, Tensor):  # nobody has looked at it yet
            found_inf = torch.where(question.max_norm >= 0, found_inf, 1.0)
        grads: list[list[Tensor]] = []
        found = self._shards_of(question.optimizers, squares is not None)
        for optimizer, shards in zip(question.optimizers, found, strict=True):
            entry = self._stages.of(optimizer)
            earlier = None if entry.was_judged else self._stamps.unscaled_before(optimizer)
            since = earlier.made_since(params_of(optimizer)) if earlier else ()
            if not shards.grads:  # they may be gone already
                refuse_optimizers_in_backward(params_of(optimizer), self._layouts.name_of)
            grads.append(shards.grads)
            if earlier is not None:
                self._unscale_made_since_(shards, since, optimizer, state, found_inf)
                found_inf = torch.maximum(found_inf, earlier.agreement.found_inf)
                entry.is_unscaled = True
            inv_scale = kernels.inverse_scale(divisor_of(entry, self._stamps, state))
            examine_ = kernels.unscale_
            if question.leaves_scaled(optimizer):
                examine_ = kernels.check_
            if squares is not None:
                owned, copies = self._split(shards)
                examine_(owned, inv_scale, found_inf, squares)
                examine_(copies, inv_scale, found_inf)
            else:
                examine_(shards.grads, inv_scale, found_inf)
            if entry.agreement is not None:
                found_inf = torch.maximum(found_inf, entry.agreement.found_inf)
        return ShardStats(found_inf, squares), grads

    def _shards_of(self, optimizers: Sequence[Any], coalesced: bool) -> list[LocalShards]:
        """Each optimizer's local shards."""
        if self._gathered is not None and len(optimizers) == 1:
            return [LocalShards(self._gathered.params, self._gathered.grads)]
        name_of = self._layouts.name_of
        shards = [local_shards(optimizer, name_of, coalesced) for optimizer in optimizers]
        if self._gathered is None and len(shards) > 1:  # else they were found apart
            require_apart(shards, name_of)
        return shards

    def _unscale_made_since_(
        self,
        shards: LocalShards,
        since: Container[int],
        optimizer: Any,
        state: ScaleState,
        found_inf: Tensor,
    ) -> None:
        """Unscale what an optimizer, unscaled before an update, has got besides."""
        grads = [g for p, g in zip(*shards, strict=True) if id(p) in since]
        if grads:
            inv_scale = kernels.inverse_scale(self._stamps.of([optimizer], state.scale))
            kernels.unscale_(grads, inv_scale, found_inf)

    def _require_unshared(self, optimizers: Sequence[Any]) -> None:
        """No gradient may belong to two optimizers: it would be unscaled and stepped twice."""
        iteration = self._stamps.iteration
        together = self._stages.of_one_backward(optimizers, iteration)
        known = set(map(id, together))
        together = [
            *(one for one in those_alive(iteration.stepped) if id(one) not in known),
            *together,
        ]
        seen: set[int] = set()
        for optimizer in together if len(together) > 1 else ():
            mine = {id(p): p for p in params_of(optimizer) if p.grad is not None}
            for key in mine.keys() & seen:
                raise LayoutError(
                    f"{self._layouts.name_of(mine[key])} is in two optimizers that are stepped in "
                    "one iteration, so its one gradient would be unscaled and applied twice. Keep "
                    "it in one of them, or scale a new loss between the two."
                )
            seen |= mine.keys()

    def _split(self, shards: LocalShards) -> tuple[list[Tensor], list[Tensor]]:
        """The gradients that this rank counts in the norm, and those that another one counts."""
        members = self._members
        if members.size == 1:
            return shards.grads, []
        owned: list[Tensor] = []
        copies: list[Tensor] = []
        for param, grad in zip(*shards, strict=True):
            (owned if self._layouts.is_owner(param, members) else copies).append(grad)
        return owned, copies


def stamp_of(
    optimizers: Sequence[Any], stages: Stages, stamps: Stamps, state: ScaleState
) -> Tensor:
    """The scale, () float32, that the gradients have: 1 where they were unscaled before."""
    iteration = stamps.iteration
    unscaled = iteration.num_unscaled_empty > 0 and not optimizers
    for optimizer in optimizers if iteration.unscaled else ():
        is_open = not stages.of(optimizer).was_judged
        unscaled = unscaled or (is_open and stamps.unscaled_before(optimizer) is not None)
    if unscaled:
        return torch.ones_like(state.scale)
    return stamps.of(optimizers, state.scale)


def divisor_of(entry: Entry, stamps: Stamps, state: ScaleState) -> Tensor:
    """What an optimizer's gradients are still to be divided by: () float32."""
    if entry.divisor is not None:
        return entry.divisor
    if entry.is_unscaled:
        return torch.ones_like(state.scale)
    return stamps.of([entry.optimizer], state.scale)


def leave_to_step(entry: Entry, stamps: Stamps, state: ScaleState, factor: Tensor) -> Tensor:
    """Have an optimizer's kernel clip, by the divisor that it is given in any case.

    Args:
        entry: The optimizer's.
        stamps: Which scales gradients have.
        state: As it is.
        factor: () float32, 0 to 1: what the gradients are to be multiplied by.

    Returns:
        () float32: what they are to be multiplied by all the same; exactly 1 unless float32 does
        not hold the divisor, as for a factor of 0.
    """
    divisor = divisor_of(entry, stamps, state)
    factor = factor.to(divisor.device, non_blocking=True)
    largest = torch.finfo(torch.float32).max
    quotient = divisor / factor
    fits = quotient <= largest
    entry.divisor = torch.where(fits, quotient, largest)
    return torch.where(fits, 1.0, largest / divisor * factor)


def nothing_found(state: ScaleState) -> ShardStats:
    """What a rank reports that has not looked."""
    return ShardStats(torch.zeros_like(state.scale), None)


def _zero_squares(state: ScaleState) -> Tensor:
    device = "cpu" if state.scale.device.type == "mps" else state.scale.device
    return torch.zeros((), dtype=torch.float64, device=device)
