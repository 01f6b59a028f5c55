"""Ten small steps in which torch's scalers go wrong; each says in a few words what a rank saw.

A case is called at the same time on every rank, and ends on every rank: where torch's class would
leave ranks waiting for one that never comes, that one comes late, and says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed._functional_collectives as functional
from torch import Tensor
from torch.amp import GradScaler
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn import Parameter
from torch.optim import SGD, Adam, AdamW, Optimizer

from shardscale.doctor.ground import Ground
from shardscale.scaler import ShardedGradScaler

__all__ = [
    "Case",
    "default_scale_of_a_float16_loss",
    "fused_adam_after_unscale",
    "fused_step",
    "inf_in_the_last_stage",
    "inf_on_every_rank",
    "many_overflows",
    "meshes_of_two_shapes",
    "nan_on_one_replica",
    "num_collectives",
    "order_of_arguments",
    "plain_and_sharded",
    "rank_without_gradients",
]

Case = Callable[[Callable[[float], GradScaler], Ground], str]
"""Given what makes a scaler from its first scale, say what this rank saw."""


def fused_step(make: Callable[[float], GradScaler], ground: Ground) -> str:
    """F1: the last rank has an Inf, and nobody calls ``unscale_``."""
    p = _plain(ground, math.inf if _is_last(ground) else 4.0)
    return _step(make(4.0), AdamW([p], fused=True), ground)


def inf_on_every_rank(make: Callable[[float], GradScaler], ground: Ground) -> str:
    """F2: a flag that is a sum is not 1 if two ranks are bad."""
    optimizer = SGD([_plain(ground, math.inf)], lr=0.5, fused=True)
    return _step(make(4.0), optimizer, ground, unscale=True)


def fused_adam_after_unscale(make: Callable[[float], GradScaler], ground: Ground) -> str:
    """F2: the flag has the shape that a fused Adam can take."""
    return _step(make(4.0), Adam([_plain(ground, 4.0)], fused=True), ground, unscale=True)


def meshes_of_two_shapes(make: Callable[[float], GradScaler], ground: Ground) -> str:
    """F3: the first gradient lives on fewer ranks than the second, in which rank 1 has an Inf."""
    narrow = _sharded(ground, ground.square["dp"], [Shard(0)], 4.0)
    bad = math.inf if ground.rank == 1 else 4.0
    wide = _sharded(ground, ground.square, [Shard(0), Shard(0)], bad)
    return _step(make(4.0), SGD([narrow, wide], lr=0.5), ground)


def num_collectives(make: Callable[[float], GradScaler], ground: Ground) -> str:
    """F4: gradients of two dtypes, sharded over two axes."""
    placements = [Shard(0), Shard(0)]
    dtypes = (torch.float32, torch.float64)
    params = [_sharded(ground, ground.square, placements, 4.0, dtype) for dtype in dtypes]
    scaler, optimizer = make(4.0), SGD(params, lr=0.5)
    scaler.scale(torch.ones((), device=ground.device))
    with CommDebugMode() as sent:
        scaler.unscale_(optimizer)
    return f"sent {sent.get_total_counts()}"


def nan_on_one_replica(make: Callable[[float], GradScaler], ground: Ground) -> str:
    """F4: rank 0 has a NaN, and the ranks that hold the same shard do not."""
    bad = math.nan if ground.rank == 0 else 4.0
    p = _sharded(ground, ground.square, [Shard(0), Replicate()], bad)
    return _step(make(4.0), SGD([p], lr=0.5), ground)


def plain_and_sharded(make: Callable[[float], GradScaler], ground: Ground) -> str:
    """F5: a plain parameter and a DTensor in one optimizer."""
    params = [_plain(ground, 4.0), _sharded(ground, ground.line, [Shard(0)], 4.0)]
    return _step(make(4.0), SGD(params, lr=0.5, foreach=False), ground)


def inf_in_the_last_stage(make: Callable[[float], GradScaler], ground: Ground) -> str:
    """F6: two pipeline stages, each on a mesh of its own."""
    bad = math.inf if _is_last(ground) else 8.0
    p = _sharded(ground, ground.stage, [Shard(0)], bad)
    return _step(make(8.0), SGD([p], lr=0.5), ground)


def rank_without_gradients(make: Callable[[float], GradScaler], ground: Ground) -> str:
    """F7: the last rank has no gradient at all."""
    p = _sharded(ground, ground.line, [Shard(0)], 4.0)
    if _is_last(ground):
        p.grad = None
    scaler = make(4.0)
    try:
        fate = _step(scaler, SGD([p], lr=0.5), ground)
    except AssertionError as error:
        if isinstance(scaler, ShardedGradScaler):
            raise
        # The others are in torch's all-reduce of their flags. If they were not, this would wait
        # for them in vain; that it comes back is what shows it.
        late = functional.all_reduce(torch.zeros((), device=ground.device), "max", ground.line)
        late.item()
        return f"raised {type(error).__name__}, and kept the others waiting"
    return fate.replace("skipped", "stepped") if p.grad is None else fate


def default_scale_of_a_float16_loss(make: Callable[[float], GradScaler], ground: Ground) -> str:
    """F8: 1.5 times the default scale is more than float16 can hold."""
    loss = torch.tensor(1.5, dtype=torch.float16, device=ground.device)
    return f"scaled 1.5 to {make(2.0**16).scale(loss).item():.6g}"


def order_of_arguments(make: Callable[[float], GradScaler], ground: Ground) -> str:
    """F9: growth and backoff factor, passed by position."""
    order, plain = _order(type(make(1.0))), _order(GradScaler)
    if order == plain or not order:
        return f"takes {order or 'neither'} by position"
    return f"takes {order} by position, torch.amp.GradScaler {plain}"


def many_overflows(make: Callable[[float], GradScaler], ground: Ground) -> str:
    """F10: sixty overflows from a low scale, and then a good step."""
    p = _plain(ground, math.inf)
    scaler, optimizer = make(2.0**-100), SGD([p], lr=0.5)
    for _ in range(60):
        p.grad = torch.full_like(p, math.inf)
        _step(scaler, optimizer, ground)
    p.grad = torch.full_like(p, 2.0**-126)
    return _step(scaler, optimizer, ground).partition(",")[0]


def _step(
    scaler: GradScaler, optimizer: Optimizer, ground: Ground, *, unscale: bool = False
) -> str:
    """One iteration after the backward; what became of the parameters and of the scale."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    before = [_local(p).clone() for p in params]
    scaler.scale(torch.ones((), device=ground.device))
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    return f"{_fate(before, list(map(_local, params)))}, scale {scaler.get_scale():g}"


