"""Optimizers that skip a bad step on the device, although they were not written to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from shardscale import kernels
from shardscale.errors import ConfigError
from shardscale.fused import is_fused
from shardscale.shards import local_shards, params_of

__all__ = ["skip_on_device"]

AnyOptimizer = TypeVar("AnyOptimizer", bound=Optimizer)


def skip_on_device(optimizer: AnyOptimizer) -> AnyOptimizer:
    """Have an optimizer skip bad steps on the device, so that the host never waits for a verdict.

    Its step is always run. Before it, parameters and state are copied; after it, they are put back
    where the verdict was bad. Both are selections, not arithmetic, so a good step gives the bits
    that it gives without this, and a bad one leaves every bit alone. The optimizer then follows the
    contract of fused ones: ``grad_scale`` and ``found_inf``. Where the flag lies on the host, which
    can look at it for free, nothing is copied for a good step.

    Worth it on an accelerator, for an optimizer that has no ``fused=True``. It must be a
    ``torch.optim.Optimizer`` whose step changes nothing but its parameters and tensors of its
    state, and does not read from the device itself: ``capturable=True`` where there is such a
    choice. On the first step of a parameter, whose state does not exist yet, the host does wait.
    During the step there are two copies of parameters and state. Step hooks of the user's run on a
    bad step, too, and a step that raises on numbers that are not finite raises there.

    Args:
        optimizer: Changed in place. One that is fused is left as it is.

    Returns:
        The same optimizer. A copy or a pickle of it, or its ``state_dict``, is not gated.

    Raises:
        ConfigError: it is no ``torch.optim.Optimizer``, or one around another. From its ``step``:
            it keeps numbers where they cannot be put back; nothing has moved.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = skip_on_device(torch.optim.RMSprop([weight], foreach=True))
    >>> weight.grad = torch.full((2,), torch.inf)
    >>> optimizer.found_inf = torch.ones(())
    >>> optimizer.step()
    >>> weight.tolist()
    [1.0, 1.0]
    """
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(
            f"{type(optimizer).__name__} was given to skip_on_device, but must be a "
            "torch.optim.Optimizer. Give it the optimizers inside a container one by one."
        )
    inner = [name for name, value in vars(optimizer).items() if isinstance(value, Optimizer)]
    if inner:
        raise ConfigError(
            f"{type(optimizer).__name__} steps another optimizer, its {inner[0]!r}, whose state "
            "cannot be put back from outside. Give skip_on_device the inner one, before it is "
            "wrapped, or let the host decide."
        )
    if not is_fused(optimizer):
        gate = _Gate()
        optimizer.register_step_pre_hook(gate.before)
        optimizer.register_step_post_hook(gate.after)
        optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]
        optimizer._is_gated = True  # type: ignore[attr-defined]
    return optimizer


class _Copy(NamedTuple):
    """One tensor that the step may change, as it was."""

    param: Tensor
    key: str | None  # of the parameter's state; None for the parameter itself
    value: Tensor


class _Frame(NamedTuple):
    """One step, as it began."""

    given: dict[str, Tensor | None]  # grad_scale and found_inf
    copies: list[_Copy]
    had: list[tuple[Tensor, set[str]]]  # a parameter, and what its state had
    settings: list[dict[str, Any]]


class _Gate:
    """What is kept from the beginning of one optimizer's step to its end."""

    def __init__(self) -> None:
        # A step that calls the one it overrides runs the hooks twice, one call inside the other.
        # The inner one finds no flag: None stands for it, as for a step without a scaler.
        self._frames: list[_Frame | None] = []
        self._is_proven = False  # a step was seen that changes only what can be put back

    def before(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Copy what the step may change."""
        del args, kwargs
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None:
            self._frames.append(None)
            return
        self._frames.clear()  # of a step that has raised
        # Optimizers that are not fused refuse to step while they have these.
        names = {"grad_scale", "found_inf"} & vars(optimizer).keys()
        given = {name: vars(optimizer).pop(name) for name in names}
        grad_scale = given.get("grad_scale")
        if grad_scale is not None:
            _unscale_(optimizer, grad_scale)
        if self._is_proven and _is_on_host(found_inf) and not found_inf.item():
            self._frames.append(_Frame(given, [], [], []))  # a good step, as the host sees for free
            return
        copies = _copies(optimizer)
        had = [(p, set(_state(optimizer, p))) for p in params_of(optimizer)]
        self._frames.append(_Frame(given, copies, had, _settings(optimizer)))

    @torch.no_grad()
    def after(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Put it back where the verdict was bad."""
        del args, kwargs
        frame = self._frames.pop()
        if frame is None:
            return
        vars(optimizer).update(frame.given)  # whoever set them takes them off
        if not frame.had:  # it was seen to be good, or has no parameters
            return
        found_inf = frame.given["found_inf"]
        assert found_inf is not None
        reason = _why_it_cannot_be_put_back(optimizer, frame)
        if reason:
            found_inf = torch.ones_like(found_inf)
        self._is_proven = not reason
        _put_back_(optimizer, frame.copies, found_inf)
        # What did not exist before cannot be put back by a selection; this once, the host asks.
        fresh = [(p, had) for p, had in frame.had if set(_state(optimizer, p)) - had]
        if fresh and found_inf.item():
            for param, had in fresh:
                _forget(optimizer, param, had)
        if reason:
            raise ConfigError(f"{reason}. It cannot skip on the device; let the host decide.")


def _why_it_cannot_be_put_back(optimizer: Any, frame: _Frame) -> str | None:
    name = type(optimizer).__name__
    for before, group in zip(frame.settings, _settings(optimizer), strict=True):
        changed = [key for key in group if _differ(before.get(key), group[key])]
        if changed:
            return f"{name}.step() changes {changed[0]!r} of its param_groups"
    strange = [key for key in optimizer.state if not isinstance(key, Tensor)]
    if strange:
        return f"{name} keeps {strange[0]!r} in its state, which belongs to no parameter"
    for param, _ in frame.had:
        for key, value in optimizer.state.get(param, {}).items():
            if not isinstance(value, Tensor | None):
                return f"{name} keeps {key!r} of its state as a Python {type(value).__name__}"
    for param, key, value in frame.copies:
        if not _is_alike(_now(optimizer, param, key), value):
            return f"{name}.step() changes the shape or dtype of {key!r} of its state, or drops it"
    return None


def _copies(optimizer: Any) -> list[_Copy]:
    live = [
        _Copy(p, key, _local(value))
        for p in params_of(optimizer)
        for key, value in [(None, p), *_state(optimizer, p).items()]
    ]
    _require_on_one_device(optimizer, live)
    values = [old.value for old in live]
    saved = [torch.empty_like(value) for value in values]
    if values:
        torch._foreach_copy_(saved, values)
    return [old._replace(value=v) for old, v in zip(live, saved, strict=True)]


def _put_back_(optimizer: Any, copies: Sequence[_Copy], found_inf: Tensor) -> None:
    """Where the flag is set: by selection on a device, by not selecting anything on the host."""
    if _is_on_host(found_inf) and not found_inf.item():
        return
    bad_on = {d: found_inf.to(d) > 0 for d in {old.value.device for old in copies}}
    for param, key, value in copies:
        now = _now(optimizer, param, key)
        if _is_alike(now, value):
            torch.where(bad_on[value.device], value, now, out=now)
        else:  # the step is refused, so that the old one comes back in any case
            optimizer.state[param][key] = value


def _is_on_host(found_inf: Tensor) -> bool:
    return found_inf.is_cpu


def _unscale_(optimizer: Any, grad_scale: Tensor) -> None:
    with torch.no_grad():
        inv_scale = kernels.inverse_scale(grad_scale.float())
        grads = local_shards(optimizer, lambda param: f"a {tuple(param.shape)} parameter").grads
        kernels.unscale_(grads, inv_scale, torch.zeros_like(inv_scale))


def _local(tensor: Tensor) -> Tensor:
    local: Tensor = getattr(tensor, "_local_tensor", tensor)  # of a DTensor, this rank's shard
    return local.detach()


def _state(optimizer: Any, param: Tensor) -> dict[str, Tensor]:
    state = optimizer.state.get(param, {})  # looking must not make an entry
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def _now(optimizer: Any, param: Tensor, key: str | None) -> Tensor | None:
    tensor = param if key is None else _state(optimizer, param).get(key)
    return None if tensor is None else _local(tensor)


def _is_alike(now: Tensor | None, value: Tensor) -> TypeGuard[Tensor]:
    if now is None:
        return False
    return (now.shape, now.dtype, now.device) == (value.shape, value.dtype, value.device)


def _settings(optimizer: Any) -> list[dict[str, Any]]:
    """The groups' settings; with a tensor, how often it was written to."""
    return [
        {k: (v, v._version if isinstance(v, Tensor) else 0) for k, v in g.items() if k != "params"}
        for g in optimizer.param_groups
    ]


def _differ(before: Any, now: tuple[Any, int]) -> bool:
    return before is None or before[0] is not now[0] or before[1] != now[1]


def _require_on_one_device(optimizer: Any, live: Sequence[_Copy]) -> None:
    for param, key, value in live:
        if value.device != param.device:
            raise ConfigError(
                f"{type(optimizer).__name__} keeps {key!r} of its state on {value.device}, but "
                f"its parameter is on {param.device}. To skip on the device, make the optimizer "
                "with capturable=True; if it has no such option, let the host decide."
            )


def _forget(optimizer: Any, param: Tensor, had: set[str]) -> None:
    state = optimizer.state[param]
    for key in set(state) - had:
        del state[key]
    if not state:
        del optimizer.state[param]
