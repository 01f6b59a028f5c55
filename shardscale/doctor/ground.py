"""The groups and meshes on which the checks stand: all ranks of the job, cut in several ways."""

from __future__ import annotations

from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Ground", "prepare"]


class Ground(NamedTuple):
    """Where one rank stands, alike on all of them."""

    rank: int
    size: int
    device: torch.device
    timeout_s: float
    """Of the groups."""
    ours: dist.ProcessGroup
    """All ranks; our scaler's alone, so that nothing which torch's leaves behind reaches it."""
    line: DeviceMesh
    """All ranks along one axis."""
    square: DeviceMesh
    """All ranks on two axes, the second of 2 ranks where their number is even, else of all."""
    stage: DeviceMesh
    """This rank's half of a pipeline of two stages."""


def prepare(device: torch.device) -> Ground:
    """Make the groups, with timeouts that suit a part's limit.

    A host that waits on a CPU transport raises at the end of the timeout, and a check that raises
    is worth more than one that is broken off. On NCCL the watchdog would end the process then, so
    there the limit has to come first.

    Collective: every rank of the job must call.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    timeout_s = 15.0 if device.type == "cpu" else 60.0
    columns = 2 if size % 2 == 0 else size
    square = torch.arange(size).view(-1, columns)
    half = (size + 1) // 2
    stages = [list(range(half)), list(range(half, size))]
    ours, all_ranks, row, column, stage = (
        dist.new_subgroups_by_enumeration(
            [ranks for ranks in parts if ranks], timeout=timedelta(seconds=timeout_s)
        )[0]
        for parts in (
            [list(range(size))],
            [list(range(size))],
            square.tolist(),
            square.t().tolist(),
            stages,
        )
    )
    kind = device.type
    return Ground(
        rank=rank,
        size=size,
        device=device,
        timeout_s=timeout_s,
        ours=ours,
        line=DeviceMesh.from_group(all_ranks, kind),
        square=DeviceMesh.from_group([column, row], kind, square, mesh_dim_names=("dp", "tp")),
        stage=DeviceMesh.from_group(stage, kind),
    )
