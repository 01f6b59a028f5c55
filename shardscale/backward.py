"""Optimizers that run inside backward cannot wait for a verdict: refused, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from shardscale.errors import StageError

__all__ = ["mistake_inside_backward", "refuse_optimizers_in_backward"]


def mistake_inside_backward(method: str, begun_in: int) -> StageError | None:
    """Why a method that asks for a verdict cannot be called now, or None.

    Args:
        method: Its name.
        begun_in: Inside which backward pass the iteration began, -1 for none. A training that runs
            inside a backward pass as a whole is as good as any.
    """
    task = torch._C._current_graph_task_id()
    if task < 0 or task == begun_in:
        return None
    return StageError(
        f"{method}() was called inside backward(), by a hook. The other gradients of this loss are "
        "not there yet, so no verdict can cover them, and a parameter stepped now could not be "
        f"put back when one of them overflows. Call {method}() after backward() has returned."
    )


def refuse_optimizers_in_backward(
    params: Iterable[Tensor], name_of: Callable[[Tensor], str]
) -> None:
    """Refuse parameters whose optimizer steps as soon as their gradient is there.

    Args:
        params: The parameters.
        name_of: What to call one of them.

    Raises:
        StageError: torch's ``_apply_optimizer_in_backward`` was applied to one.

    Source: ``torch.distributed.optim._apply_optimizer_in_backward``, which marks the parameters.
    """
    for param in params:
        optimizers = getattr(param, "_in_backward_optimizers", ())
        if optimizers:
            raise StageError(
                f"{type(optimizers[0]).__name__} of {name_of(param)} steps inside backward() "
                "(_apply_optimizer_in_backward), on a gradient that is still scaled and that no "
                "rank has judged. Make the optimizer over the parameters as usual, and step it "
                "with scaler.step(optimizer) after backward()."
            )
