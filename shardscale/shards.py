"""From an optimizer to the local gradient shards that this rank can measure and multiply."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from operator import attrgetter
from types import NoneType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from shardscale import kernels
from shardscale.errors import LayoutError

__all__ = ["LocalShards", "local_shards", "params_of", "require_apart"]

_DTYPE = attrgetter("dtype")
_REAL_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_PLAIN = (Tensor, torch.nn.Parameter)
_ADDRESSED = ("cpu", "cuda")  # where our own kernels find gradients by their addresses
_DTYPES = _REAL_DTYPES | {torch.complex64, torch.complex128}


class LocalShards(NamedTuple):
    """An optimizer's gradients on this rank, parallel to the parameters they belong to."""

    params: list[Tensor]  # as the optimizer holds them, DTensor or plain
    grads: list[Tensor]  # real, dense, plain; they share memory with the gradients, may be empty


def local_shards(
    optimizer: Any,
    name_of: Callable[[Tensor], str],
    coalesced: bool = False,
) -> LocalShards:
    """The local shards of an optimizer's gradients, each once, in the optimizer's order.

    Gradients that are None are left out. DTensors give their local tensor; DTensor's own dispatch
    is never asked. Complex gradients give their real view, sparse ones their values.

    Args:
        optimizer: Anything with ``param_groups``.
        name_of: What to call a parameter in an error.
        coalesced: Sparse gradients must hold each element once, as their norm needs; uncoalesced
            ones are replaced. Float16 ones are coalesced, in float32, in any case.

    Raises:
        LayoutError: a gradient has a dtype or layout that cannot be judged, its elements share
            memory, or it is not laid out as its parameter; names the parameter.
    """
    params = list(params_of(optimizer))
    gathered = kernels.gather(params)
    if gathered is not None:
        return LocalShards(gathered.params, gathered.grads)
    if len(set(map(id, params))) < len(params):
        params = list({id(p): p for p in params}.values())
    grads: list[Any] = [p.grad for p in params]
    kinds = set(map(type, grads))
    if NoneType in kinds:
        kinds.remove(NoneType)
        params = [p for p, g in zip(params, grads, strict=True) if g is not None]
        grads = [g for g in grads if g is not None]
    if len(set(map(id, grads))) < len(grads):  # parameters that share one gradient
        once = {id(g): (p, g) for p, g in zip(params, grads, strict=True)}
        params, grads = [p for p, _ in once.values()], [g for _, g in once.values()]
    if kinds == {DTensor}:
        for p, g in zip(params, grads, strict=True):
            if getattr(p, "_spec", None) is not g._spec:
                _require_same_placements(p, g, name_of)
        grads = [g._local_tensor for g in grads]
        kinds = set(map(type, grads))
    if not (kinds <= {Tensor} and _are_plain(grads)):
        grads = [_local(p, g, name_of, coalesced) for p, g in zip(params, grads, strict=True)]
    return _each_memory_once(params, grads, name_of)


def params_of(optimizer: Any) -> Iterator[Tensor]:
    """All parameters of all groups, in order."""
    return chain.from_iterable(group["params"] for group in optimizer.param_groups)


def require_apart(shards: Sequence[LocalShards], name_of: Callable[[Tensor], str]) -> None:
    """No memory may belong to two optimizers of a call: it would be unscaled twice.

    Raises:
        LayoutError: some does; names the parameters.
    """
    params = [p for some in shards for p in some.params]
    grads = [g for some in shards for g in some.grads]
    for one, other in _that_share(params, grads, name_of):
        raise _shared(name_of(params[one]), name_of(params[other]))


def _each_memory_once(
    params: list[Tensor], grads: list[Tensor], name_of: Callable[[Tensor], str]
) -> LocalShards:
    """Leave out gradients that are another one's memory; refuse what shares a part, or has none."""
    left_out = set()
    for one, other in _that_share(params, grads, name_of):
        if not _is_same_memory(grads[one], grads[other]):
            raise _shared(name_of(params[one]), name_of(params[other]))
        left_out.add(other)
    if not left_out:
        return LocalShards(params, grads)
    kept = [i for i in range(len(grads)) if i not in left_out]
    return LocalShards([params[i] for i in kept], [grads[i] for i in kept])


