"""Tensor parallelism, alone and inside data parallelism, by torch and by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from tests.ranks.models.data_parallel import shard_each_layer
from tests.ranks.models.laid import Laid, Layout, averaging, full
from tests.ranks.models.net import make_net

__all__ = ["LAYOUTS", "lay_out_norms_apart", "parallelize"]

CUT_ALONG = {"1.weight": 0, "1.bias": 0, "3.weight": 1}
"""The dimension along which tensor parallelism cuts a parameter; the others are replicated."""
# Between the layers the 7 hidden units stay a DTensor; a local tensor would know only its own.
NORMS_APART = {"1": ColwiseParallel(use_local_output=False), "3": RowwiseParallel()}
COLUMN_AND_ROW = {
    "1": ColwiseParallel(use_local_output=False),
    "3": RowwiseParallel(use_local_output=False),
}
SEQUENCE = {
    "0": SequenceParallel(sequence_dim=0),
    "1": ColwiseParallel(input_layouts=Shard(0), use_local_output=False),
    "3": RowwiseParallel(output_layouts=Shard(0), use_local_output=False),
    "4": SequenceParallel(sequence_dim=0),
}
"""The affine layers' parameters are replicated, and each rank has the gradient of its rows alone:
Partial."""


def parallelize(net: nn.Sequential, mesh: DeviceMesh, plan: dict[str, Any]) -> None:
    """Everything on one mesh; takes and returns plain tensors that all its ranks hold."""
    parallelize_module(net, mesh, plan)
    net[3].register_forward_hook(_rounded)
    distribute_module(
        net,
        mesh,
        input_fn=lambda _, inputs, mesh: tuple(
            DTensor.from_local(x, mesh, [Replicate()], run_check=False) for x in inputs
        ),
        output_fn=lambda _, output, mesh: output.full_tensor(),
    )


def _rounded(_: nn.Module, inputs: object, output: Tensor) -> Tensor:
    """On each of three ranks torch adds a third of the bias, which is not exact; this is."""
    exact = (output.detach() * 4096).round() / 4096
    return output + (exact - output.detach())


def _tp(plan: dict[str, Any]) -> Callable[..., Laid]:
    def lay(size: int, dtype: torch.dtype) -> Laid:
        net = make_net(dtype)
        parallelize(net, init_device_mesh("cpu", (size,)), plan)
        # On eight ranks torch sums by itself: it gathers the seven hidden units everywhere.
        leaves_sums = plan is SEQUENCE or size < 8
        return averaging(net, 1, lambda: full(net), dtype)._replace(num_sums=int(leaves_sums))

    return lay


def lay_out_norms_apart(size: int, dtype: torch.dtype) -> Laid:
    """The plan says nothing of the affine layers: plain tensors, of which all ranks hold copies.

    In no matrix, because torch's fused optimizers refuse them beside DTensors.
    """
    net = make_net(dtype)
    parallelize_module(net, init_device_mesh("cpu", (size,)), NORMS_APART)

    def copies(name: str, param: Tensor) -> object:
        return None if isinstance(param, DTensor) else range(size)

    return averaging(net, 1, lambda: full(net), dtype, copies)


def _fsdp2_tp(plan: dict[str, Any], num_replicas: int = 1) -> Callable[..., Laid]:
    """Two ranks a tensor; with replicas it is HSDP, on a mesh of three axes."""

    def lay(size: int, dtype: torch.dtype) -> Laid:
        net = make_net(dtype)
        shape = (num_replicas, size // 2 // num_replicas, 2)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replica", "shard", "tp"))
        parallelize(net, mesh["tp"], plan)
        shard_each_layer(net, mesh["replica", "shard"] if num_replicas > 1 else mesh["shard"])
        return averaging(net, size // 2, lambda: full(net), dtype)

    return lay


def _fsdp2_tp_norms_apart(size: int, dtype: torch.dtype) -> Laid:
    """The affine layers are DTensors of the data-parallel axis, which knows of no copies."""
    net = make_net(dtype)
    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(net, mesh["tp"], NORMS_APART)
    shard_each_layer(net, mesh["dp"])

    def copies(name: str, param: Tensor) -> object:
        return mesh["tp"].get_group() if name[0] in "04" else None

    return averaging(net, size // 2, lambda: full(net), dtype, copies)


def _ddp_tp(cut: Callable[[nn.Sequential, DeviceMesh], None]) -> Callable[..., Laid]:
    """DDP replicates what tensor parallelism has cut; to it these are plain tensors."""

    def lay(size: int, dtype: torch.dtype) -> Laid:
        net = make_net(dtype)
        mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))
        cut(net, mesh["tp"])
        model = DistributedDataParallel(net, device_mesh=mesh["dp"])
        _keep_parameters(net)
        group = mesh["tp"].get_group()

        def whole() -> dict[str, Tensor]:
            parts: list[dict[str, Tensor]] = [{}, {}]
            dist.all_gather_object(parts, full(net), group)
            return {
                name: torch.cat([part[name] for part in parts], CUT_ALONG[name])
                if name in CUT_ALONG
                else parts[0][name]
                for name in parts[0]
            }

        def copies(name: str, param: Tensor) -> object:
            return None if name in CUT_ALONG else group

        return averaging(model, size // 2, whole, dtype, copies)

    return lay


def _by_torch(net: nn.Sequential, mesh: DeviceMesh) -> None:
    parallelize(net, mesh, COLUMN_AND_ROW)


def _by_hand(net: nn.Sequential, mesh: DeviceMesh) -> None:
    for name, dim in CUT_ALONG.items():
        layer, kind = net.get_submodule(name[0]), name[2:]
        mine = getattr(layer, kind).detach().chunk(mesh.size(), dim)[mesh.get_local_rank()]
        setattr(layer, kind, nn.Parameter(mine.clone()))
    column, row, group = net[1], net[3], mesh.get_group()
    column.register_forward_pre_hook(lambda _, inputs: _SumGradients.apply(inputs[0], group))
    row.forward = lambda x: _Sum.apply(nn.functional.linear(x, row.weight), group) + row.bias


class _SumGradients(torch.autograd.Function):
    """Into the column-parallel layer: every rank has the same input, and its part of the
    gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Sum(torch.autograd.Function):
    """Out of the row-parallel layer: every rank has its part of the output, and the same
    gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _keep_parameters(net: nn.Sequential) -> None:
    """DDP turns DTensors into local parameters, and back for each forward; put these back after
    it, because torch does not, and leaves a module without parameters."""
    params = dict(net.named_parameters())

    def put_back(*_: object) -> None:
        for name, param in params.items():
            layer, kind = net.get_submodule(name[0]), name[2:]
            delattr(layer, kind)
            layer.register_parameter(kind, param)

    net.register_forward_hook(put_back)


LAYOUTS = {
    "TP": Layout(_tp(COLUMN_AND_ROW), (2, 3, 4, 8)),
    # Four rows of activations: on three ranks 2, 2 and none, on eight half of them have none.
    "TP sequence": Layout(_tp(SEQUENCE), (2, 3, 4, 8)),
    "FSDP2 and TP": Layout(_fsdp2_tp(COLUMN_AND_ROW), (4, 8)),
    "FSDP2 and TP sequence": Layout(_fsdp2_tp(SEQUENCE), (4,)),
    "FSDP2 and TP, norms apart": Layout(_fsdp2_tp_norms_apart, (4,)),
    "HSDP and TP": Layout(_fsdp2_tp(COLUMN_AND_ROW, num_replicas=2), (8,)),
    "DDP and TP": Layout(_ddp_tp(_by_torch), (4,)),
    "DDP and hand-sharded TP": Layout(_ddp_tp(_by_hand), (4, 8)),
}
