"""Pipeline parallelism: stages on ranks of their own, and only the last one sees a loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
)
from torch.nn.parallel import DistributedDataParallel

import shardscale
from tests.ranks.models.data_parallel import shard_each_layer
from tests.ranks.models.laid import Laid, Layout, full
from tests.ranks.models.net import batch, make_net

__all__ = ["LAYOUTS", "SCHEDULES", "Pipe", "replicated", "sharded", "weighted_sum"]

SCHEDULES = {
    "GPipe": ScheduleGPipe,
    "1F1B": Schedule1F1B,
    "interleaved 1F1B": ScheduleInterleaved1F1B,
    "looped BFS": ScheduleLoopedBFS,
    "zero bubble": ScheduleInterleavedZeroBubble,
    "ZBV": ScheduleZBVZeroBubble,
    "DualPipeV": ScheduleDualPipeV,
}

_FIRST_LAYERS = {2: (0, 3), 3: (0, 1, 3), 4: (0, 1, 3, 4), 5: (0, 1, 2, 3, 4)}
"""Number of stages -> the layer that each begins with; the third of five has no parameter."""
_WIDTHS = (5, 5, 7, 7, 3, 3)
"""Numbers of features: into the first layer, and out of each."""


def weighted_sum(output: Tensor, weight: Tensor) -> Tensor:
    """A loss for schedules: the sum of the output, (rows, 3), each row with a weight, (rows, 1)."""
    return (output.float() * weight).sum()


class Pipe:
    """The stages that this rank holds, and the schedule that drives them.

    Args:
        name: A key of ``SCHEDULES``. GPipe and 1F1B have one stage a rank, ZBV and DualPipeV two in
            the form of a V (ranks 0 1 1 0), the others two in a loop (0 1 0 1).
        loss_fn: As the schedule takes it.
        num_pipes: How many pipelines there are side by side, each with its own batch.
        beside: ``beside(stage, mesh)`` makes a stage data parallel over the pipelines.
        scale_grads: Whether the schedule divides gradients by its four micro-batches.
    """

    def __init__(
        self,
        name: str,
        loss_fn: Callable[..., Tensor],
        dtype: torch.dtype = torch.float32,
        num_pipes: int = 1,
        beside: Callable[[nn.Module, DeviceMesh], nn.Module] = lambda stage, mesh: stage,
        scale_grads: bool = False,
    ) -> None:
        kind = SCHEDULES[name]
        size = dist.get_world_size() // num_pipes
        self.mesh = init_device_mesh("cpu", (size, num_pipes), mesh_dim_names=("pp", "dp"))
        self.num_pipes, self.dtype = num_pipes, dtype
        rank = self.mesh.get_local_rank("pp")
        self.indices = [rank]
        if kind in (ScheduleZBVZeroBubble, ScheduleDualPipeV):
            self.indices.append(2 * size - 1 - rank)
        elif kind not in (ScheduleGPipe, Schedule1F1B):
            self.indices.append(rank + size)
        self.num_stages = size * len(self.indices)
        self.stages = [_cut(make_net(dtype), self.num_stages)[i] for i in self.indices]
        self.model = nn.ModuleList(beside(stage, self.mesh["dp"]) for stage in self.stages)
        stages = [self._for_schedule(*each) for each in zip(self.indices, self.model, strict=True)]
        driven = stages if len(stages) > 1 else stages[0]
        self._schedule = kind(driven, 4, loss_fn=loss_fn, scale_grads=scale_grads)

    def backward(self, step: int, weight: Tensor | float = 1.0) -> list[Tensor]:
        """Forward and backward of a batch in four micro-batches; the losses, on the last stage.

        All ranks are given all data. The schedule takes what its stages need.
        """
        losses: list[Tensor] = []
        x = batch(self.mesh.get_local_rank("dp"), step, self.dtype)
        # Data parallelism averages, and gradients shall come out as a sum.
        self._schedule.step(x, target=torch.ones(4, 1) * weight * self.num_pipes, losses=losses)
        return losses

    def whole(self) -> dict[str, Tensor]:
        """All parameters of the pipeline in full, named as in ``make_net``; a collective."""
        group = self.mesh.get_group("pp")
        return _gathered(
            {name: p for stage in self.stages for name, p in full(stage).items()}, group
        )

    def _for_schedule(self, index: int, stage: nn.Module) -> PipelineStage:
        shapes = {}
        if isinstance(stage, DistributedDataParallel):
            # A stage finds its shapes by a trial run, which torch 2.13's DDP does not survive.
            layers = [int(name) for name, _ in stage.module.named_children()]
            into, out = (torch.empty(1, _WIDTHS[i]) for i in (layers[0], layers[-1] + 1))
            shapes = {
                "input_args": into.to(self.dtype).requires_grad_(index > 0),
                "output_args": out.to(self.dtype).requires_grad_(),
            }
        group = self.mesh.get_group("pp")
        return PipelineStage(
            stage, index, self.num_stages, torch.device("cpu"), group=group, **shapes
        )


def _cut(net: nn.Sequential, num_stages: int) -> list[nn.Sequential]:
    """Stages in order; their layers keep their names."""
    starts = _FIRST_LAYERS[num_stages]
    return [net[start:end] for start, end in zip(starts, (*starts[1:], len(net)), strict=True)]


def _gathered(mine: dict[str, Tensor], group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    parts: list[dict[str, Tensor]] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(parts, mine, group=group)
    return {name: p for part in parts for name, p in part.items()}


def sharded(stage: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """FSDP2 beside a pipeline; units stay whole between the micro-batches.

    Were they sharded again after each forward, zero-bubble schedules of torch 2.13 would lose
    gradients without a word.
    """
    shard_each_layer(stage, mesh, reshard_after_forward=False)
    return stage


def replicated(stage: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """DDP beside a pipeline.

    Not for zero-bubble schedules: they make gradients of weights past the hooks that DDP waits for,
    and in torch 2.13 nobody reduces them.
    """
    return DistributedDataParallel(stage, process_group=mesh.get_group())


def _scheduled(name: str, num_ranks: int | None = None, **options) -> Callable[..., Laid]:
    """One pipeline of all ranks, or several of so many each."""

    def lay(size: int, dtype: torch.dtype) -> Laid:
        scalers = []  # the newest is the last
        pipe = Pipe(
            name,
            lambda *args: scalers[-1].wrap_loss(weighted_sum)(*args),
            dtype,
            num_pipes=size // (num_ranks or size),
            **options,
        )

        def backward(scaler, step: int) -> None:
            scalers.append(scaler)
            pipe.backward(step)

        return Laid(pipe.model, backward, pipe.whole, pipe.num_pipes, shardscale.distinct)

    return lay


def _by_hand(is_sharded: bool) -> Callable[..., Laid]:
    """Two stages; rank r of the first hands its activations to rank r of the second.

    Each stage is whole on one rank, or sharded over half of them.
    """

    def lay(size: int, dtype: torch.dtype) -> Laid:
        width = size // 2
        rank = dist.get_rank()
        is_last = rank >= width
        stage = _cut(make_net(dtype), 2)[is_last]
        if is_sharded:
            meshes = [DeviceMesh("cpu", list(range(i, i + width))) for i in (0, width)]
            for layer in stage:
                if not isinstance(layer, nn.ReLU):
                    fully_shard(layer, mesh=meshes[is_last])

        def backward(scaler, step: int) -> None:
            if is_last:
                hidden = torch.empty(4, 7, dtype=dtype)
                dist.recv(hidden, rank - width)
                hidden.requires_grad_()
                scaler.scale(stage(hidden).sum() * width).backward()
                dist.send(hidden.grad, rank - width)
            else:
                scaler.begin()
                hidden = stage(batch(rank, step, dtype))
                dist.send(hidden.detach(), rank + width)
                grad = torch.empty(4, 7, dtype=dtype)
                dist.recv(grad, rank + width)
                hidden.backward(grad)

        def whole() -> dict[str, Tensor]:
            return _gathered(full(stage), None)

        return Laid(stage, backward, whole, width, shardscale.distinct)

    return lay


LAYOUTS = {
    "PP by hand": Layout(_by_hand(is_sharded=False), (2,)),
    "PP by hand and FSDP2": Layout(_by_hand(is_sharded=True), (4, 8)),
    "PP GPipe": Layout(_scheduled("GPipe"), (2, 3, 4)),
    "PP 1F1B": Layout(_scheduled("1F1B"), (2, 4)),
    "PP interleaved 1F1B": Layout(_scheduled("interleaved 1F1B"), (2,)),
    "PP zero bubble": Layout(_scheduled("zero bubble"), (2,)),
    "PP ZBV": Layout(_scheduled("ZBV"), (2,)),
    "PP and FSDP2": Layout(_scheduled("1F1B", 2, beside=sharded), (4, 8)),
    "PP and DDP": Layout(_scheduled("1F1B", 2, beside=replicated), (4,)),
}