def _that_share(
    params: list[Tensor], grads: list[Tensor], name_of: Callable[[Tensor], str]
) -> Iterator[tuple[int, int]]:
    """Positions of gradients that share memory, each with one before it that it shares.

    What begins in the gaps of another one is not compared with it.
    """
    # Elsewhere torch's operators do the work, and an address may mean nothing.
    ours = [i for i, g in enumerate(grads) if type(g) in _PLAIN and g.device.type in _ADDRESSED]
    plain = [i for i in ours if grads[i].numel()]
    for i in plain:
        if grads[i].data_ptr() == 0:
            raise LayoutError(
                f"the gradient of {name_of(params[i])} has elements, but no memory: it was freed. "
                "Keep gradients until their optimizer has stepped, and drop them with "
                "zero_grad(set_to_none=True)."
            )
    starts = np.array([grads[i].data_ptr() for i in plain], dtype=np.int64)
    ends = starts + np.array([grads[i].nbytes for i in plain], dtype=np.int64)
    order = np.argsort(starts, kind="stable")
    if not (starts[order][1:] < np.maximum.accumulate(ends[order])[:-1]).any():
        return
    newest: dict[torch.device, int] = {}  # of those so far on each device, that which begins last
    dense: dict[torch.device, int] = {}  # and of those without gaps that which ends last
    for at in order:
        i = plain[at]
        device = grads[i].device
        before, around = newest.get(device), dense.get(device)
        if before is not None and grads[before].data_ptr() == starts[at]:
            yield before, i
        elif around is not None and starts[at] < grads[around].data_ptr() + grads[around].nbytes:
            yield around, i
        else:
            newest[device] = i
            if kernels.is_dense(grads[i]):
                dense[device] = i


def _is_same_memory(one: Tensor, other: Tensor) -> bool:
    if (one.data_ptr(), one.dtype, one.numel()) != (other.data_ptr(), other.dtype, other.numel()):
        return False
    return _steps(one) == _steps(other) or (kernels.is_dense(one) and kernels.is_dense(other))


def _steps(grad: Tensor) -> list[tuple[int, int]]:
    pairs = zip(grad.stride(), grad.shape, strict=True)
    return sorted((stride, size) for stride, size in pairs if size > 1)


def _shared(one: str, other: str) -> LayoutError:
    return LayoutError(
        f"the gradients of {one} and {other} share memory, so unscaling in place would multiply a "
        "part of it twice. Clone one."
    )


def _are_plain(grads: list[Tensor]) -> bool:
    if not set(map(_DTYPE, grads)) <= _REAL_DTYPES:
        return False
    try:
        return all(map(Tensor.is_contiguous, grads))
    except RuntimeError:  # a sparse one, which has no such thing
        return False


def _local(
    param: Tensor, grad: Tensor, name_of: Callable[[Tensor], str], coalesced: bool
) -> Tensor:
    if isinstance(grad, DTensor):
        _require_same_placements(param, grad, name_of)
        grad = grad._local_tensor
    if hasattr(grad, "trigger_wait"):  # the result of a functional collective still under way
        grad = grad.trigger_wait()
    if grad.dtype not in _DTYPES:
        raise LayoutError(
            f"the gradient of {name_of(param)} has dtype {grad.dtype}, but only float16, bfloat16, "
            "float32, float64 and complex gradients can be unscaled. Take that parameter out of "
            "the optimizer given to the scaler, or accumulate its gradient in another dtype."
        )
    if grad.layout == torch.sparse_coo:
        grad = _sparse_values(param, grad, coalesced)
    elif grad.layout != torch.strided:
        raise LayoutError(
            f"the gradient of {name_of(param)} has layout {grad.layout}, but only strided and "
            "sparse_coo gradients can be unscaled. Convert it with to_sparse_coo() or to_dense()."
        )
    if grad.is_neg():
        grad = torch._neg_view(grad)  # its memory, whose sign does not matter here
    if grad.is_complex():
        grad = torch.view_as_real(grad.conj() if grad.is_conj() else grad)
    if not grad.is_contiguous() and _overlaps(grad):
        raise LayoutError(
            f"elements of the gradient of {name_of(param)} share memory (shape "
            f"{tuple(grad.shape)}, strides {grad.stride()}), so unscaling in place would multiply "
            "them several times. Clone it first."
        )
    return grad


def _require_same_placements(param: Tensor, grad: Tensor, name_of: Callable[[Tensor], str]) -> None:
    wanted = getattr(param, "_spec", None)
    found = grad._spec  # type: ignore[attr-defined]
    if wanted is not None and wanted.placements == found.placements:
        return
    expected = f"placed as {wanted.placements}" if wanted is not None else "a plain tensor"
    raise LayoutError(
        f"the gradient of {name_of(param)} is placed as {found.placements}, but its parameter is "
        f"{expected}. Redistribute the gradient to its parameter's placements before unscaling."
    )


def _sparse_values(param: Tensor, grad: Tensor, coalesced: bool) -> Tensor:
    if grad.is_coalesced():
        return grad._values()
    if grad.dtype == torch.float16:
        # Duplicates are added in float32, so that only a true overflow is found.
        param.grad = grad = grad.float().coalesce().half()
    elif coalesced:
        param.grad = grad = grad.coalesce()
    return grad._values()


def _overlaps(grad: Tensor) -> bool:
    reach = 0
    for stride, size in _steps(grad):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False
