"""Phases: the head is trained alone, then the backbone with it, each with an optimizer of its own.

    torchrun --nproc-per-node 4 examples/frozen_phases.py  # 1 to 8 ranks

A phase names the optimizers it trains; the scaler, its scale and the other optimizer's state live
through all of them. DDP sees at its making what is frozen, so each phase wraps the model anew and
attaches it again; the parameters, and with them the optimizers, stay.
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

from shardscale import ShardedGradScaler


def main(device: str) -> None:
    """Train for five steps, two of them with the head alone; the third overflows on one rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same weights and the same batch everywhere
    backbone = nn.Sequential(nn.Linear(16, 33), nn.ReLU()).to(device)
    head = nn.Linear(33, 16).to(device)
    inputs = torch.randn(32, 16).chunk(size)[rank].to(device)  # this rank's part of the batch
    targets = inputs.flip(1)

    slow = torch.optim.AdamW(backbone.parameters(), lr=0.003)
    fast = torch.optim.AdamW(head.parameters(), lr=0.01)
    scaler = ShardedGradScaler(device)

    def begin_phase(trains_backbone: bool) -> nn.Module:
        backbone.requires_grad_(trains_backbone)
        model = DistributedDataParallel(nn.Sequential(backbone, head))
        scaler.attach(model)
        return model

    for step in range(5):
        if step == 0:
            model, optimizers = begin_phase(trains_backbone=False), [fast]
        elif step == 2:
            model, optimizers = begin_phase(trains_backbone=True), [slow, fast]
        # 1e6 is beyond float16, and one rank alone sees it.
        factor = 1e6 if step == 2 and rank == size - 1 else 1.0
        model.zero_grad()
        with torch.autocast(device, dtype=torch.float16):
            loss = mse_loss(model(inputs * factor), targets)
        scaler.scale(loss).backward()
        norm = scaler.clip_grad_norm_(optimizers, max_norm=1.0)
        scaler.step(optimizers)
        outcome = "skipped" if scaler.verdict(optimizers).found_inf else "stepped"
        scaler.update()

        loss = loss.detach() / size
        dist.all_reduce(loss)
        if rank == 0:
            print(f"step {step}: loss {loss:.4f}, norm {norm:.4f}, {outcome}")

    # AdamW's own counts
    taken = [int(next(iter(each.state.values()))["step"]) for each in (fast, slow)]
    ranks = [None] * size
    dist.all_gather_object(ranks, [(num, scaler.get_scale()) for num in taken])
    if rank == 0:
        print("steps taken and scale, rank by rank:", [head for head, _ in ranks])
        print("backbone: steps taken and scale, rank by rank:", [slow for _, slow in ranks])
        print(scaler.describe())


if __name__ == "__main__":
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    main("cuda" if on_gpu else "cpu")
    dist.destroy_process_group()
