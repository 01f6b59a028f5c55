"""FSDP2 and tensor parallelism: layers are split over the axis `tp`, then sharded over `dp`.

    torchrun --nproc-per-node 4 examples/fsdp2_tensor_parallel.py  # 1, 2, 4 or 8 ranks

Who counts what: a layer in the plan is a DTensor on both axes, and knows its owners. `head` is
outside the plan, so FSDP2 makes it a DTensor on `dp` alone. The other ranks of a `tp` group see the
same batch and so hold the same gradients of it; `copies=` says so.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import mse_loss

from shardscale import ShardedGradScaler


class Net(nn.Module):
    """A block as in a transformer, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 64)
        self.down = nn.Linear(64, 16)
        self.head = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.down(self.up(x).relu()))


def main(device: str) -> None:
    """Train for five steps; the third overflows on the last two ranks."""
    rank, size = dist.get_rank(), dist.get_world_size()
    if size not in (1, 2, 4, 8):
        raise SystemExit(f"run this on 1, 2, 4 or 8 ranks, not {size}")
    tp = min(2, size)
    mesh = init_device_mesh(device, (size // tp, tp), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(0)  # the same weights and the same batch everywhere
    model = Net().to(device)
    # The part of the batch that all ranks of this `tp` group see.
    inputs = torch.randn(32, 16).chunk(size // tp)[mesh.get_local_rank("dp")].to(device)
    targets = inputs.flip(1)

    parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    half = MixedPrecisionPolicy(param_dtype=torch.float16, reduce_dtype=torch.float32)
    fully_shard(model, mesh=mesh["dp"], mp_policy=half)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

    scaler = ShardedGradScaler(device).attach(
        model, copies=lambda name, param: mesh["tp"] if name.startswith("head.") else None
    )

    for step in range(5):
        # 1e6 is beyond float16, and the last `tp` group alone sees it.
        factor = 1e6 if step == 2 and rank >= size - tp else 1.0
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
