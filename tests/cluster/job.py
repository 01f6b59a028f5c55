"""The training job of the fault matrix: a small model, a few steps, a log a rank, planted faults.

    torchrun --nproc-per-node 2 -m tests.cluster.job --folder DIR --fault kill-before:1:5

All ranks see the same data, so nothing but the verdict is sent (with ``--model fsdp2`` the shards
are, too) and ranks that decide alike hold equal parameters. The entries depend on neither the
launcher nor the number of ranks.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler as TorchScaler

from launch import checkpoints
from shardscale import Communicator, ShardedGradScaler, init_distributed
from shardscale.comm import ProcessGroupComm, Solo
from tests.cluster.faults import Address, Faults
from tests.cluster.logs import Entry, RankLog, digest, read

__all__ = ["End", "alone", "end_of", "options", "run"]


class End(NamedTuple):
    """How a rank that could still say so came to its end."""

    error: str | None  # the type's name; None after the last step
    message: str
    at_s: float  # on the clock of time.monotonic(), which all processes of a host share

    def missing(self) -> set[int] | None:
        """The ranks that a MissingRankError names; None if it says that it cannot know them."""
        assert self.error == "MissingRankError", self
        if "the store does not answer" in self.message:
            return None
        found = re.search(r"Did not come: ranks? ((\d+( \([^)]*\))?(, )?)+)", self.message)
        assert found, self.message
        without_hosts = re.sub(r"\([^)]*\)", "", found[1])
        return set(map(int, re.findall(r"\d+", without_hosts)))


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--model", choices=["sgd", "adamw", "fsdp2"], default="sgd")
    parser.add_argument("--scaler", choices=["ours", "deaf", "torch"], default="ours")
    parser.add_argument("--timeout", type=float, default=3.0)
    parser.add_argument("--checkpoints", type=Path)
    parser.add_argument("--fault", type=Address.parse, action="append", default=[])
    parser.set_defaults(start=0)
    return parser.parse_args(arguments)


def run(chosen: argparse.Namespace, rank: int, size: int, comm: Communicator | None = None) -> None:
    """Train on this rank, and leave a word about how it ended.

    Args:
        chosen: What ``options`` has read.
        rank: This rank's number in the job.
        size: The number of ranks in the job.
        comm: What the ranks agree through; None for the default process group.
    """
    try:
        _train(chosen, rank, size, comm)
    except BaseException as error:
        _leave(chosen.folder, rank, End(type(error).__name__, str(error), time.monotonic()))
        raise
    _leave(chosen.folder, rank, End(None, "", time.monotonic()))


def alone(folder: Path, *arguments: str) -> list[Entry]:
    """What one rank writes, run here; the ranks of a job that decide alike write the same."""
    run(options(["--folder", str(folder), *arguments]), 0, 1)
    return read(folder, 0)[0]


def end_of(folder: Path, rank: int) -> End | None:
    """How a rank ended; None if it could not say."""
    path = folder / f"rank{rank}.end"
    return End(*json.loads(path.read_text())) if path.exists() else None


def _train(chosen: argparse.Namespace, rank: int, size: int, comm: Communicator | None) -> None:
    faults = Faults(chosen.fault, chosen.start, rank, size, chosen.folder)
    log = RankLog(chosen.folder, rank)
    model, optimizer = _model(chosen.model)
    if chosen.scaler == "deaf":
        comm = _Deaf(comm or ProcessGroupComm(dist.group.WORLD, chosen.timeout))
    scaler = _scaler(chosen, faults.through(comm, chosen.timeout))
    if dist.is_initialized():
        dist.barrier()  # the first verdict is not to wait for a slow import
    saved = chosen.checkpoints
    first = checkpoints.load_newest(saved, model, optimizer, scaler) if saved else 0
    for step in range(first, chosen.steps):
        before = digest(model.parameters())
        optimizer.zero_grad()
        scaler.scale(model(_batch(step)).square().mean()).backward()
        faults.in_gradients(model, step)
        faults.before_verdict()
        scaler.step(optimizer)
        faults.after_verdict()
        scaler.update()
        after = digest(model.parameters())
        # Whether it was skipped is what the parameters say, not the scaler.
        log.write(step, skipped=before == after, scale=scaler.get_scale(), digest=after)
        if saved:
            checkpoints.save(saved, step + 1, model, optimizer, scaler)


def _model(kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    values = torch.Generator().manual_seed(0)  # a rank may be a thread: not torch's only one
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=values) / 4)
    if kind == "sgd":
        return model, torch.optim.SGD(model.parameters(), lr=0.05)
    if kind == "fsdp2":
        fully_shard(model)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)


def _scaler(chosen: argparse.Namespace, comm: Communicator | None) -> torch.amp.GradScaler:
    if chosen.scaler == "torch":
        return TorchScaler("cpu", init_scale=1024.0, growth_interval=3)
    return ShardedGradScaler(
        "cpu",
        init_scale=1024.0,
        growth_interval=3,
        comm=comm,
        timeout_s=chosen.timeout,
    )


class _Deaf(Solo):
    """Waits for the others, and keeps to what this rank has found: a scaler to be found out."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm

    def all_reduce_sum_(self, buffer: Tensor) -> None:
        self._comm.all_reduce_sum_(buffer.clone())


def _batch(step: int) -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(step))


def _leave(folder: Path, rank: int, end: End) -> None:
    path = folder / f"rank{rank}.end"
    path.with_suffix(".end.new").write_text(json.dumps(end))
    path.with_suffix(".end.new").rename(path)  # whoever finds it finds all of it


def main() -> None:
    """Be one of the ranks that a launcher has started; each start of the job has a folder."""
    chosen = options()
    init_distributed("gloo")
    number = [sum(1 for _ in chosen.folder.glob("run*"))]
    dist.broadcast_object_list(number)  # as rank 0 has counted; torchrun's own counts may differ
    chosen.start = number[0]
    chosen.folder /= f"run{chosen.start}"
    chosen.folder.mkdir(exist_ok=True)
    run(chosen, dist.get_rank(), dist.get_world_size())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
