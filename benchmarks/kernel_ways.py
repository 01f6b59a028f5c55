"""The ways to unscale and to clip gradients, torch's and ours, each as one call to be timed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from held_gradients import FACTOR, HeldGradients, takes_operator
from parameters import NoStep

from shardscale import ShardedGradScaler
from shardscale.kernels import check_, scale_, unscale_

__all__ = ["Way", "kernel_ways", "of_torch", "scaler_ways", "step_ways"]


def nothing() -> None:
    """What most ways need before and after the call that is timed."""


class Way(NamedTuple):
    """One way, and what belongs to it but is not timed."""

    call: Callable[[], Any]
    passes: int
    """How often it has to read or write all gradients: its least traffic over their bytes."""
    close: Callable[[], Any] = nothing


def kernel_ways(held: HeldGradients, only_unscale: bool = False) -> dict[str, Way]:
    """The kernels alone, without a scaler.

    Args:
        held: The gradients.
        only_unscale: Leave out what does not unscale in one pass.
    """
    grads, device = held.grads, held.device
    target = torch.empty_like(held.flat)
    inv_scale = torch.tensor(FACTOR, device=device)
    found_inf = torch.zeros((), device=device)
    total = torch.zeros((), dtype=torch.float64, device=device)
    ignored = torch.zeros((), device=device)

    def unscale_by_torch() -> None:
        if has_operator:
            torch._amp_foreach_non_finite_check_and_unscale_(grads, ignored, inv_scale)
        else:
            torch._foreach_mul_(grads, inv_scale)

    def check_then_multiply(max_norm: float) -> None:
        total.zero_()
        check_(grads, inv_scale, found_inf, total)
        factor = (max_norm / (total.sqrt() + 1e-6)).clamp(max=1.0) * inv_scale
        scale_(grads, torch.where(found_inf > 0, 1.0, factor).float())

    has_operator = takes_operator(held.dtype, device)
    ways = {
        "copy_": Way(lambda: target.copy_(held.flat), 2),
        "mul_": Way(lambda: held.flat.mul_(FACTOR), 2),
        "torch: unscale_": Way(unscale_by_torch, 2),
        "ours: unscale_": Way(lambda: unscale_(grads, inv_scale, found_inf), 2),
        "ours: unscale_ with the sum": Way(lambda: unscale_(grads, inv_scale, found_inf, total), 2),
    }
    if only_unscale:
        return ways
    return {
        **ways,
        "torch: _foreach_norm": Way(lambda: torch._foreach_norm(grads), 1),
        "ours: check_ with the sum": Way(lambda: check_(grads, inv_scale, found_inf, total), 1),
        "ours: check_, folded multiply": Way(lambda: check_then_multiply(held.max_norm()), 3),
    }


def scaler_ways(held: HeldGradients) -> dict[str, Way]:
    """The scalers' calls: what a training loop calls between backward and step."""
    params = held.parameters()
    theirs, ours = NoStep(params), NoStep(params)
    unscale, _, close_theirs = of_torch(held, theirs)
    scaler = new_scaler(held)

    def clip_by_torch(max_norm: float) -> None:
        unscale()
        torch.nn.utils.clip_grad_norm_(params, max_norm)

    def close() -> None:
        scaler.step(ours)
        scaler.update()

    return {
        "torch: scaler.unscale_": Way(unscale, 2, close_theirs),
        "ours: scaler.unscale_": Way(lambda: scaler.unscale_(ours), 2, close),
        "torch: unscale_ + clip, not active": Way(lambda: clip_by_torch(math.inf), 5, close_theirs),
        "torch: unscale_ + clip, active": Way(
            lambda: clip_by_torch(held.max_norm()), 5, close_theirs
        ),
        "ours: unscale_ + clip, not active": Way(
            lambda: scaler.clip_grad_norm_(ours, math.inf), 2, close
        ),
        "ours: unscale_ + clip, active": Way(
            lambda: scaler.clip_grad_norm_(ours, held.max_norm()), 4, close
        ),
    }


def step_ways(held: HeldGradients) -> dict[str, Way]:
    """The same and torch's fused AdamW, whose step ours has clip in its own pass."""
    params = held.parameters()
    torch._foreach_zero_([p.detach() for p in params])
    # One optimizer, so that its state is in memory once; the scalers take turns with it.
    optimizer = torch.optim.AdamW(params, lr=1e-6, fused=True)
    unscale, step, close_theirs = of_torch(held, optimizer)
    scaler = new_scaler(held, fold_clip=True)

    def by_torch() -> None:
        unscale()
        torch.nn.utils.clip_grad_norm_(params, held.max_norm())
        step()

    def by_ours() -> None:
        scaler.clip_grad_norm_(optimizer, held.max_norm())
        scaler.step(optimizer)

    # The step itself reads gradient, parameter and two moments, and writes all but the gradient.
    return {
        "torch: unscale_ + clip + fused AdamW": Way(by_torch, 5 + 7, close_theirs),
        "ours: fold_clip + fused AdamW": Way(by_ours, 1 + 7, scaler.update),
    }


def of_torch(
    held: HeldGradients, optimizer: torch.optim.Optimizer
) -> tuple[Callable[[], Any], Callable[[], Any], Callable[[], Any]]:
    """torch's scaler, or what comes next to it where it refuses a dtype: unscale, step, close."""
    scaler = torch.amp.GradScaler(
        held.device.type, init_scale=1 / FACTOR, growth_interval=10**9, enabled=True
    )
    scaler.scale(torch.ones((), device=held.device))
    inv_scale = torch.tensor(FACTOR, device=held.device)
    if not takes_operator(held.dtype, held.device):
        return lambda: torch._foreach_mul_(held.grads, inv_scale), optimizer.step, nothing
    if held.dtype == torch.float16:  # the scaler refuses it before it looks at a gradient

        def unscale() -> None:
            ignored = torch.zeros((), device=held.device)
            scaler._unscale_grads_(optimizer, inv_scale, ignored, True)

        return unscale, optimizer.step, nothing
    return (
        lambda: scaler.unscale_(optimizer),
        lambda: scaler.step(optimizer),
        scaler._per_optimizer_states.clear,  # what update() does besides moving the scale
    )


def new_scaler(held: HeldGradients, fold_clip: bool = False) -> ShardedGradScaler:
    """Ours, with a scale that stays what it is."""
    return ShardedGradScaler(
        held.device.type, init_scale=1 / FACTOR, growth_interval=10**9, fold_clip=fold_clip
    )
