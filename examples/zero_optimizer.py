"""ZeroRedundancyOptimizer: DDP, with the optimizer's state spread over the ranks.

    torchrun --nproc-per-node 4 examples/zero_optimizer.py  # 1, 2 or 4 ranks

Who counts what: gradients are those of DDP. All ranks hold the same ones, and the first counts
them. A step ends with collectives, in which each rank sends the parameters that it has stepped, so
a rank that skipped alone would leave the others waiting.
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

from shardscale import ShardedGradScaler


def main(device: str) -> None:
    """Train for five steps; the third overflows on the last rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    if size not in (1, 2, 4):
        raise SystemExit(f"run this on 1, 2 or 4 ranks, not {size}")
    torch.manual_seed(0)  # the same weights and the same batch everywhere
    model = nn.Sequential(nn.Linear(16, 33), nn.ReLU(), nn.Linear(33, 16)).to(device)
    inputs = torch.randn(32, 16).chunk(size)[rank].to(device)  # this rank's part of the batch
    targets = inputs.flip(1)

    model = DistributedDataParallel(model)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.01)
    # All ranks of the job agree. The model tells names, for messages, and who holds what.
    scaler = ShardedGradScaler(device, model=model)

    for step in range(5):
        # 1e6 is beyond float16, and one rank alone sees it.
        factor = 1e6 if step == 2 and rank == size - 1 else 1.0
        optimizer.zero_grad()
        with torch.autocast(device, dtype=torch.float16):
            loss = mse_loss(model(inputs * factor), targets)
        scaler.scale(loss).backward()
        norm = scaler.clip_grad_norm_(optimizer, max_norm=1.0)
        scaler.step(optimizer)
        outcome = "skipped" if scaler.verdict(optimizer).found_inf else "stepped"
        scaler.update()

        loss = loss.detach() / size
        dist.all_reduce(loss)
        if rank == 0:
            print(f"step {step}: loss {loss:.4f}, norm {norm:.4f}, {outcome}")

    # AdamW's own count, for the parameters that this rank steps.
    taken = int(next(iter(optimizer.optim.state.values()))["step"])
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
