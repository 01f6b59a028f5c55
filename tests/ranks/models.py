"""A small network of whole numbers, laid out over the ranks in every way that torch has.

Weights, data and learning rates are whole numbers or powers of two, small enough that every sum and
product is exact in each dtype used. So it does not matter in which order ranks add up gradients,
and a sharded run can be compared with one process holding the whole model bit for bit. The whole
job's loss is the sum over its batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import shardscale

__all__ = [
    "EVERY_LAYOUT",
    "LAYOUTS",
    "MESH_LAYOUTS",
    "Laid",
    "batch",
    "equal",
    "lay_out",
    "local",
    "local_grads",
    "make_net",
    "reference_grads",
    "spoil",
    "whole_bits",
]


def make_net() -> nn.Module:
    """5 -> 7 -> 3, with biases: sizes that no number of ranks divides. The same on every rank."""
    generator = torch.Generator().manual_seed(7)
    net = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randint(-1, 2, p.shape, generator=generator))
    return net


def batch(index: int, step: int) -> Tensor:
    """(4, 5) float32 whole numbers in -2..2, different for each index and step."""
    generator = torch.Generator().manual_seed(100 * step + index)
    return torch.randint(-2, 3, (4, 5), generator=generator).float()


def reference_grads(net: nn.Module, num_batches: int, *steps: int) -> dict[str, Tensor]:
    """Gradients of one process that holds the whole model and sees all batches; left in ``net``."""
    net.zero_grad()
    for step in steps:
        for index in range(num_batches):
            net(batch(index, step)).sum().backward()
    return {name: p.grad.clone() for name, p in net.named_parameters()}


class Laid(NamedTuple):
    """The network as one rank holds it."""

    model: nn.Module
    backward: Callable[..., None]
    """``backward(scaler, step)`` accumulates this rank's scaled gradients of one batch."""
    whole: Callable[[], dict[str, Tensor]]
    """All parameters in full, named as in ``make_net``; a collective."""
    num_batches: int
    """How many different batches the ranks see together in one step."""
    copies: Callable[..., object] | None = None
    """What the scaler must be told with ``attach(copies=)``."""


def lay_out(name: str, size: int) -> Laid:
    """The network in one of ``LAYOUTS`` or, for its number of ranks, of ``MESH_LAYOUTS``."""
    return (LAYOUTS.get(name) or MESH_LAYOUTS[name, size])(size)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, detached and sharing its memory."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_grads(model: nn.Module) -> list[Tensor]:
    """The gradients of which this rank holds any element, as plain tensors."""
    grads = [local(p.grad) for p in model.parameters() if p.grad is not None]
    return [g for g in grads if g.numel()]


def spoil(model: nn.Module, rank: int, bad_rank: int, value: float) -> None:
    """On one rank, overwrite the last element of the first gradient that it holds."""
    if rank == bad_rank:
        local_grads(model)[0].view(-1)[-1] = value


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether the same names stand for equal tensors."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def whole_bits(laid: Laid) -> dict[str, Tensor]:
    """All float32 parameters in full, as integers, so that NaN equals itself; a collective."""
    return {name: p.view(torch.int32) for name, p in laid.whole().items()}


def _averaging(model: nn.Module, num_batches: int, whole: Callable[[], dict[str, Tensor]]) -> Laid:
    """A layout that averages gradients; the loss is multiplied, so that they come out as a sum."""
    ranks_per_batch = dist.get_world_size() // num_batches

    def backward(scaler, step: int) -> None:
        x = batch(dist.get_rank() // ranks_per_batch, step)
        scaler.scale(model(x).float().sum() * num_batches).backward()

    return Laid(model, backward, whole, num_batches)


def _copies(net: nn.Module) -> dict[str, Tensor]:
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in net.named_parameters()
    }


# -------------------------------------------------------------- data parallel, on one axis of ranks


def _ddp(size: int) -> Laid:
    net = make_net()
    return _averaging(DistributedDataParallel(net), size, lambda: _copies(net))


