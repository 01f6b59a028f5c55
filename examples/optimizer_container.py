"""An optimizer container: one object over the optimizers of several model parts, as torchtitan has.

    torchrun --nproc-per-node 4 examples/optimizer_container.py  # 1 to 8 ranks

To the scaler whatever has `param_groups` and `step` is an optimizer, so the container is passed as
one: one verdict for all of its parts, and its `step` is called or not. Schedulers and checkpoints
see one object, too.
"""

import gc
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.functional import mse_loss

from shardscale import ShardedGradScaler


class Optimizers:
    """AdamW for each part of a model."""

    def __init__(self, parts: list[nn.Module], lr: float) -> None:
        self.optimizers = [torch.optim.AdamW(part.parameters(), lr=lr) for part in parts]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of all optimizers, which may change them."""
        return [group for each in self.optimizers for group in each.param_groups]

    def step(self) -> None:
        """Step all of them."""
        for each in self.optimizers:
            each.step()

    def zero_grad(self) -> None:
        """Drop the gradients of all parts."""
        for each in self.optimizers:
            each.zero_grad()


def main(device: str) -> None:
    """Train for five steps; the third overflows on the last rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same weights and the same batch everywhere
    model = nn.Sequential(nn.Linear(16, 33), nn.ReLU(), nn.Linear(33, 16)).to(device)
    inputs = torch.randn(32, 16).chunk(size)[rank].to(device)  # this rank's part of the batch
    targets = inputs.flip(1)

    half = MixedPrecisionPolicy(param_dtype=torch.float16, reduce_dtype=torch.float32)
    parts = [model[:2], model[2:]]  # as the stages that a rank holds of an interleaved pipeline
    for part in parts:
        fully_shard(part, mp_policy=half)
    optimizers = Optimizers(parts, lr=0.01)
    scaler = ShardedGradScaler(device, model=model)

    for step in range(5):
        # 1e6 is beyond float16, and one rank alone sees it.
        factor = 1e6 if step == 2 and rank == size - 1 else 1.0
        optimizers.zero_grad()
        loss = mse_loss(parts[1](parts[0](inputs * factor)).float(), targets)
        scaler.scale(loss).backward()
        norm = scaler.clip_grad_norm_(optimizers, max_norm=1.0)
        scaler.step(optimizers)
        outcome = "skipped" if scaler.verdict(optimizers).found_inf else "stepped"
        scaler.update()

        loss = loss.detach() / size
        dist.all_reduce(loss)
        if rank == 0:
            print(f"step {step}: loss {loss:.4f}, norm {norm:.4f}, {outcome}")
    taken = int(next(iter(optimizers.optimizers[0].state.values()))["step"])  # AdamW's own count
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
