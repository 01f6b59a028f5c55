"""Statements 37 and 39: a job that was saved and loaded goes on as if nothing had been."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful

from shardscale import ConstantScale, DynamicScale, ShardedGradScaler
from tests.ranks.rank import outcome
from tests.ranks.resumable import Job

NUM_STEPS = 12
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def parts_of(job):
    model, optimizer = get_state_dict(job.model, job.optimizer)
    return {"model": model, "optimizer": optimizer, "scaler": job.scaler}


def take(job, parts, options=None):
    model, optimizer = parts["model"], parts["optimizer"]
    set_state_dict(
        job.model,
        job.optimizer,
        model_state_dict=model,
        optim_state_dict=optimizer,
        options=options,
    )


def unbroken(rank, size, fused=False):
    return Job(fused).train(0, NUM_STEPS)


def save_with_dcp(job, folder, step):
    dcp.save(parts_of(job), checkpoint_id=f"{folder}/{step}")


def save_with_torch(job, folder, step):
    model, optimizer = get_state_dict(job.model, job.optimizer, options=WHOLE)
    parts = {"model": model, "optimizer": optimizer, "scaler": job.scaler.state_dict()}
    if dist.get_rank() == 0:
        torch.save(parts, f"{folder}/{step}")


def load_with_dcp(job, folder, step):
    parts = parts_of(job)
    dcp.load(parts, checkpoint_id=f"{folder}/{step}")
    take(job, parts)


def load_with_torch(job, folder, step):
    parts = torch.load(f"{folder}/{step}", weights_only=True)
    take(job, parts, options=WHOLE)
    job.scaler.load_state_dict(parts["scaler"])


def begin(rank, size, folder, fused, save):
    job = Job(fused)
    history = []
    for border in (6, 8):
        history += job.train(len(history), border)
        save(job, folder, border)
    return history


def begin_and_save_meanwhile(rank, size, folder, fused):
    """The job goes on at once; what is saved in a group of its own is the job as it was."""
    job = Job(fused)
    saver = dist.new_group(backend="gloo")
    history = job.train(0, 6)
    saving = dcp.async_save(parts_of(job), checkpoint_id=f"{folder}/6", process_group=saver)
    history += job.train(6, NUM_STEPS)
    saving.result()
    return history


def go_on(rank, size, folder, fused, border, load):
    job = Job(fused)
    load(job, folder, border)
    return job.train(border, NUM_STEPS)


@pytest.fixture(scope="module")
def reference(ranks):
    return {fused: ranks.run(unbroken, 2, fused=fused) for fused in (False, True)}


def assert_continues(reference, first, second, border):
    for whole, before, after in zip(reference, first, second, strict=True):
        assert before == whole[: len(before)]
        for step, (mine, theirs) in enumerate(zip(after, whole[border:], strict=True), border):
            assert mine == theirs, f"step {step}"


def test_the_border_lies_where_forgetting_shows(reference):
    """Contract 37: what the tests below compare are skips, growth and tolerance at the border."""
    states = [state for state, _ in reference[False][0]]
    scales = " ".join(f"{state['scale']:g}" for state in states)
    skips = " ".join(str(dict(state["shardscale"])["num_skipped"]) for state in states)
    assert scales == "64 128 128 128 256 256 128 128 256 256 256 256"
    assert skips == "0 0 1 1 1 2 3 3 3 3 4 4"


@pytest.mark.parametrize("fused", [False, True])
def test_a_job_saved_with_dcp_goes_on_bit_for_bit(ranks, tmp_path, reference, fused):
    """Contract 37 and 39: just after a skip and before the next, and half-way to growth."""
    folder = str(tmp_path)
    first = ranks.run(begin, 2, folder=folder, fused=fused, save=save_with_dcp)
    for border in (6, 8):
        how = {"fused": fused, "border": border, "load": load_with_dcp}
        assert_continues(reference[fused], first, ranks.run(go_on, 2, folder=folder, **how), border)


def test_a_job_saved_with_torch_save_goes_on_bit_for_bit(ranks, tmp_path, reference):
    """Contract 37: read back with weights_only."""
    folder = str(tmp_path)
    first = ranks.run(begin, 2, folder=folder, fused=False, save=save_with_torch)
    how = {"fused": False, "border": 6, "load": load_with_torch}
    assert_continues(reference[False], first, ranks.run(go_on, 2, folder=folder, **how), 6)


def test_what_is_saved_while_the_job_goes_on_is_the_job_as_it_was(ranks, tmp_path, reference):
    """Contract 39: async_save."""
    folder = str(tmp_path)
    first = ranks.run(begin_and_save_meanwhile, 2, folder=folder, fused=True)
    how = {"fused": True, "border": 6, "load": load_with_dcp}
    assert_continues(reference[True], first, ranks.run(go_on, 2, folder=folder, **how), 6)


# ------------------------------------------------------------------------------- other world sizes


def save_in_one_world(rank, size, folder):
    job = Job(fused=True)
    job.train(0, 6)
    save_with_dcp(job, folder, size)
    return job.scaler.state_dict(), job.whole()


def load_in_another(rank, size, folder, of):
    job = Job(fused=True)
    load_with_dcp(job, folder, of)
    before = job.scaler.state_dict(), job.whole()
    return before, [state for state, _ in job.train(6, NUM_STEPS)]


@pytest.mark.parametrize(("of", "into"), [(2, 3), (3, 2), (2, 1)])
def test_another_number_of_ranks_goes_on_from_the_same_state(ranks, tmp_path, reference, of, into):
    """Contract 39: every rank; whose gradients are added in another order from there on."""
    folder = str(tmp_path)
    saved = ranks.run(save_in_one_world, of, folder=folder)
    loaded = ranks.run(load_in_another, into, folder=folder, of=of)
    expected = [state for state, _ in reference[True][0][6:]]
    for before, after in loaded:
        assert before == saved[0]
        assert after == expected


# --------------------------------------------------------------------------- states that do not fit


def save_scalers(rank, size, folder):
    """Each with a scale that no fresh one has; and a state as a later version may have it."""
    scalers = {
        "ours": ShardedGradScaler("cpu", 96.0, policy=DynamicScale(3.0, 0.3, 9, hysteresis=4)),
        "constant": ShardedGradScaler("cpu", 96.0, policy=ConstantScale()),
        "torchs": torch.amp.GradScaler("cpu", 96.0, growth_factor=3.0),
    }
    later = scalers["ours"].state_dict()
    later["shardscale"] = (*dict(later["shardscale"], version=99).items(), ("more", 1))
    for name, scaler in {**scalers, "later": later}.items():
        dcp.save({"scaler": scaler}, checkpoint_id=f"{folder}/{name}")


def load_scaler(rank, size, folder, name, policy=None, partly=False):
    """What came of it, and the state then."""
    scaler = ShardedGradScaler("cpu", policy=policy)
    planner = dcp.DefaultLoadPlanner(allow_partial_load=partly)

    def load():
        try:
            dcp.load({"scaler": scaler}, checkpoint_id=f"{folder}/{name}", planner=planner)
        except dcp.CheckpointException as error:  # which is no Exception
            raise RuntimeError(str(error)) from error

    return outcome(load)[1:], scaler.state_dict()


def load_each(rank, size, folder):
    theirs = torch.amp.GradScaler("cpu")
    dcp.load({"scaler": theirs}, checkpoint_id=f"{folder}/torchs")
    handed_on = ShardedGradScaler("cpu")
    handed_on.load_state_dict(theirs.state_dict())
    return {
        "other numbers": load_scaler(rank, size, folder, "ours"),
        "constant into dynamic": load_scaler(rank, size, folder, "constant"),
        "dynamic into constant": load_scaler(rank, size, folder, "ours", ConstantScale()),
        "later": load_scaler(rank, size, folder, "later"),
        "torch's": load_scaler(rank, size, folder, "torchs"),
        "torch's, partly": load_scaler(rank, size, folder, "torchs", partly=True),
        "torch's, handed on": handed_on.state_dict(),
    }


def test_a_state_that_does_not_fit_is_refused_on_every_rank_in_our_words(ranks, tmp_path):
    """Contract 39: a template of other fields does not stop torch before we can say why."""
    ranks.run(save_scalers, 2, folder=str(tmp_path))
    fresh = ShardedGradScaler("cpu").state_dict()
    for rank, found in enumerate(ranks.run(load_each, 2, folder=str(tmp_path))):
        (error, _, _), state = found["other numbers"]
        assert error is None and (state["scale"], state["growth_factor"]) == (96.0, 3.0)
        assert dict(dict(state["shardscale"])["policy_fields"])["hysteresis"] == 4
        for name, text in {
            "constant into dynamic": "policy ConstantScale, but this scaler has DynamicScale",
            "dynamic into constant": "policy DynamicScale, but this scaler has ConstantScale",
            "later": "layout version 99",
        }.items():
            (error, _, message), state = found[name]
            assert (error, text in message) == ("StateError", True), message
            assert f" This is rank {rank} of 2." in message
            assert state["scale"] == fresh["scale"]
        # torch's has nothing of ours, which only torch can say; two ways lead on.
        (error, _, message), _ = found["torch's"]
        assert (
            error == "RuntimeError" and "Missing key" in message and "scaler.shardscale" in message
        )
        (error, _, _), state = found["torch's, partly"]
        assert error is None and state == found["torch's, handed on"]
        assert (state["scale"], state["growth_factor"]) == (96.0, 3.0)


def test_a_scaler_is_stateful():
    """Contract 39: torch.distributed.checkpoint asks for no more than this."""
    assert isinstance(ShardedGradScaler("cpu"), Stateful)
