"""How many collectives a call sends, counted below ``torch.distributed``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from job import on_ranks
from parameters import NoStep, sharded
from side_by_side import Row
from torch import nn
from torch.amp import GradScaler
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler as TorchShardedGradScaler
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils._python_dispatch import TorchDispatchMode

import shardscale
from shardscale import ShardedGradScaler

__all__ = ["rows"]

NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")
NOT_SENT = ("wait_tensor", "_wrap_tensor_autograd")
CALLS = ("unscale_", "unscale_ + clip_grad_norm_")


class Laid(NamedTuple):
    """A model with gradients, as one rank holds it."""

    model: nn.Module
    copies: Callable[..., Any] | None = None  # for ours, what the layout does not tell
    peer: type = GradScaler
    torch_clip: Callable[[float], Any] | None = None  # None: torch.nn.utils.clip_grad_norm_


def rows() -> list[Row]:
    """The flag alone, and with the norm, on every way to lay a model out."""
    found: list[Row] = []
    for layout, (size, lay, note) in LAYOUTS.items():
        theirs, ours = (on_ranks(count_both, size, lay, is_ours)[0] for is_ours in (False, True))
        for call in CALLS:
            notes = [note] if note else []
            of_torch = theirs[call]
            if isinstance(of_torch, str):
                notes.append(f"torch: {of_torch}")
                of_torch = "fails"
            found.append(
                Row(
                    f"collectives of {call}, {layout}, {size} ranks",
                    "",
                    ours[call],
                    of_torch,
                    None,
                    "",
                    "1",
                    ours[call] == 1,
                    "; ".join(notes),
                )
            )
    return found


def two_dtypes() -> Laid:
    """One float32 and one bfloat16 parameter, each sharded over both dimensions of a mesh."""
    mesh = init_device_mesh("cpu", (2, 2))
    both = [Shard(0), Shard(0)]
    params = [sharded(1, 4, mesh, both, dtype)[0] for dtype in (torch.float32, torch.bfloat16)]
    return Laid(nn.ParameterList(params))


def fsdp1() -> Laid:
    """Two units, original parameters."""
    net = make_net()
    net[0] = FullyShardedDataParallel(net[0], device_id=torch.device("cpu"), use_orig_params=True)
    model = FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params=True)
    return with_grads(Laid(model, None, TorchShardedGradScaler, model.clip_grad_norm_))


def hsdp() -> Laid:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return with_grads(Laid(shard_each_layer(make_net(), mesh)))


def tp() -> Laid:
    return with_grads(Laid(column_and_row(make_net(), init_device_mesh("cpu", (2,)))))


def fsdp2_and_tp() -> Laid:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    return with_grads(Laid(shard_each_layer(column_and_row(make_net(), mesh["tp"]), mesh["dp"])))


def pp_and_fsdp2() -> Laid:
    """One layer a stage; which of them gets its gradients from which does not matter here."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    stage = nn.Sequential(make_net()[mesh.get_local_rank("pp")])
    return with_grads(Laid(shard_each_layer(stage, mesh["dp"]), shardscale.distinct))


# Name -> (ranks, how to lay the model out, what torch leaves out).
LAYOUTS: dict[str, tuple[int, Callable[[], Laid], str]] = {
    "2 dtypes, sharded over a 2-D mesh": (4, two_dtypes, ""),
    "FSDP1": (2, fsdp1, ""),
    "HSDP": (4, hsdp, "torch reduces within the ranks of one replica"),
    "TP, column and row": (2, tp, ""),
    "FSDP2 and TP": (4, fsdp2_and_tp, ""),
    "PP and FSDP2": (4, pp_and_fsdp2, "torch reduces within the ranks of one stage"),
}


def make_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


def shard_each_layer(net: nn.Sequential, mesh: DeviceMesh) -> nn.Sequential:
    for module in (*net, net):
        fully_shard(module, mesh=mesh)
    return net


def column_and_row(net: nn.Sequential, mesh: DeviceMesh) -> nn.Sequential:
    parallelize_module(net, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})
    return net


def with_grads(laid: Laid) -> Laid:
    laid.model(torch.ones(2, 8)).sum().backward()
    return laid


def count_both(
    rank: int, size: int, lay: Callable[[], Laid], is_ours: bool
) -> dict[str, int | str]:
    """Collectives of ``unscale_``, and of unscaling and clipping, each with a new scaler."""
    laid = lay()
    params = list(laid.model.parameters())
    found: dict[str, int | str] = {}
    for name in CALLS:
        optimizer = NoStep(params)
        scaler: Any = (ShardedGradScaler if is_ours else laid.peer)("cpu", init_scale=1.0)
        if is_ours:
            scaler.attach(laid.model, copies=laid.copies)
        scaler.scale(torch.ones(()))

        def call(clips: bool = "clip" in name, scaler: Any = scaler, of: Any = optimizer) -> None:
            if is_ours and clips:
                scaler.clip_grad_norm_(of, 1.0)
                return
            scaler.unscale_(of)
            if clips and laid.torch_clip is not None:
                laid.torch_clip(1.0)
            elif clips:
                torch.nn.utils.clip_grad_norm_(params, 1.0)

        try:
            found[name] = count(call)
        except (RuntimeError, ValueError, AssertionError) as error:
            if is_ours:
                raise
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
