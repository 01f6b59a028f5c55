"""Two scalers: two models trained side by side on the same ranks, each at its own scale.

    torchrun --nproc-per-node 4 examples/two_scalers.py  # 1 to 8 ranks

A teacher and a student learn from the same batches; here the teacher overflows, and the student
goes on. Every rank makes the scalers in the same order and calls them in the same order: they are
numbered as they are made, and a rank that mixes them up is a DisagreementError, not a wrong step.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

from shardscale import ShardedGradScaler


def main(device: str) -> None:
    """Train for five steps; in the third the teacher overflows on the last rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same weights and the same batch everywhere
    teacher = nn.Sequential(nn.Linear(16, 33), nn.ReLU(), nn.Linear(33, 16)).to(device)
    student = nn.Linear(16, 16).to(device)
    inputs = torch.randn(32, 16).chunk(size)[rank].to(device)  # this rank's part of the batch
    targets = inputs.flip(1)

    half = MixedPrecision(torch.float16, reduce_dtype=torch.float32)
    teacher = FullyShardedDataParallel(
        teacher, mixed_precision=half, device_id=inputs.device, use_orig_params=True
    )
    student = DistributedDataParallel(student)
    teach = torch.optim.AdamW(teacher.parameters(), lr=0.01)
    learn = torch.optim.AdamW(student.parameters(), lr=0.01)
    first = ShardedGradScaler(device, model=teacher)
    second = ShardedGradScaler(device, model=student)

    for step in range(5):
        # 1e6 is beyond float16, and one rank alone sees it.
        factor = 1e6 if step == 2 and rank == size - 1 else 1.0
        teach.zero_grad()
        output = teacher(inputs * factor).float()
        loss = mse_loss(output, targets)
        first.scale(loss).backward()
        norm = first.clip_grad_norm_(teach, max_norm=1.0)
        first.step(teach)
        outcome = "skipped" if first.verdict(teach).found_inf else "stepped"
        first.update()

        learn.zero_grad()
        with torch.autocast(device, dtype=torch.float16):
            copied = mse_loss(student(inputs).float(), targets)
        second.scale(copied).backward()
        second.clip_grad_norm_(learn, max_norm=1.0)
        second.step(learn)
        second.update()

        loss = loss.detach() / size
        dist.all_reduce(loss)
        if rank == 0:
            print(f"step {step}: loss {loss:.4f}, norm {norm:.4f}, {outcome}")

    pairs = [(teach, first), (learn, second)]
    ranks = [None] * size
    dist.all_gather_object(
        ranks, [(int(next(iter(o.state.values()))["step"]), s.get_scale()) for o, s in pairs]
    )
    if rank == 0:
        print("steps taken and scale, rank by rank:", [teacher for teacher, _ in ranks])
        print("student: steps taken and scale, rank by rank:", [student for _, student in ranks])
        print(first.describe())


if __name__ == "__main__":
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    main("cuda" if on_gpu else "cpu")
    gc.collect()  # what FSDP leaves behind can abort Python when it ends (torch 2.13)
    dist.destroy_process_group()
