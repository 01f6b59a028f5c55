"""HSDP: parameters are sharded within a node and replicated across nodes.

    torchrun --nproc-per-node 4 examples/hsdp.py  # 1, 2, 4 or 8 ranks

Who counts what: the gradients are reduced over both axes of the mesh, so each shard is held once in
every replica, and the ranks of the first replica count theirs. DTensors know that themselves;
nothing has to be declared.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.functional import mse_loss

from shardscale import ShardedGradScaler


def main(device: str) -> None:
    """Train for five steps; the third overflows on the last rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    if size not in (1, 2, 4, 8):
        raise SystemExit(f"run this on 1, 2, 4 or 8 ranks, not {size}")
    torch.manual_seed(0)  # the same weights and the same batch everywhere
    model = nn.Sequential(nn.Linear(16, 33), nn.ReLU(), nn.Linear(33, 16)).to(device)
    inputs = torch.randn(32, 16).chunk(size)[rank].to(device)  # this rank's part of the batch
    targets = inputs.flip(1)

    # Two "nodes" of half the ranks each.
    nodes = min(2, size)
    mesh = init_device_mesh(device, (nodes, size // nodes), mesh_dim_names=("replicate", "shard"))
    half = MixedPrecisionPolicy(param_dtype=torch.float16, reduce_dtype=torch.float32)
    for unit in (model[0], model[2], model):
        fully_shard(unit, mesh=mesh, mp_policy=half)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    # All ranks of the job agree. The model gives names, for messages and for the table.
    scaler = ShardedGradScaler(device, model=model)

    for step in range(5):
        # 1e6 is beyond float16, and one rank alone sees it.
        factor = 1e6 if step == 2 and rank == size - 1 else 1.0
        optimizer.zero_grad()
        loss = mse_loss(model(inputs * factor).float(), targets)
        scaler.scale(loss).backward()
        norm = scaler.clip_grad_norm_(optimizer, max_norm=1.0)
        scaler.step(optimizer)
        outcome = "skipped" if scaler.verdict(optimizer).found_inf else "stepped"
        scaler.update()

        loss = loss.detach() / size
        dist.all_reduce(loss)
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
    gc.collect()  # what FSDP leaves behind can abort Python when it ends (torch 2.13)
    dist.destroy_process_group()