def _fsdp1(strategy: ShardingStrategy, use_orig_params: bool) -> Callable[[int], Laid]:
    def lay(size: int) -> Laid:
        group = None
        if strategy is ShardingStrategy.HYBRID_SHARD:
            mesh = init_device_mesh("cpu", (2, size // 2))
            group = (mesh.get_group(1), mesh.get_group(0))
        model = FullyShardedDataParallel(
            make_net(),
            process_group=group,
            sharding_strategy=strategy,
            use_orig_params=use_orig_params,
            device_id=torch.device("cpu"),
        )

        def whole() -> dict[str, Tensor]:
            with FullyShardedDataParallel.summon_full_params(model):
                return _copies(model.module)

        return _averaging(model, size, whole)

    return lay


def _shard_each_layer(net: nn.Module, mesh: DeviceMesh, **options) -> None:
    layers = [layer for layer in net if isinstance(layer, nn.Linear)]
    for layer in [*layers, net]:
        fully_shard(layer, mesh=mesh, **options)


def _fsdp2(param_dtype: torch.dtype | None = None) -> Callable[[int], Laid]:
    def lay(size: int) -> Laid:
        net = make_net()
        policy = MixedPrecisionPolicy(param_dtype, torch.float32 if param_dtype else None)
        _shard_each_layer(net, init_device_mesh("cpu", (size,)), mp_policy=policy)
        return _averaging(net, size, lambda: _copies(net))

    return lay


# ------------------------------------------------------------------ plain tensors, sharded by hand


class _HandSharded(nn.Module):
    """Every parameter cut into plain tensors, one a rank, gathered by hand for each forward."""

    def __init__(self, size: int) -> None:
        super().__init__()
        net = make_net()
        self.shapes = {name: p.shape for name, p in net.named_parameters()}
        self.shards = nn.ParameterDict()
        for name, p in net.named_parameters():
            mine = _pieces(p.detach().flatten(), size)[dist.get_rank()]
            self.shards[name.replace(".", "_")] = nn.Parameter(mine.clone())
        self.net = [net.requires_grad_(False)]  # in a list, so that it is no submodule

    def whole(self) -> dict[str, Tensor]:
        return {
            name: _Gather.apply(self.shards[name.replace(".", "_")], shape)
            for name, shape in self.shapes.items()
        }

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.net[0], self.whole(), (x,))


class _Gather(torch.autograd.Function):
    """Shards to the full tensor; backward sums over all ranks and keeps this rank's piece."""

    @staticmethod
    def forward(ctx, shard: Tensor, shape: torch.Size) -> Tensor:
        gathered: list[Tensor] = [torch.empty(0)] * dist.get_world_size()
        dist.all_gather_object(gathered, shard.detach())
        return torch.cat(gathered).view(shape)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.flatten().clone()
        dist.all_reduce(total)
        return _pieces(total, dist.get_world_size())[dist.get_rank()].clone(), None


def _pieces(flat: Tensor, size: int) -> list[Tensor]:
    """As ``torch.chunk``, filled up with empty pieces: of a bias of 3, rank 3 of 4 has nothing."""
    pieces = list(flat.chunk(size))
    return pieces + [flat[:0]] * (size - len(pieces))


def _hand_sharded(size: int) -> Laid:
    model = _HandSharded(size)

    def backward(scaler, step: int) -> None:
        scaler.scale(model(batch(dist.get_rank(), step)).sum()).backward()

    def whole() -> dict[str, Tensor]:
        return {name: p.detach() for name, p in model.whole().items()}

    return Laid(model, backward, whole, size, shardscale.distinct)


# --------------------------------------------------------------------------- several axes of ranks


def _hsdp(size: int) -> Laid:
    net = make_net()
    _shard_each_layer(net, init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("r", "s")))
    return _averaging(net, size, lambda: _copies(net))


# Between the layers the 7 hidden units stay a DTensor; a local tensor would know only its own.
_TENSOR_PARALLEL = {"0": ColwiseParallel(use_local_output=False), "2": RowwiseParallel()}


