"""Which optimizer went through which call since the last update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.amp.grad_scaler import OptState

from shardscale.errors import ConfigError, StageError
from shardscale.records import Agreement, Call

__all__ = ["Entry", "Stages", "as_list"]


@dataclass
class Entry:
    """What is known of one optimizer since the last update."""

    optimizer: Any  # kept, so that its id is not taken by another
    stage: OptState = OptState.READY
    agreement: Agreement | None = None
    call: Call | None = None
    has_grads: bool = False  # on this rank
    is_unscaled: bool = False
    divisor: Tensor | None = None  # () float32: scale and clipping, left to the optimizer's kernel
    iteration: object = None  # the newest that had begun when it was judged

    @property
    def was_judged(self) -> bool:
        """Whether its gradients have a verdict."""
        return self.agreement is not None


class Stages:
    """The calls of one iteration on this rank.

    An optimizer goes from READY through UNSCALED (``unscale_``, ``clip_grad_norm_``) to STEPPED;
    ``update`` makes all READY again. A call without an optimizer is counted: each ``unscale_(())``
    lets one later ``step(())`` send nothing.
    """

    def __init__(self) -> None:
        self.entries: dict[int, Entry] = {}
        self.num_calls = 0
        self.num_unused_empty = 0  # verdicts without an optimizer that no step(()) has used yet
        self.empty: list[tuple[Agreement, Call]] = []  # the verdicts this rank only joined in

    def of(self, optimizer: Any) -> Entry:
        """The optimizer's entry, made at first sight."""
        return self.entries.setdefault(id(optimizer), Entry(optimizer))

    def clear(self) -> None:
        """Begin anew after an update."""
        self.entries = {}
        self.empty = []
        self.num_calls = 0
        self.num_unused_empty = 0

    def agreements(self) -> list[tuple[Agreement, Call]]:
        """Every verdict since the last update, once, with the call that made it."""
        found = [(e.agreement, e.call) for e in self.entries.values() if e.agreement and e.call]
        return _once(found + self.empty)

    def verdicts(self, optimizers: Sequence[Any]) -> list[tuple[Agreement, Call]]:
        """The verdicts these optimizers have, each once; for none, those this rank joined in."""
        if not optimizers:
            return self.empty
        entries = [self.of(optimizer) for optimizer in optimizers]
        return _once([(e.agreement, e.call) for e in entries if e.agreement and e.call])

    def needs_verdict(self, optimizers: Sequence[Any]) -> bool:
        """Whether a step of these must make a verdict; a step without any uses one up."""
        if optimizers:
            return not all(self.of(optimizer).was_judged for optimizer in optimizers)
        if self.num_unused_empty == 0:
            return True
        self.num_unused_empty -= 1
        return False

    def mistake_in_unscaling(self, optimizers: Sequence[Any]) -> StageError | None:
        """Why ``unscale_`` cannot be called now, or None."""
        stages = [self.of(o).stage for o in optimizers]
        if OptState.STEPPED in stages:
            return StageError(
                "unscale_() is being called after step(). Call update() between two iterations."
            )
        if OptState.UNSCALED in stages:
            return StageError(
                "unscale_() has already been called on this optimizer since the last update(). "
                "Call it once per step, after the last backward of an accumulation."
            )
        return None

    def mistake_in_clipping(self, optimizers: Sequence[Any]) -> StageError | None:
        """Why ``clip_grad_norm_`` cannot be called now, or None."""
        stages = {self.of(o).stage for o in optimizers}
        if OptState.STEPPED in stages:
            return StageError(
                "unscale_() is being called after step(). Call clip_grad_norm_() before step()."
            )
        return _mixed("clip_grad_norm_") if len(stages) > 1 else None

    def mistake_in_stepping(self, optimizers: Sequence[Any]) -> StageError | None:
        """Why ``step`` cannot be called now, or None."""
        entries = [self.of(o) for o in optimizers]
        if any(e.stage is OptState.STEPPED for e in entries):
            return StageError(
                "step() has already been called since the last update(). "
                "Call update() once all optimizers of the iteration have stepped."
            )
        return _mixed("step") if len({e.was_judged for e in entries}) > 1 else None

    def of_one_backward(self, optimizers: Sequence[Any], iteration: object) -> list[Any]:
        """These optimizers, and before them those judged since the last ``begin``.

        What they hold are the gradients of one iteration.
        """
        asking = set(map(id, optimizers))
        before = [e for key, e in self.entries.items() if e.was_judged and key not in asking]
        return [*(e.optimizer for e in before if e.iteration is iteration), *optimizers]

    def mark_stepped(self, optimizers: Sequence[Any]) -> None:
        """These optimizers have consumed their gradients."""
        for optimizer in optimizers:
            self.of(optimizer).stage = OptState.STEPPED

    def left_to_divide(self) -> list[Any]:
        """Optimizers that have not stepped, and so not clipped their gradients yet."""
        entries = [e for e in self.entries.values() if e.stage is not OptState.STEPPED]
        return [e.optimizer for e in entries if e.divisor is not None]

    def left_unscaled(self) -> list[tuple[Any, Agreement]]:
        """Optimizers whose gradients are unscaled and not consumed, with their verdicts."""
        entries = [e for e in self.entries.values() if e.is_unscaled]
        return [
            (e.optimizer, e.agreement)
            for e in entries
            if e.agreement and e.stage is not OptState.STEPPED
        ]


def as_list(optimizers: Any) -> tuple[list[Any], bool]:
    """One optimizer or a sequence of them as a list, and whether it was a single one.

    Raises:
        ConfigError: something is no optimizer, or one is named twice.
    """
    single = hasattr(optimizers, "param_groups")
    try:
        listed = [optimizers] if single else list(optimizers)
    except TypeError:
        listed, single = [optimizers], True
    for optimizer in listed:
        if not (hasattr(optimizer, "param_groups") and hasattr(optimizer, "step")):
            raise ConfigError(
                f"{type(optimizer).__name__} was passed as an optimizer, but has no param_groups "
                "and step. Pass an optimizer, a sequence of them, or () on a rank that has none."
            )
    if len(set(map(id, listed))) < len(listed):
        raise ConfigError("an optimizer is named twice in one call. Name each one once.")
    return listed, single


def _once(found: list[tuple[Agreement, Call]]) -> list[tuple[Agreement, Call]]:
    return list({id(agreement): (agreement, call) for agreement, call in found}.values())


def _mixed(method: str) -> StageError:
    return StageError(
        f"{method}() was given optimizers of which only some have a verdict. Unscale all of them "
        f"in one call, or none, before {method}()."
    )
