"""Actor and critic: two losses and two optimizers in one iteration, and one update at its end.

    torchrun --nproc-per-node 4 examples/actor_critic.py  # 1 to 8 ranks

Both losses are scaled by one scale. The optimizers are clipped by norms of their own, so each has a
verdict: here the actor skips and the critic steps. `update` comes once, after both: it backs off
once if any of the verdicts was bad. The actor lies under FSDP2 and the critic under DDP.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.parallel import DistributedDataParallel

from shardscale import ShardedGradScaler


def main(device: str) -> None:
    """Train for five steps; in the third the actor overflows on the last rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same weights and the same batch everywhere
    actor = nn.Sequential(nn.Linear(16, 33), nn.ReLU(), nn.Linear(33, 4)).to(device)
    critic = nn.Sequential(nn.Linear(16, 33), nn.ReLU(), nn.Linear(33, 1)).to(device)
    states = torch.randn(32, 16).chunk(size)[rank].to(device)  # this rank's part of the batch
    actions = torch.randint(4, (32,)).chunk(size)[rank].to(device)
    returns = torch.rand(32).chunk(size)[rank].to(device)

    half = MixedPrecisionPolicy(param_dtype=torch.float16, reduce_dtype=torch.float32)
    for unit in (actor[0], actor[2], actor):
        fully_shard(unit, mp_policy=half)
    critic = DistributedDataParallel(critic)
    act = torch.optim.AdamW(actor.parameters(), lr=0.002)
    criticize = torch.optim.AdamW(critic.parameters(), lr=0.002)
    # The names say which of the two a parameter belongs to.
    scaler = ShardedGradScaler(device, model=nn.ModuleDict({"actor": actor, "critic": critic}))

    for step in range(5):
        # 1e6 is beyond float16, and one rank alone sees it.
        factor = 1e6 if step == 2 and rank == size - 1 else 1.0
        act.zero_grad()
        criticize.zero_grad()
        with torch.autocast(device, dtype=torch.float16):
            values = critic(states).float().squeeze(1)
        log_odds = actor(states * factor).float()
        advantages = returns - values.detach()
        losses = [
            (advantages * cross_entropy(log_odds, actions, reduction="none")).mean(),
            0.25 * mse_loss(values, returns),
        ]
        for scaled in scaler.scale(losses):
            scaled.backward()
        norm = scaler.clip_grad_norm_(act, max_norm=1.0)
        scaler.clip_grad_norm_(criticize, max_norm=1.0)
        scaler.step(act)
        scaler.step(criticize)
        outcome = "skipped" if scaler.verdict(act).found_inf else "stepped"
        scaler.update()

        loss = torch.stack(losses).detach().sum() / size
        dist.all_reduce(loss)
        if rank == 0:
            print(f"step {step}: loss {loss:.4f}, norm {norm:.4f}, {outcome}")

    taken = [int(next(iter(each.state.values()))["step"]) for each in (act, criticize)]
    ranks = [None] * size
    dist.all_gather_object(ranks, [(num, scaler.get_scale()) for num in taken])
    if rank == 0:
        print("steps taken and scale, rank by rank:", [actor for actor, _ in ranks])
        print("critic: steps taken and scale, rank by rank:", [critic for _, critic in ranks])
        print(scaler.describe())


if __name__ == "__main__":
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    main("cuda" if on_gpu else "cpu")
    gc.collect()  # what FSDP leaves behind can abort Python when it ends (torch 2.13)
    dist.destroy_process_group()
