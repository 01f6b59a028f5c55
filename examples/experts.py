"""Experts (MoE): four experts on ranks of their own, and a router before them that is sharded.

    torchrun --nproc-per-node 4 examples/experts.py  # 1, 2 or 4 ranks

Who counts what: the router's parameters are DTensors on all ranks, which know their owners. Those
of an expert are plain tensors that no other rank holds: `copies=shardscale.distinct` says so.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.functional import mse_loss, one_hot

import shardscale


class Mixture(nn.Module):
    """Each of four experts takes the four tokens of a sequence that suit it best."""

    def __init__(self, mesh: dist.DeviceMesh) -> None:
        super().__init__()
        self.mesh, per_rank = mesh, 4 // mesh.size()
        self.router = nn.Linear(16, 4)
        experts = [(str(i), nn.Linear(16, 16)) for i in range(4)]  # dealt in blocks, as by Shard(0)
        self.experts = nn.ModuleDict(experts[mesh.get_local_rank() * per_rank :][:per_rank])

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.router(x).softmax(2).topk(4, 1)  # (batch, 4 tokens, 4 experts)
        chosen = one_hot(chosen, x.shape[1]).to(x.dtype)
        tokens = torch.einsum("bkes,bsd->ebkd", chosen, x).flatten(1, 2)
        tokens = self.exchange(tokens, Shard(1), Shard(0))  # from all ranks to this rank's experts
        tokens = torch.stack([e(t) for e, t in zip(self.experts.values(), tokens, strict=True)])
        tokens = self.exchange(tokens, Shard(0), Shard(1)).unflatten(1, weight.shape[:2])
        return x + torch.einsum("bkes,bke,ebkd->bsd", chosen, weight, tokens)

    def exchange(self, x: Tensor, have: Shard, want: Shard) -> Tensor:
        return DTensor.from_local(x, self.mesh, [have]).redistribute(placements=[want]).to_local()


def main(device: str) -> None:
    """Train for five steps; in the third one expert overflows."""
    rank, size = dist.get_rank(), dist.get_world_size()
    if size not in (1, 2, 4):
        raise SystemExit(f"run this on 1, 2 or 4 ranks, not {size}")
    torch.manual_seed(0)  # the same weights and the same batch everywhere
    model = Mixture(dist.init_device_mesh(device, (size,))).to(device)
    inputs = torch.randn(8, 12, 16).chunk(size)[rank].to(device)  # this rank's part of the batch
    fully_shard(model, mesh=model.mesh, ignored_params=set(model.experts.parameters()))
    groups = [{"params": part.parameters()} for part in model.children()]  # foreach takes no mix
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    scaler = shardscale.ShardedGradScaler(device).attach(model, copies=shardscale.distinct)

    for step in range(5):
        optimizer.zero_grad()
        with torch.autocast(device, dtype=torch.float16):
            loss = mse_loss(model(inputs), inputs.flip(2))
        scaler.scale(loss).backward()
        for p in model.experts.parameters():
            p.grad /= size  # a sum over the tokens of all ranks, where FSDP2 takes the mean
        if step == 2 and rank == size - 1:  # an Inf of which no other rank sees anything
            next(model.experts.parameters()).grad[0, 0] = float("inf")
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
