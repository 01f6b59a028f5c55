"""Accumulation: four micro-batches to a step, and gradients that travel once, under FSDP2.

    torchrun --nproc-per-node 4 examples/accumulation.py  # 1 to 8 ranks

`scale` and backward for each micro-batch; clip, step and update once, after the last. An Inf in any
of them stays in the sum, so one verdict is enough: here the second one overflows on one rank, and
all ranks skip the step. Under DDP and FSDP1 `with model.no_sync():` stands around all but the last.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.functional import mse_loss

from shardscale import ShardedGradScaler

NUM_MICRO_BATCHES = 4


def main(device: str) -> None:
    """Train for five steps; the third overflows on the last rank, in one micro-batch of four."""
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same weights and the same batch everywhere
    model = nn.Sequential(nn.Linear(16, 33), nn.ReLU(), nn.Linear(33, 16)).to(device)
    inputs = torch.randn(64, 16).chunk(size)[rank].to(device)  # this rank's part of the batch
    targets = inputs.flip(1)
    parts = [batch.tensor_split(NUM_MICRO_BATCHES) for batch in (inputs, targets)]
    micro_batches = list(zip(*parts, strict=True))

    # Gradients are added up in float32: a sum over many ranks overflows before its terms do.
    half = MixedPrecisionPolicy(param_dtype=torch.float16, reduce_dtype=torch.float32)
    for unit in (model[0], model[2], model):
        fully_shard(unit, mp_policy=half)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    # Attached, so that a step before the last micro-batch is an error and not a lost one.
    scaler = ShardedGradScaler(device, model=model)

    for step in range(5):
        optimizer.zero_grad()
        losses = []
        for i, (x, y) in enumerate(micro_batches):
            # 1e6 is beyond float16, and one rank alone sees it.
            factor = 1e6 if (step, i) == (2, 1) and rank == size - 1 else 1.0
            model.set_requires_gradient_sync(i == NUM_MICRO_BATCHES - 1)
            loss = mse_loss(model(x * factor).float(), y) / NUM_MICRO_BATCHES
            scaler.scale(loss).backward()
            losses.append(loss.detach())
        norm = scaler.clip_grad_norm_(optimizer, max_norm=1.0)
        scaler.step(optimizer)
        outcome = "skipped" if scaler.verdict(optimizer).found_inf else "stepped"
        scaler.update()

        loss = torch.stack(losses).sum() / size
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
