"""LoRA: the weights are frozen, and two thin matrices beside each of them are trained under FSDP2.

    torchrun --nproc-per-node 4 examples/lora.py  # 1 to 8 ranks

Who counts what: frozen weights have no gradient and no part in the norm. Of the trained matrices
each rank counts its own rows; DTensors know that themselves, and nothing has to be declared. A rank
may hold no row of a thin matrix: it takes part in every verdict all the same.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.functional import mse_loss

from shardscale import ShardedGradScaler


class LoRA(nn.Module):
    """A frozen linear layer and a trained correction of rank 3."""

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.base = nn.Linear(num_inputs, num_outputs).requires_grad_(False)
        self.down = nn.Linear(num_inputs, 3, bias=False)
        self.up = nn.Linear(3, num_outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def main(device: str) -> None:
    """Train for five steps; the third overflows on the last rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same weights and the same batch everywhere
    model = nn.Sequential(LoRA(16, 33), nn.ReLU(), LoRA(33, 16)).to(device)
    inputs = torch.randn(32, 16).chunk(size)[rank].to(device)  # this rank's part of the batch
    targets = inputs.flip(1)

    half = MixedPrecisionPolicy(param_dtype=torch.float16, reduce_dtype=torch.float32)
    for unit in (model[0], model[2], model):
        fully_shard(unit, mp_policy=half)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
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

    taken = int(optimizer.state[trained[0]]["step"])  # AdamW's own count
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
