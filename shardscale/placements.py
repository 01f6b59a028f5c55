"""DTensor gradients are brought to the placements of their parameters before they are judged.

Under sequence parallelism each rank sees a part of the sequence, so the gradient of a replicated
weight, a norm's for example, is *Partial*: the sum over the ranks is still to be made. And where
shards are uneven, torch sometimes leaves the gradient of a sharded parameter replicated.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from shardscale.comm import ProcessGroupComm
from shardscale.errors import LayoutError, MissingRankError

__all__ = ["align_"]


class _Sum(NamedTuple):
    """One all-reduce: everything that shares mesh, axis and dtype."""

    mesh: DeviceMesh
    axis: int
    dtype: torch.dtype


def align_(
    params: list[DTensor], name_of: Callable[[Tensor], str], timeout_s: float | None
) -> list[DTensor]:
    """Sum Partial gradients of replicated parameters, cut replicated gradients of sharded ones.

    ``.grad`` is replaced. Every other mismatch is left for ``local_shards`` to refuse.

    Args:
        params: Of all optimizers of a call, in their order, each once.
        name_of: What to call a parameter in an error.
        timeout_s: Seconds that a sum may take; None for the defaults.

    Returns:
        The parameters whose gradient was Partial.

    Raises:
        LayoutError: the ranks of a mesh axis do not have the same Partial gradients, by name, shape
            and dtype. Without names those of one shape cannot be told apart.
        MissingRankError: ranks of a mesh did not come.

    Collective: the ranks of each mesh that has Partial gradients; for each mesh axis and dtype one
        all-reduce of the gradients, and before it one of 2 float64. None for other gradients.
    Sync: none on an accelerator, where gradients that some ranks lack become NaN instead.
    """
    odd = [p for p in params if _is_odd(p)]
    summed = [p for p in odd if _partial_axes(p)]
    sums = [_Sum(p.device_mesh, i, _grad(p).dtype) for p in summed for i in _partial_axes(p)]
    fault: Exception | None = None
    for what in dict.fromkeys(sums):
        together = [p for p in summed if _belongs(p, what)]
        try:
            _sum_(together, what, name_of, timeout_s, gives_up=fault is not None)
        except (LayoutError, MissingRankError) as error:
            fault = fault or error
    if fault is not None:
        raise fault
    for p in odd:
        grad = _grad(p)
        if _is_cut(grad.placements, p.placements):
            p.grad = grad.redistribute(placements=p.placements)  # sends nothing
    return summed


def _grad(param: DTensor) -> DTensor:
    assert isinstance(param.grad, DTensor)
    return param.grad


def _is_odd(param: DTensor) -> bool:
    grad = param.grad
    if not isinstance(grad, DTensor) or grad._spec is param._spec:
        return False
    found, wanted = grad._spec, param._spec
    return bool(found.placements != wanted.placements and found.mesh == wanted.mesh)


def _partial_axes(param: DTensor) -> list[int]:
    """The mesh axes along which the gradient of a replicated parameter is still to be summed."""
    grad = param.grad
    if not isinstance(grad, DTensor):
        return []
    pairs = zip(grad.placements, param.placements, strict=True)
    return [
        axis
        for axis, (found, wanted) in enumerate(pairs)
        if type(found) is Partial and found.reduce_op == "sum" and wanted.is_replicate()
    ]


def _is_cut(found: tuple[Placement, ...], wanted: tuple[Placement, ...]) -> bool:
    pairs = [(f, w) for f, w in zip(found, wanted, strict=True) if f != w]
    if not pairs or not all(f.is_replicate() and w.is_shard() for f, w in pairs):
        return False
    # Where two axes share a dim, to cut along the first one moves what the second has cut.
    dims = [placement.dim for placement in wanted if isinstance(placement, Shard)]
    return len(set(dims)) == len(dims)


def _belongs(param: DTensor, what: _Sum) -> bool:
    is_of_it = param.device_mesh == what.mesh and _grad(param).dtype == what.dtype
    return is_of_it and what.axis in _partial_axes(param)


def _sum_(
    params: list[DTensor],
    what: _Sum,
    name_of: Callable[[Tensor], str],
    timeout_s: float | None,
    gives_up: bool,
) -> None:
    """Add up the gradients of some parameters, or only tell the others that this rank does not."""
    group = what.mesh.get_group(what.axis)
    comm = ProcessGroupComm(group, timeout_s)
    pieces = [_piece(p) for p in params]
    names = [name_of(p) for p in params]
    plan = repr([what.dtype, *((name, p.shape) for name, p in zip(names, params, strict=True))])
    digest = float("nan") if gives_up else float(zlib.crc32(plan.encode()))
    # A transport may crash on messages of different sizes. So first all say what they will send, in
    # a message of a verdict's size: a rank that has gone on to its verdict, because it has nothing
    # to sum, meets it there, and takes the NaN for what a faulted rank sends.
    intent = torch.tensor([torch.nan, digest], dtype=torch.float64, device=pieces[0].device)
    axis = (what.mesh.mesh_dim_names or range(what.mesh.ndim))[what.axis]
    try:
        comm.all_reduce_sum_(intent)
        differs = intent[1] != digest * comm.size
        if gives_up:
            return
        if intent.is_cpu and differs:
            raise LayoutError(
                f"rank {comm.rank} of the {comm.size} along mesh axis {axis!r} has Partial "
                f"gradients for {', '.join(names)}, which the others do not all have, or not in "
                "this order. Run the same backward pass on all ranks of a mesh, and give the "
                "parameters to the optimizers in one order."
            )
        message = torch.cat(pieces)
        comm.all_reduce_sum_(message)
    except MissingRankError as error:
        raise MissingRankError(
            f"the Partial gradients of {', '.join(names)} could not be summed over mesh axis "
            f"{axis!r}: {error}"
        ) from error
    message += torch.where(differs, torch.nan, 0.0)
    for p, total in zip(params, message.split([*map(len, pieces)]), strict=True):
        _replace_grad(p, total, what)


def _piece(param: DTensor) -> Tensor:
    """This rank's summand, flat."""
    piece: Tensor = _grad(param)._local_tensor
    if isinstance(piece, AsyncCollectiveTensor):
        piece = piece.trigger_wait()
    return piece.flatten()


def _replace_grad(param: DTensor, total: Tensor, what: _Sum) -> None:
    grad = _grad(param)
    placements = list(grad.placements)
    placements[what.axis] = Replicate()
    param.grad = DTensor.from_local(
        total.view(grad._local_tensor.shape),
        what.mesh,
        placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )
