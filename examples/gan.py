"""A GAN: two updates of the critic to one of the generator, both under DDP.

    torchrun --nproc-per-node 4 examples/gan.py  # 1 to 8 ranks

One scaler serves both. Each turn scales a loss of its own, has a verdict of its own and ends with
an update: where one overflows, that turn alone is skipped, and the next begins at the lower scale.
Every rank takes the same turns in the same order.
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

from shardscale import ShardedGradScaler


def main(device: str) -> None:
    """Train for five steps; the third overflows on the last rank, in the generator's turn."""
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same weights and the same batch everywhere
    half = torch.autocast(device, dtype=torch.float16)

    def perceptron(num_outputs: int) -> nn.Module:
        net = nn.Sequential(nn.Linear(16, 33), nn.ReLU(), nn.Linear(33, num_outputs))
        return DistributedDataParallel(net.to(device))

    generator, critic = perceptron(16), perceptron(4)  # four judgements of each sample
    noises = torch.randn(3, 32, 16).chunk(size, dim=1)[rank].to(device)  # one for each turn
    real = torch.randn(32, 16).add(1).chunk(size)[rank].to(device)
    truths = torch.cat([torch.ones(len(real), 4), torch.zeros(len(real), 4)]).to(device)

    generate = torch.optim.SGD(generator.parameters(), lr=0.1)
    criticize = torch.optim.AdamW(critic.parameters(), lr=0.001)
    # The names say which of the two a parameter belongs to.
    both = nn.ModuleDict({"generator": generator, "critic": critic})
    scaler = ShardedGradScaler(device, model=both)

    taken = 0
    for step in range(5):
        for noise in noises[:2]:
            criticize.zero_grad()  # also of what the generator's turn has left
            with half:
                fake = generator.module(noise).detach()
                loss = mse_loss(critic(torch.cat([real, fake])).float(), truths)
            scaler.scale(loss).backward()
            scaler.clip_grad_norm_(criticize, max_norm=1.0)
            scaler.step(criticize)
            scaler.update()

        factor = 1e6 if step == 2 and rank == size - 1 else 1.0  # 1e6 is beyond float16
        generate.zero_grad()
        with half:
            # Not through DDP: nobody needs the critic's gradients in this turn.
            judged = critic.module(generator(noises[2] * factor))
            loss = mse_loss(judged.float(), truths[: len(judged)])
        scaler.scale(loss).backward()
        norm = scaler.clip_grad_norm_(generate, max_norm=1.0)
        scaler.step(generate)
        outcome = "skipped" if scaler.verdict(generate).found_inf else "stepped"
        taken += outcome == "stepped"
        scaler.update()

        loss = loss.detach() / size
        dist.all_reduce(loss)
        if rank == 0:
            print(f"step {step}: loss {loss:.4f}, norm {norm:.4f}, {outcome}")

    ranks = [None] * size
    mine = int(criticize.state[next(critic.parameters())]["step"])  # AdamW's own count
    dist.all_gather_object(ranks, ((taken, scaler.get_scale()), (mine, scaler.get_scale())))
    if rank == 0:
        print("steps taken and scale, rank by rank:", [generator for generator, _ in ranks])
        print("critic: steps taken and scale, rank by rank:", [critic for _, critic in ranks])
        print(scaler.describe())


if __name__ == "__main__":
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    main("cuda" if on_gpu else "cpu")
    dist.destroy_process_group()
