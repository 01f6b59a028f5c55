"""Tensor parallelism: the ranks share each layer's work, by columns, by rows or along the sequence.

    torchrun --nproc-per-node 4 examples/tensor_parallel.py  # 1, 2, 4 or 8 ranks

Who counts what: of a DTensor that is sharded each rank counts its part, of one that is replicated
the first rank counts it. `head` is outside the plan and stays a plain tensor, of which the scaler
cannot know that all ranks hold the same gradient; `copies=` says so. The norm layer works on a part
of the sequence, so each rank has a part of its gradient's sum, and the scaler adds them up first.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.functional import mse_loss

from shardscale import ShardedGradScaler


def main(device: str) -> None:
    """Train for five steps; the third overflows on the last rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    if size not in (1, 2, 4, 8):
        raise SystemExit(f"run this on 1, 2, 4 or 8 ranks, not {size}")
    torch.manual_seed(0)  # the same weights everywhere, and the same batch: it is not split
    block = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
    model = nn.ModuleDict({"block": block, "head": nn.Linear(16, 16)}).to(device)
    inputs = torch.randn(4, 8, 16).to(device)  # batch, sequence, features
    targets = inputs.flip(2)

    mesh = init_device_mesh(device, (size,), mesh_dim_names=("tp",))
    plan = {
        "": PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1)),
        "0": SequenceParallel(),
        "1": ColwiseParallel(input_layouts=Shard(1)),
        "3": RowwiseParallel(),
    }
    parallelize_module(block, mesh, plan)
    # DTensors and plain tensors apart: torch's foreach and fused optimizers take no mixed group.
    groups = [{"params": part.parameters()} for part in (block, model["head"])]
    optimizer = torch.optim.AdamW(groups, lr=0.01)

    def copies(name: str, param: Tensor) -> dist.ProcessGroup | None:
        """Who else holds this gradient, besides what its own layout says."""
        return mesh.get_group("tp") if name.startswith("head.") else None

    scaler = ShardedGradScaler(device).attach(model, copies=copies)

    for step in range(5):
        optimizer.zero_grad()
        with torch.autocast(device, dtype=torch.float16):
            loss = mse_loss(model["head"](block(inputs)), targets)
        scaler.scale(loss).backward()
        if step == 2 and rank == size - 1:  # all ranks see one batch, so the fault is made by hand
            block[1].weight.grad.to_local()[0, 0] = float("inf")
        norm = scaler.clip_grad_norm_(optimizer, max_norm=1.0)
        scaler.step(optimizer)
        outcome = "skipped" if scaler.verdict(optimizer).found_inf else "stepped"
        scaler.update()

        if rank == 0:
            print(f"step {step}: loss {loss:.4f}, norm {norm:.4f}, {outcome}")

    taken = int(optimizer.state[next(model.parameters())]["step"])  # AdamW's own count
    ranks = [None] * size
    dist.all_gather_object(ranks, (taken, scaler.get_scale()))
    if rank == 0:
        print("steps taken and scale, rank by rank:", ranks)
        print(scaler.describe())


if __name__ == "__main__":
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    main("cuda" if on_gpu else "cpu")
    dist.destroy_process_group()
