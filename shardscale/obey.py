"""Step or skip, as the verdict says, for every kind of optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from shardscale.caller import warn_caller
from shardscale.errors import StageError, StateError
from shardscale.examine import Question, divisor_of
from shardscale.fused import is_fused, leaves_scaled, step_fused, takes_grad_scaler
from shardscale.judge import Judge
from shardscale.records import Agreement, Call, ScaleState
from shardscale.verdict import joint_found_inf

__all__ = ["Obedience", "refuse_closure"]

Ask = Callable[[Question], Agreement]


class Obedience:
    """One call of ``scaler.step``.

    Args:
        scaler: What optimizers of the older kind are handed.
        judge: Where verdicts come from.
        state: The scale's state, on its device.
        ask: Makes a verdict.
        arguments: Positional and keyword arguments for each ``optimizer.step``.
    """

    def __init__(
        self,
        scaler: object,
        judge: Judge,
        state: ScaleState,
        ask: Ask,
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
    ) -> None:
        self._scaler = scaler
        self._judge = judge
        self._state = state
        self._ask = ask
        self._args, self._kwargs = arguments

    def step(self, optimizers: Sequence[Any]) -> list[Any] | None:
        """What each ``optimizer.step`` returned, or None where they were skipped."""
        stages = self._judge.stages
        reads = not optimizers or not all(map(is_fused, optimizers))
        if self._judge.is_captured(self._state) and reads:
            raise StageError(
                "this step cannot be captured into a graph: the host has to read its verdict. Make "
                "the optimizers with fused=True, or pass them through shardscale.skip_on_device."
            )
        mistake = stages.mistake_in_stepping(optimizers)
        if mistake is None and len(optimizers) == 1 and takes_grad_scaler(optimizers[0]):
            returned = [self._let_it_ask(optimizers[0])]
            self._judge.mark_stepped(optimizers)
            return returned
        if mistake is not None or stages.needs_verdict(optimizers):
            self._ask(Question("step", optimizers, mistake, leaves_scaled=leaves_scaled))
        found = stages.verdicts(optimizers)
        skips = False
        if reads:
            self._judge.read_all()
            skips = True in [self._judge.read(agreement, call) for agreement, call in found]
        self._require_gradients(optimizers)
        returned = [self._step_one(optimizer, found, skips) for optimizer in optimizers]
        self._judge.mark_stepped(optimizers)
        return None if skips else returned

    def _step_one(
        self, optimizer: Any, found: Sequence[tuple[Agreement, Call]], skips: bool
    ) -> Any:
        entry = self._judge.stages.of(optimizer)
        if takes_grad_scaler(optimizer):
            return self._pass_scaler(optimizer)
        if is_fused(optimizer):
            found_inf = joint_found_inf([agreement for agreement, _ in found])
            for agreement, _ in self._judge.stages.agreements():
                if all(agreement is not own for own, _ in found):
                    # Ranks that fell apart over another optimizer must not move this one either.
                    found_inf = torch.maximum(found_inf, agreement.apart.amax())
            grad_scale = None
            if entry.divisor is not None or not entry.is_unscaled:
                grad_scale = divisor_of(entry, self._judge.stamps, self._state)
            return step_fused(optimizer, grad_scale, found_inf, self._args, self._kwargs)
        if skips:
            return None
        if not entry.is_unscaled:
            self._judge.unscale_locally_(optimizer, self._state)
        return optimizer.step(*self._args, **self._kwargs)

    def _let_it_ask(self, optimizer: Any) -> Any:
        """An optimizer that asks for its verdict itself, by torch's semi-public names."""
        returned = self._pass_scaler(optimizer)
        if not self._judge.stages.of(optimizer).was_judged:
            mistake = StageError(
                f"{type(optimizer).__name__}.step(grad_scaler=...) returned without having asked "
                "the scaler for a verdict, so it may have stepped on Inf. It must call "
                "grad_scaler._check_inf_per_device(self) and obey it."
            )
            self._ask(Question("step", [optimizer], mistake, leaves_scaled=leaves_scaled))
        return returned

    def _pass_scaler(self, optimizer: Any) -> Any:
        warn_caller(
            "GradScaler is going to stop passing itself as a keyword argument to the passed "
            f"optimizer: {type(optimizer).__name__}.step(grad_scaler=...) is the older contract. "
            "The newer one reads the optimizer's attributes grad_scale and found_inf.",
            FutureWarning,
        )
        return optimizer.step(*self._args, **self._kwargs, grad_scaler=self._scaler)

    def _require_gradients(self, optimizers: Sequence[Any]) -> None:
        # In a job of many ranks another one may hold them; alone, backward() was forgotten.
        if self._judge.bond.communicator() is not None:
            return
        for optimizer in optimizers:
            if not is_fused(optimizer) and not self._judge.stages.of(optimizer).has_grads:
                raise StateError(
                    "No inf checks were recorded for this optimizer. None of the parameters of "
                    f"{type(optimizer).__name__} has a gradient: call backward() first."
                )


def refuse_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A closure would run the backward pass again, behind the verdict.

    Raises:
        RuntimeError: one is passed, by keyword or by position.
    """
    if "closure" in kwargs or any(map(callable, args)):
        raise RuntimeError(
            "Closure use is not currently supported if GradScaler is enabled. "
            "Compute the loss and its gradients before step()."
        )