def _tp(size: int) -> Laid:
    """Uneven: 7 hidden units. The last bias is replicated."""
    net = make_net()
    parallelize_module(net, init_device_mesh("cpu", (size,)), _TENSOR_PARALLEL)
    return _averaging(net, 1, lambda: _copies(net))


def _fsdp2_tp(size: int) -> Laid:
    net = make_net()
    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(net, mesh["tp"], _TENSOR_PARALLEL)
    _shard_each_layer(net, mesh["dp"])
    return _averaging(net, size // 2, lambda: _copies(net))


def _pp(sharded: bool) -> Callable[[int], Laid]:
    """Two stages; rank r of the first hands its activations to rank r of the second.

    Only the last stage sees a loss. Each stage is whole on one rank, or sharded over half of them.
    """

    def lay(size: int) -> Laid:
        width = size // 2
        rank = dist.get_rank()
        is_last = rank >= width
        net = make_net()
        stage = nn.ModuleDict({"2": net[2]}) if is_last else nn.ModuleDict({"0": net[0]})
        if sharded:
            meshes = [DeviceMesh("cpu", list(range(i, i + width))) for i in (0, width)]
            for layer in stage.values():
                fully_shard(layer, mesh=meshes[is_last])

        def backward(scaler, step: int) -> None:
            if is_last:
                hidden = torch.empty(4, 7)
                dist.recv(hidden, rank - width)
                hidden.requires_grad_()
                scaler.scale(stage["2"](hidden.relu()).sum() * width).backward()
                dist.send(hidden.grad, rank - width)
            else:
                scaler.begin()
                hidden = stage["0"](batch(rank, step))
                dist.send(hidden.detach(), rank + width)
                grad = torch.empty(4, 7)
                dist.recv(grad, rank + width)
                hidden.backward(grad)

        def whole() -> dict[str, Tensor]:
            stages: list[dict[str, Tensor]] = [{}] * size
            dist.all_gather_object(stages, _copies(stage))
            return stages[0] | stages[-1]

        return Laid(stage, backward, whole, width, shardscale.distinct)

    return lay


LAYOUTS: dict[str, Callable[[int], Laid]] = {
    "DDP": _ddp,
    **{
        f"FSDP1 {strategy.name} {'original' if use_orig_params else 'flat'}": _fsdp1(
            strategy, use_orig_params
        )
        for strategy in (
            ShardingStrategy.FULL_SHARD,
            ShardingStrategy.SHARD_GRAD_OP,
            ShardingStrategy.NO_SHARD,
        )
        for use_orig_params in (False, True)
    },
    "FSDP2": _fsdp2(),
    "FSDP2 float16": _fsdp2(torch.float16),
    "FSDP2 bfloat16": _fsdp2(torch.bfloat16),
    "hand-sharded": _hand_sharded,
}
"""Name -> function of the number of ranks, any number, to be called on each of them."""

MESH_LAYOUTS: dict[tuple[str, int], Callable[[int], Laid]] = {
    ("FSDP1 HYBRID_SHARD", 4): _fsdp1(ShardingStrategy.HYBRID_SHARD, use_orig_params=True),
    ("HSDP", 4): _hsdp,
    ("TP", 2): _tp,
    ("TP", 3): _tp,
    ("FSDP2 and TP", 4): _fsdp2_tp,
    ("PP", 2): _pp(sharded=False),
    ("PP and FSDP2", 4): _pp(sharded=True),
}
"""(Name, number of ranks) -> function of the number of ranks."""

EVERY_LAYOUT = [
    *((name, size) for name in LAYOUTS for size in (2, 3)),
    # On four ranks the bias of three leaves one of them without an element.
    *(
        (name, 4)
        for name in ("FSDP1 FULL_SHARD original", "FSDP2", "FSDP2 float16", "hand-sharded")
    ),
    ("DDP", 1),
    ("FSDP2", 1),
    *MESH_LAYOUTS,
]
"""Pairs of name and number of ranks, for ``lay_out``."""
