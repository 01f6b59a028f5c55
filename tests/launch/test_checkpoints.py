"""Whatever becomes of a job while it saves, the next one finds a checkpoint that is whole."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.fsdp import fully_shard

from launch import checkpoints
from shardscale import DynamicScale, ShardedGradScaler
from tests.ranks.rank import outcome


class Job:
    """A little FSDP2 job, or one of a single process, that counts its steps."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
        if dist.is_initialized():
            fully_shard(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        policy = DynamicScale(growth_interval=3, hysteresis=2)
        self.scaler = ShardedGradScaler("cpu", init_scale=8.0, policy=policy)

    def train(self, first, last, bad=()):
        for step in range(first, last):
            self.optimizer.zero_grad()
            loss = self.model(torch.full((4, 3), step + 1.0)).square().mean()
            self.scaler.scale(loss).backward()
            if step in bad:
                for p in self.model.parameters():
                    p.grad.mul_(float("inf"))
            self.scaler.clip_grad_norm_(self.optimizer, 1.0)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return self

    def save(self, folder, step, **options):
        checkpoints.save(folder, step, self.model, self.optimizer, self.scaler, **options)

    def load(self, folder):
        return checkpoints.load_newest(folder, self.model, self.optimizer, self.scaler)

    def state(self):
        moments = [self.optimizer.state[p] for p in self.model.parameters()]
        tensors = [*self.model.parameters(), *(m[key] for m in moments for key in sorted(m))]
        whole = [t.full_tensor() if hasattr(t, "full_tensor") else t for t in tensors]
        return [t.tolist() for t in whole], self.scaler.state_dict()


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def save_and_load(rank, size, folder):
    job = Job().train(0, 4, bad={3})
    job.save(folder, 4)
    fresh = Job()
    return fresh.load(folder), fresh.state() == job.state()


@pytest.mark.parametrize("backend", ["gloo", None], ids=["two ranks", "alone"])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_was_saved_comes_back_bit_for_bit(ranks, tmp_path, backend):
    found = ranks.run(
        save_and_load, 2 if backend else 1, backend=backend, folder=str(tmp_path / "a" / "b")
    )
    assert set(found) == {(4, True)}


def load_nothing(rank, size, folder):
    job = Job().train(0, 1)
    before = job.state()
    return job.load(folder), job.state() == before


def test_without_a_checkpoint_the_job_begins_at_step_0(ranks, tmp_path):
    """Neither an empty folder nor a save that never ended is one."""
    (tmp_path / "step-00000007.partial").mkdir()
    assert ranks.run(load_nothing, 2, folder=str(tmp_path)) == [(0, True)] * 2


def die_while_saving(rank, size, folder, moment):
    """Save at step 2; be killed while saving at step 4."""
    job = Job().train(0, 2)
    job.save(folder, 2)
    job.train(2, 4)

    def die(*args):
        os.kill(os.getpid(), signal.SIGKILL)

    if moment == "writing" and rank == 1:
        dcp.FileSystemWriter.write_data = die
    if moment == "renaming" and rank == 0:
        checkpoints._publish = die
    job.save(folder, 4)


def go_on(rank, size, folder):
    job = Job()
    found = job.load(folder)
    unbroken = Job().train(0, found)
    is_same = job.state() == unbroken.state()
    job.train(found, 4).save(folder, 4)
    return found, is_same, Job().load(folder)


@pytest.mark.parametrize("moment", ["writing", "renaming"])
def test_a_job_killed_while_it_saves_goes_on_from_the_checkpoint_before(ranks, tmp_path, moment):
    reports = ranks.spawn(die_while_saving, 2, folder=str(tmp_path), moment=moment)
    assert [report.exit_code for report in reports].count(-signal.SIGKILL) == 1
    assert names(tmp_path) == ["step-00000002", "step-00000004.partial"]
    assert ranks.run(go_on, 2, folder=str(tmp_path)) == [(2, True, 4)] * 2
    assert names(tmp_path) == ["step-00000002", "step-00000004"]


def save_often(rank, size, folder):
    job = Job()
    for step in (1, 2, 2, 3):
        job.train(step - 1, step).save(folder, step, keep=2)
    return Job().load(folder)


def test_the_newest_are_kept(ranks, tmp_path):
    """One saved twice is the newer of the two, and one."""
    assert ranks.run(save_often, 1, folder=str(tmp_path)) == [3]
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


def save_where_no_folder_can_be(rank, size, folder):
    job = Job()
    return outcome(lambda: job.save(folder, 1)), outcome(lambda: job.train(0, 1)).error


def test_what_rank_0_cannot_do_is_raised_on_every_rank(ranks, tmp_path):
    """And nobody waits: the job could even go on."""
    (tmp_path / "file").touch()
    folder = str(tmp_path / "file" / "checkpoints")
    for saved, trained in ranks.run(save_where_no_folder_can_be, 2, folder=folder):
        assert saved.error == "RuntimeError" and "rank 0" in saved.message, saved
        assert folder in saved.message and trained is None
