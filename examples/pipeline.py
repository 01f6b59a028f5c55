"""Pipeline parallelism: every rank holds one stage of the model, and only the last sees a loss.

    torchrun --nproc-per-node 4 examples/pipeline.py  # 1, 2 or 4 ranks

Who counts what: a stage's parameters are plain tensors that no other rank holds. To the scaler they
might as well be copies, so `copies=shardscale.distinct` says that they are not.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn.functional import mse_loss

import shardscale
from shardscale import ShardedGradScaler


def main(device: str) -> None:
    """Train for five steps; the third overflows in the first stage, and so in all."""
    rank, size = dist.get_rank(), dist.get_world_size()
    if size not in (1, 2, 4):
        raise SystemExit(f"run this on 1, 2 or 4 ranks, not {size}")
    torch.manual_seed(0)  # the same weights and the same batch everywhere
    layers = [layer for _ in range(4) for layer in (nn.Linear(16, 16), nn.ReLU())][:-1]
    per_stage = 8 // size
    # A slice of a Sequential keeps the names that the layers have in the whole model.
    model = nn.Sequential(*layers)[per_stage * rank : per_stage * (rank + 1)].to(device)
    inputs = torch.randn(32, 16).to(device)
    targets = inputs.flip(1)

    # The schedule runs forward and backward; autocast belongs to the forward alone.
    model.forward = torch.autocast(device, dtype=torch.float16)(model.forward)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    # The whole job agrees, so that stages which never see the loss skip with the last one.
    scaler = ShardedGradScaler(device).attach(model, copies=shardscale.distinct)

    # The schedule calls backward itself: `wrap_loss` scales the gradient and leaves the value.
    loss_fn = scaler.wrap_loss(lambda output, target: mse_loss(output.float(), target))
    stage = PipelineStage(model, rank, size, torch.device(device))
    schedule = Schedule1F1B(stage, n_microbatches=4, loss_fn=loss_fn)

    for step in range(5):
        factor = 1e6 if step == 2 else 1.0  # 1e6 is beyond float16
        optimizer.zero_grad()
        first = (inputs * factor,) if stage.is_first else ()
        losses: list[Tensor] = []  # stays empty but in the last stage
        schedule.step(*first, target=targets, losses=losses)
        norm = scaler.clip_grad_norm_(optimizer, max_norm=1.0)
        scaler.step(optimizer)
        outcome = "skipped" if scaler.verdict(optimizer).found_inf else "stepped"
        scaler.update()

        loss = torch.stack(losses).mean() if losses else torch.zeros((), device=device)
        dist.all_reduce(loss)  # from the last rank to all
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
    dist.destroy_process_group()
