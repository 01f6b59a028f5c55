"""Gradients that a wrapper holds back from the other ranks, as ``no_sync`` asks it to."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

__all__ = ["Unit", "units_of"]

_NO_SYNC = "leave no_sync() before the forward and the backward of the last micro-batch"
_FSDP2 = (
    "call set_requires_gradient_sync(True), and set_requires_all_reduce(True) if that was turned "
    "off, before the forward and the backward of the last micro-batch"
)


class Unit(NamedTuple):
    """What holds gradients back as a whole: a DDP or an FSDP1 module, an FSDP2 parameter group."""

    text: str  # for people
    cure: str
    ref: weakref.ref[Any]  # a scaler keeps no model alive
    held_by: Callable[[Any], list[Tensor]]
    """Of ``ref()``, the parameters whose gradients have not met those of other ranks; seldom any.

    One look where there are none, however many parameters the unit has.
    """


def units_of(name: str, module: nn.Module) -> Iterator[tuple[int, Unit]]:
    """The units that a module is, not those within it, each with an id.

    Args:
        name: The module's, in the model that was wrapped.
        module: Any module.
    """
    where = name or "the model"
    if isinstance(module, nn.parallel.DistributedDataParallel):
        yield id(module), Unit(f"{where} (DDP)", _NO_SYNC, weakref.ref(module), _held_by_ddp)
    elif isinstance(module, FullyShardedDataParallel) and module._handle is not None:
        yield id(module), Unit(f"{where} (FSDP1)", _NO_SYNC, weakref.ref(module), _held_by_fsdp1)
    elif isinstance(module, FSDPModule):
        for group in _groups(module):
            yield id(group), Unit(f"{where} (FSDP2)", _FSDP2, weakref.ref(group), _held_by_fsdp2)


def _held_by_ddp(model: Any) -> list[Tensor]:
    # Its forward decides, and leaves the second flag off; a forward without gradients does so, too.
    if model.require_backward_grad_sync or model.require_forward_param_sync:
        return []
    if model.process_group.size() == 1:
        return []
    ignored = model.parameters_to_ignore
    named = model.module.named_parameters()
    return [p for name, p in named if name not in ignored and p.grad is not None]


def _held_by_fsdp1(unit: Any) -> list[Tensor]:
    flat = unit._handle.flat_param
    if flat.grad is None or unit.process_group.size() == 1:
        return []
    # Its backward decides. What it holds back is not sharded, unless nothing ever is.
    is_sharded = unit._handle.uses_sharded_strategy
    if flat.grad.shape == flat.shape if is_sharded else unit._sync_gradients:
        return []
    return [p for p in (flat, *(flat._params or ())) if p.grad is not None]


def _groups(module: Any) -> list[Any]:
    """An FSDP2 module's parameter groups; torch has no public name for them or for what is read."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # an older torch, which has one
        groups = [state._fsdp_param_group]
    return [group for group in groups if all(hasattr(group, name) for name in _READ_OF_GROUPS)]


_READ_OF_GROUPS = ("fsdp_params", "reduce_grads", "_partial_reduce_output")


def _held_by_fsdp2(group: Any) -> list[Tensor]:
    # The flag may be off for the next micro-batch already, or on again too late: what tells is a
    # gradient that waits. Those of one unit wait together, so one look is enough without the flag.
    if group.reduce_grads and group._partial_reduce_output is None:
        for param in group.fsdp_params:
            if param.sharded_param.requires_grad:
                if not _is_pending(param):
                    return []
                break
    # What was scattered, but not added up over the replicas of HSDP, waits in one piece.
    is_partial = group._partial_reduce_output is not None
    trained = [param for param in group.fsdp_params if param.sharded_param.requires_grad]
    return [param.sharded_param for param in trained if is_partial or _is_pending(param)]


def _is_pending(param: Any) -> bool:
    if getattr(param, "unsharded_accumulated_grad", None) is not None:
        return True
    unsharded = getattr(param, "_unsharded_param", None)  # None before the first forward
    return unsharded is not None and unsharded.grad is not None
