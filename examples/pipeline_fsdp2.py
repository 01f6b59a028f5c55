"""Pipeline and FSDP2: the ranks of a stage shard it among themselves, and see parts of the batch.

    torchrun --nproc-per-node 4 examples/pipeline_fsdp2.py  # 1, 2, 4 or 8 ranks

Who counts what: a stage's parameters are DTensors on the mesh of that stage, and each rank counts
its rows. What the other stages hold they cannot know: copies of this stage (it would be HSDP), or
other layers. `copies=shardscale.distinct` says that it is other layers.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn.functional import mse_loss

import shardscale
from shardscale import ShardedGradScaler


def main(device: str) -> None:
    """Train for five steps; the third overflows in the first stage, and so in all."""
    rank, size = dist.get_rank(), dist.get_world_size()
    if size not in (1, 2, 4, 8):
        raise SystemExit(f"run this on 1, 2, 4 or 8 ranks, not {size}")
    num_stages = min(2, size)
    mesh = init_device_mesh(device, (num_stages, size // num_stages), mesh_dim_names=("pp", "dp"))
    here, part = mesh.get_coordinate()
    torch.manual_seed(0)  # the same weights and the same batch everywhere
    layers = [layer for _ in range(4) for layer in (nn.Linear(16, 16), nn.ReLU())][:-1]
    per_stage = 8 // num_stages
    # A slice of a Sequential keeps the names that the layers have in the whole model.
    model = nn.Sequential(*layers)[per_stage * here : per_stage * (here + 1)].to(device)
    inputs = torch.randn(32, 16).chunk(mesh["dp"].size())[part].to(device)
    targets = inputs.flip(1)

    half = MixedPrecisionPolicy(param_dtype=torch.float16, reduce_dtype=torch.float32)
    fully_shard(model, mesh=mesh["dp"], mp_policy=half)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    # The whole job agrees, so that stages which never see the loss skip with the last one.
    scaler = ShardedGradScaler(device).attach(model, copies=shardscale.distinct)

    # The schedule calls backward itself: `wrap_loss` scales the gradient and leaves the value.
    loss_fn = scaler.wrap_loss(lambda output, target: mse_loss(output.float(), target))
    stage = PipelineStage(model, here, num_stages, torch.device(device), group=mesh.get_group("pp"))
    schedule = ScheduleGPipe(stage, n_microbatches=4, loss_fn=loss_fn)

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
        dist.all_reduce(loss)  # from the ranks of the last stage to all
        loss /= mesh["dp"].size()
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
