"""Context parallelism: the ranks of a `cp` group share a sequence, and FSDP2 shards over all ranks.

    torchrun --nproc-per-node 4 examples/context_parallel.py  # 1, 2, 4 or 8 ranks

Who counts what: each rank sees other tokens, along `dp` those of other sequences, along `cp` other
parts of the same ones. FSDP2 averages over both axes at once, so parameters are DTensors on all
ranks, each rank counts its own rows, and nothing has to be declared.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.nn.functional import mse_loss, scaled_dot_product_attention

from shardscale import ShardedGradScaler


class Attention(nn.Module):
    """Queries of this rank's part of the sequence look at the keys of all of it."""

    def __init__(self, cp: DeviceMesh) -> None:
        super().__init__()
        self.cp = cp
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        query, *others = self.qkv(x).chunk(3, dim=2)
        key, value = (DTensor.from_local(part, self.cp, [Shard(1)]) for part in others)
        # Every rank of `cp` has a part of their gradient's sum, hence Partial.
        key, value = (part.full_tensor(grad_placements=[Partial()]) for part in (key, value))
        return x + self.out(scaled_dot_product_attention(query, key, value))


def main(device: str) -> None:
    """Train for five steps; the third overflows on the last rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    if size not in (1, 2, 4, 8):
        raise SystemExit(f"run this on 1, 2, 4 or 8 ranks, not {size}")
    cp = min(2, size)
    mesh = init_device_mesh(device, (size // cp, cp), mesh_dim_names=("dp", "cp"))
    row, column = mesh.get_coordinate()
    torch.manual_seed(0)  # the same weights and the same batch everywhere
    model = Attention(mesh["cp"]).to(device)
    inputs = torch.randn(4, 12, 16).chunk(size // cp)[row].chunk(cp, dim=1)[column].to(device)
    targets = inputs.flip(2)

    half = MixedPrecisionPolicy(param_dtype=torch.float16, reduce_dtype=torch.float32)
    fully_shard(model, mesh=init_device_mesh(device, (size,)), mp_policy=half)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
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
