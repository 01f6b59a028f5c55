"""Whatever becomes of a job while it saves, the next one finds a checkpoint that is whole."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp

from launch import checkpoints
from tests.ranks.rank import outcome
from tests.ranks.resumable import Job


def save(job, folder, step, **options):
    checkpoints.save(folder, step, job.model, job.optimizer, job.scaler, **options)


def load(job, folder):
    return checkpoints.load_newest(folder, job.model, job.optimizer, job.scaler)


def trained(first, last):
    job = Job()
    job.train(first, last)
    return job


def state(job):
    return job.whole(), job.scaler.state_dict()


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def save_and_load(rank, size, folder):
    job = trained(0, 4)
    save(job, folder, 4)
    fresh = Job()
    return load(fresh, folder), state(fresh) == state(job)


@pytest.mark.parametrize("backend", ["gloo", None], ids=["two ranks", "alone"])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_was_saved_comes_back_bit_for_bit(ranks, tmp_path, backend):
    found = ranks.run(
        save_and_load, 2 if backend else 1, backend=backend, folder=str(tmp_path / "a" / "b")
    )
    assert set(found) == {(4, True)}


def load_nothing(rank, size, folder):
    job = trained(0, 1)
    before = state(job)
    return load(job, folder), state(job) == before


def test_without_a_checkpoint_the_job_begins_at_step_0(ranks, tmp_path):
    """Neither an empty folder nor a save that never ended is one."""
    (tmp_path / "step-00000007.partial").mkdir()
    assert ranks.run(load_nothing, 2, folder=str(tmp_path)) == [(0, True)] * 2


def die_while_saving(rank, size, folder, moment):
    """Save at step 2; be killed while saving at step 4."""
    job = trained(0, 2)
    save(job, folder, 2)
    job.train(2, 4)

    def die(*args):
        os.kill(os.getpid(), signal.SIGKILL)

    if moment == "writing" and rank == 1:
        dcp.FileSystemWriter.write_data = die
    if moment == "renaming" and rank == 0:
        checkpoints._publish = die
    save(job, folder, 4)


def go_on(rank, size, folder):
    job = Job()
    found = load(job, folder)
    is_same = state(job) == state(trained(0, found))
    job.train(found, 4)
    save(job, folder, 4)
    return found, is_same, load(Job(), folder)


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
        save(job, folder, step, keep=2)
    return load(Job(), folder)


def test_the_newest_are_kept(ranks, tmp_path):
    """One saved twice is the newer of the two, and one."""
    assert ranks.run(save_often, 1, folder=str(tmp_path)) == [3]
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


def save_where_no_folder_can_be(rank, size, folder):
    job = Job()
    return outcome(lambda: save(job, folder, 1)), outcome(lambda: job.train(0, 1)).error


def test_what_rank_0_cannot_do_is_raised_on_every_rank(ranks, tmp_path):
    """And nobody waits: the job could even go on."""
    (tmp_path / "file").touch()
    folder = str(tmp_path / "file" / "checkpoints")
    for saved, trained in ranks.run(save_where_no_folder_can_be, 2, folder=folder):
        assert saved.error == "RuntimeError" and "rank 0" in saved.message, saved
        assert folder in saved.message and trained is None
