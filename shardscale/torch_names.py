"""torch's semi-public names, as thin readers over the same state.

Frameworks and fused optimizers reach for these names of ``torch.amp.GradScaler``. They answer as
torch's do, with agreed values.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import _refresh_per_optimizer_state

from shardscale import kernels
from shardscale.examine import Question
from shardscale.judge import Judge
from shardscale.policy import ScalePolicy
from shardscale.records import ScaleState
from shardscale.shards import local_shards
from shardscale.untraced import leave_untraced

__all__ = ["TorchNames"]


@leave_untraced("_check_inf_per_device", "_unscale_grads_")
class TorchNames:
    """Mixed into the scaler; holds nothing of its own."""

    if TYPE_CHECKING:
        _enabled: bool
        _is_placed: bool
        _judge: Judge
        _policy: ScalePolicy
        _state: ScaleState

        def _place(self, device: torch.device | None = None) -> ScaleState: ...

        get_growth_factor: Callable[[], float]
        get_backoff_factor: Callable[[], float]
        get_growth_interval: Callable[[], int]

    @property
    def _scale(self) -> Tensor | None:
        """() float32, the same object from its first use on; None before."""
        return self._state.scale if self._is_placed else None

    @property
    def _growth_tracker(self) -> Tensor | None:
        """() int32, the same object from its first use on; None before."""
        return self._state.growth_tracker if self._is_placed else None

    @property
    def _init_scale(self) -> float:
        return float(self._state.scale.item())

    @_init_scale.setter
    def _init_scale(self, scale: float) -> None:
        if not self._is_placed:
            self._state.scale.fill_(scale)

    @property
    def _init_growth_tracker(self) -> int:
        return int(self._state.growth_tracker.item())

    @_init_growth_tracker.setter
    def _init_growth_tracker(self, tracker: int) -> None:
        if not self._is_placed:
            self._state.growth_tracker.fill_(tracker)

    @property
    def _growth_factor(self) -> float:
        return self.get_growth_factor()

    @property
    def _backoff_factor(self) -> float:
        return self.get_backoff_factor()

    @property
    def _growth_interval(self) -> int:
        return self.get_growth_interval()

    @property
    def _per_optimizer_states(self) -> dict[int, dict[str, Any]]:
        """For each optimizer's id its stage and its flags by device; READY and none if unknown."""
        known = {
            key: {
                "stage": entry.stage,
                "found_inf_per_device": self._found_inf_per_device(entry.optimizer),
            }
            for key, entry in self._judge.stages.entries.items()
        }
        return defaultdict(_refresh_per_optimizer_state, known)

    def _found_inf_per_device(self, optimizer: Any) -> dict[torch.device, Tensor]:
        agreement = self._judge.stages.of(optimizer).agreement
        return {} if agreement is None else {agreement.flags.device: agreement.found_inf}

    def _check_inf_per_device(self, optimizer: Any) -> dict[torch.device, Tensor]:
        """The agreed flag of an optimizer; the gradients stay scaled.

        Collective: the first call for an optimizer since the last update is the verdict of its
            step, entered by every rank; later calls only read.
        """
        if not self._judge.stages.of(optimizer).was_judged:
            question = Question("step", [optimizer], leaves_scaled=lambda _: True)
            self._judge.judge(question, self._place(), self._policy)
        return self._found_inf_per_device(optimizer)

    @torch.no_grad()
    def _unscale_grads_(
        self, optimizer: Any, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool = True
    ) -> dict[torch.device, Tensor]:
        """Unscale local gradients; the flag, () float32, is this rank's own, as torch's is."""
        grads = local_shards(optimizer, self._judge.layouts.name_of).grads
        if not allow_fp16 and any(grad.dtype == torch.float16 for grad in grads):
            raise ValueError("Attempting to unscale FP16 gradients.")
        local = found_inf.clone()
        kernels.unscale_(grads, inv_scale, local)
        return {local.device: local} if grads else {}

    def _lazy_init_scale_growth_tracker(self, dev: torch.device) -> None:
        self._place(dev)

    def _check_scale_growth_tracker(self, funcname: str) -> tuple[Tensor, Tensor]:
        del funcname  # torch asserts here that scale() came first; our state always exists
        state = self._place()
        return state.scale, state.growth_tracker

    def _get_scale_async(self) -> Tensor | None:
        return self._scale

    def _get_growth_tracker(self) -> int:
        return self._init_growth_tracker if self._enabled else 0

    def _maybe_opt_step(
        self, optimizer: Any, optimizer_state: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Step unless one of the flags in ``optimizer_state`` is set.

        Sync: one read per flag.
        """
        if any(flag.item() for flag in optimizer_state["found_inf_per_device"].values()):
            return None
        return optimizer.step(*args, **kwargs)