def _fate(before: Sequence[Tensor], after: Sequence[Tensor]) -> str:
    if not all(bool(each.isfinite().all()) for each in after):
        return "wrote Inf or NaN into parameters"
    if all(map(torch.equal, before, after)):
        return "skipped"
    return "stepped"


def _is_last(ground: Ground) -> bool:
    return ground.rank == ground.size - 1


def _plain(ground: Ground, grad: float) -> Parameter:
    p = Parameter(torch.ones(3, device=ground.device))
    p.grad = torch.full_like(p, grad)
    return p


def _sharded(
    ground: Ground,
    mesh: DeviceMesh,
    placements: Sequence[Placement],
    grad: float,
    dtype: torch.dtype = torch.float32,
) -> Parameter:
    """A DTensor of which this rank holds (2, 3) elements; ``grad`` is the gradient of those."""
    shard = torch.ones(2, 3, dtype=dtype, device=ground.device)
    p = Parameter(DTensor.from_local(shard, mesh, placements, run_check=False))
    p.grad = DTensor.from_local(torch.full_like(shard, grad), mesh, placements, run_check=False)
    return p


def _local(p: Tensor) -> Tensor:
    return (p.to_local() if isinstance(p, DTensor) else p).detach()


def _order(scaler_class: type[GradScaler]) -> str:
    """Which of the two comes first by position; empty if neither can be given that way."""
    try:
        scaler_class("cpu", 1.0, 2.0, 0.5)
    except TypeError:
        return ""
    except AssertionError:
        return "backoff, growth"
    return "growth, backoff"
