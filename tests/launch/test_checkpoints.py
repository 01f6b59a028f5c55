"""Whatever becomes of a job while it saves, the next one finds a checkpoint that is whole."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch.distributed as dist
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


def save_apart(rank, size, folder):
    job = trained(0, 1)
    found = outcome(lambda: save(job, folder, 1 + rank))
    return found.error, found.message, load(Job(), folder)


def test_ranks_that_write_to_different_places_have_saved_nothing(ranks, tmp_path):
    """As with another step, or with a disk of its own on each node."""
    for error, message, loaded in ranks.run(save_apart, 2, folder=str(tmp_path)):
        assert error == "CheckpointError"
        assert "step-00000001.partial lacks __1_0.distcp" in message
        assert loaded == 0


def load_broken(rank, size, folder, name):
    job = trained(0, 1)
    save(job, folder, 1)
    if rank == 0:
        (Path(folder) / "step-00000001" / name).write_bytes(b"")
    dist.barrier()
    found = outcome(lambda: load(Job(), folder))
    return found.error, found.message


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_a_broken_checkpoint_is_told_in_a_sentence(ranks, tmp_path, name):
    for error, message in ranks.run(load_broken, 2, folder=str(tmp_path), name=name):
        assert error == "CheckpointError"
        assert "step-00000001 could not be loaded (rank 0: " in message
        assert "move it away" in message and "Traceback" not in message


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
    for step in (1, 2, 2):
        save(job, folder, step, keep=2)
        job.train(0, 1)
    job = trained(0, 3)
    save(job, folder, 2, keep=2)
    fresh = Job()
    return load(fresh, folder), state(fresh) == state(job)


def test_the_newest_are_kept(ranks, tmp_path):
    """One saved again is newer than the one before, and does not take its place at once."""
    assert ranks.run(save_often, 1, folder=str(tmp_path)) == [(2, True)]
    assert names(tmp_path) == ["step-00000002.1", "step-00000002.2"]


class Killed(BaseException):
    """No handler of an error may notice it, as none would notice a kill."""


def killed_before(number, publish):
    """Publish, as if killed before it renames or deletes for that time."""
    left = iter(range(number))

    def counted(act):
        def acting(*args):
            if next(left, None) is None:
                raise Killed
            return act(*args)

        return acting

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", counted(Path.rename))
        patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
        publish()


def save_again_and_be_killed(rank, size, folder, number):
    job = trained(0, 2)
    save(job, folder, 2, keep=1)
    states = [state(job)]
    job.train(2, 3)
    states.append(state(job))
    publish = checkpoints._publish
    checkpoints._publish = lambda *args: killed_before(number, lambda: publish(*args))
    was_killed = False
    try:
        save(job, folder, 2, keep=1)
    except Killed:
        was_killed = True
    checkpoints._publish = publish
    fresh = Job()
    step, found = load(fresh, folder), states.index(state(fresh))
    save(job, folder, 3, keep=1)
    return was_killed, step, found


@pytest.mark.parametrize(
    ("number", "was_killed", "found"),
    [(0, True, 0), (1, True, 1), (2, True, 1), (3, False, 1)],
    ids=["not yet renamed", "both there", "not yet deleted", "not at all"],
)
def test_a_step_that_is_saved_again_is_there_wherever_the_job_is_killed(
    ranks, tmp_path, number, was_killed, found
):
    """Renaming the new one, then the old one, then deleting the old one."""
    told = ranks.run(save_again_and_be_killed, 1, folder=str(tmp_path), number=number)
    assert told == [(was_killed, 2, found)]
    assert names(tmp_path) == ["step-00000003"]


def save_wrongly(rank, size, folder, step, keep):
    job = trained(0, 2)
    return outcome(lambda: save(job, folder, step, keep=keep))


@pytest.mark.parametrize(
    ("step", "keep", "sentence"),
    [
        (3, 2, "step 3 is to be saved, but {folder}/step-00000004 is of a later one, with which"),
        (5, 0, "keep is 0, but must be at least 1."),
        (-1, 2, "step is -1, but must be at least 0."),
    ],
    ids=["a lower step", "keep", "a step before the first"],
)
def test_what_would_be_saved_in_vain_is_an_error_on_every_rank(
    ranks, tmp_path, step, keep, sentence
):
    """It must delete neither what is there nor, having said nothing, itself."""
    ranks.run(save_and_load, 2, folder=str(tmp_path))
    sentence = sentence.format(folder=tmp_path)
    for told in ranks.run(save_wrongly, 2, folder=str(tmp_path), step=step, keep=keep):
        assert told.error == "CheckpointError", told
        assert told.message.startswith(f"rank 0: {sentence}")
    assert names(tmp_path) == ["step-00000004"]


def load_past_strays(rank, size, folder):
    fresh = Job()
    if rank == 0:
        with pytest.warns(UserWarning, match="no checkpoint: it has no file .metadata") as warned:
            step = load(fresh, folder)
    else:
        warned, step = [], load(fresh, folder)
    is_same = state(fresh) == state(trained(0, 4))
    return step, is_same, [str(warning.message).split()[0] for warning in warned]


def test_what_has_the_name_of_a_checkpoint_but_is_none_is_passed_over_and_named(ranks, tmp_path):
    ranks.run(save_and_load, 2, folder=str(tmp_path))
    (tmp_path / "step-00000003").mkdir()  # older than the newest, so of no interest
    (tmp_path / "step-00000900").mkdir()
    (tmp_path / "step-00000901").touch()
    named = [f"{tmp_path}/step-00000901", f"{tmp_path}/step-00000900"]
    told = ranks.run(load_past_strays, 2, folder=str(tmp_path))
    assert told == [(4, True, named), (4, True, [])]


def load_what_rank_0_cannot_read(rank, size, folder, kind):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    if kind == "closed" and rank == 0:
        os.listdir = refuse  # for root, a folder's mode refuses nothing
    job = Job()
    return outcome(lambda: load(job, folder)), outcome(lambda: job.train(0, 1)).error


@pytest.mark.parametrize("kind", ["closed", "a file"])
def test_a_folder_that_cannot_be_read_is_not_one_without_checkpoints(ranks, tmp_path, kind):
    """The job would begin anew, and say nothing."""
    folder = tmp_path / "checkpoints"
    folder.touch() if kind == "a file" else folder.mkdir()
    told = ranks.run(load_what_rank_0_cannot_read, 2, folder=str(folder), kind=kind)
    for loaded, trained_on in told:
        assert loaded.error == "CheckpointError" and loaded.message.startswith("rank 0: "), loaded
        assert str(folder) in loaded.message and trained_on is None


def save_where_no_folder_can_be(rank, size, folder):
    job = Job()
    return outcome(lambda: save(job, folder, 1)), outcome(lambda: job.train(0, 1)).error


def test_what_rank_0_cannot_do_is_raised_on_every_rank(ranks, tmp_path):
    """And nobody waits: the job could even go on."""
    (tmp_path / "file").touch()
    folder = str(tmp_path / "file" / "checkpoints")
    for saved, trained in ranks.run(save_where_no_folder_can_be, 2, folder=folder):
        assert saved.error == "CheckpointError" and "rank 0" in saved.message, saved
        assert folder in saved.message and trained is None
