"""How many collectives a call sends, counted below ``torch.distributed``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from job import on_ranks
from parameters import NoStep, sharded
from side_by_side import Row
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler as TorchShardedGradScaler
from torch.distributed.tensor import Shard
from torch.utils._python_dispatch import TorchDispatchMode

from shardscale import ShardedGradScaler

__all__ = ["rows"]

NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")
NOT_SENT = ("wait_tensor", "_wrap_tensor_autograd")


def rows() -> list[Row]:
    """The flag alone, and with the norm, on FSDP2 over a 2-D mesh and on FSDP1."""
    found: list[Row] = []
    for layout, size, case in (
        ("FSDP2, 2 dtypes on a 2-D mesh, 4 ranks", 4, count_fsdp2),
        ("FSDP1, 2 ranks", 2, count_fsdp1),
    ):
        theirs, ours = (on_ranks(case, size, is_ours)[0] for is_ours in (False, True))
        for call in ours:
            of_torch, note = theirs[call], ""
            if isinstance(of_torch, str):
                of_torch, note = None, f"torch: {of_torch}"
            what = f"collectives of {call}, {layout}"
            found.append(Row(what, "", ours[call], of_torch, None, "", "1", ours[call] == 1, note))
    return found


def count_fsdp2(rank: int, size: int, is_ours: bool) -> dict[str, int | str]:
    """One float32 and one bfloat16 parameter, each sharded over both dimensions of the mesh."""
    mesh = init_device_mesh("cpu", (2, 2))
    placements = [Shard(0), Shard(0)]
    params = [
        *sharded(1, 4, mesh, placements, torch.float32),
        *sharded(1, 4, mesh, placements, torch.bfloat16),
    ]
    return count_both(
        params,
        torch.amp.GradScaler,
        is_ours,
        lambda: torch.nn.utils.clip_grad_norm_(params, 1.0),
    )


def count_fsdp1(rank: int, size: int, is_ours: bool) -> dict[str, int | str]:
    """Two units, original parameters."""
    net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    net[0] = FullyShardedDataParallel(net[0], device_id=torch.device("cpu"), use_orig_params=True)
    model = FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params=True)
    model(torch.ones(2, 8)).sum().backward()
    params = list(model.parameters())
    return count_both(
        params, TorchShardedGradScaler, is_ours, lambda: model.clip_grad_norm_(1.0), model
    )


def count_both(
    params: list[Any],
    torch_class: type,
    is_ours: bool,
    torch_clip: Callable[[], object],
    model: torch.nn.Module | None = None,
) -> dict[str, int | str]:
    """Collectives of ``unscale_``, and of unscaling and clipping, each with a new scaler."""
    found: dict[str, int | str] = {}
    for clips in (False, True):
        optimizer = NoStep(params)
        scaler: Any = (ShardedGradScaler if is_ours else torch_class)("cpu", init_scale=1.0)
        if is_ours and model is not None:
            scaler.attach(model)
        scaler.scale(torch.ones(()))

        def call(clips: bool = clips, scaler: Any = scaler, optimizer: Any = optimizer) -> None:
            if is_ours and clips:
                scaler.clip_grad_norm_(optimizer, 1.0)
                return
            scaler.unscale_(optimizer)
            if clips:
                torch_clip()

        name = "unscale_ + clip_grad_norm_" if clips else "unscale_"
        try:
            found[name] = count(call)
        except RuntimeError as error:
            found[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return found


def count(call: Callable[[], object]) -> int:
    """Collectives that ``call`` starts on this rank, in whatever group.

    The dispatcher sees functional and coalesced ones, but not those inside a DTensor operator; the
    backends number what they start. Neither can see too few without the other seeing more.
    """
    before = started()
    with _Recorder() as recorder:
        call()
    return max(len(recorder.ops), started() - before)


def started() -> int:
    """Operations that all backends of all groups have started so far."""
    backends = {
        id(backend): backend
        for group in dist.distributed_c10d._world.pg_map
        for backend in map(group._get_backend, group._device_types)
    }
    return sum(backend._get_sequence_number_for_group() for backend in backends.values())


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in NAMESPACES and func._opname not in NOT_SENT:
            self.ops.append(f"{func.namespace}.{func._opname}")
        return func(*args, **(kwargs or {}))
