"""Muon for the matrices and AdamW for the rest, clipped by one norm and stepped together.

    torchrun --nproc-per-node 4 examples/muon_adamw.py  # 1 to 8 ranks

One call takes both optimizers: one norm over all gradients, one verdict, one all-reduce. Both step,
or both skip. Under FSDP2 Muon's own step communicates, because it multiplies whole matrices: a rank
that skipped alone would leave the others waiting there.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.functional import mse_loss

from shardscale import ShardedGradScaler


def main(device: str) -> None:
    """Train for five steps; the third overflows on the last rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same weights and the same batch everywhere
    model = nn.Sequential(nn.Linear(16, 33), nn.ReLU(), nn.Linear(33, 16)).to(device)
    inputs = torch.randn(32, 16).chunk(size)[rank].to(device)  # this rank's part of the batch
    targets = inputs.flip(1)

    # Gradients are added up in float32: a sum over many ranks overflows before its terms do.
    half = MixedPrecisionPolicy(param_dtype=torch.float16, reduce_dtype=torch.float32)
    for unit in (model[0], model[2], model):
        fully_shard(unit, mp_policy=half)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    muon = torch.optim.Muon(matrices, lr=0.01)
    adamw = torch.optim.AdamW(others, lr=0.01)
    scaler = ShardedGradScaler(device, model=model)

    for step in range(5):
        # 1e6 is beyond float16, and one rank alone sees it.
        factor = 1e6 if step == 2 and rank == size - 1 else 1.0
        model.zero_grad()
        loss = mse_loss(model(inputs * factor).float(), targets)
        scaler.scale(loss).backward()
        norm = scaler.clip_grad_norm_([muon, adamw], max_norm=1.0)
        scaler.step([muon, adamw])
        outcome = "skipped" if scaler.verdict([muon, adamw]).found_inf else "stepped"
        scaler.update()

        loss = loss.detach() / size
        dist.all_reduce(loss)
        if rank == 0:
            print(f"step {step}: loss {loss:.4f}, norm {norm:.4f}, {outcome}")

    taken = int(adamw.state[others[0]]["step"])  # AdamW's own count; Muon has none
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
