"""Whose state is taken over, and when none is."""

from __future__ import annotations

import pytest
import torch

from shardscale import MissingRankError, ShardedGradScaler, StateError
from shardscale.checkpoint import reconcile
from shardscale.comm import Solo
from shardscale.testing import run_ranks


def loaded(comm, **changes):
    scaler = ShardedGradScaler("cpu", comm=comm)
    scaler.load_state_dict({**torch.amp.GradScaler("cpu").state_dict(), **changes})
    return scaler


@pytest.mark.filterwarnings("ignore:rank . of 3")
@pytest.mark.parametrize(
    ("scales", "trackers", "taken"),
    [
        ([8.0, 4.0, 16.0], [1, 2, 3], (4.0, 2)),
        ([8.0, 4.0, 4.0], [1, 3, 2], (4.0, 3)),
        ([8.0, 8.0, 8.0], [5, 4, 6], (8.0, 5)),
    ],
)
def test_the_smallest_scale_is_taken_and_of_equals_the_lowest_ranks(scales, trackers, taken):
    """With the tracker that goes with it, not one of another rank."""

    def job(comm):
        here = {"scale": scales[comm.rank], "_growth_tracker": trackers[comm.rank]}
        scaler = loaded(comm, **here)
        return reconcile(scaler), scaler.get_scale(), scaler._get_growth_tracker()

    assert run_ranks(job, size=3) == [(True, *taken)] * 3


def test_what_a_rank_tells_about_something_else_is_no_state():
    """One that gathers because it has met a disagreement is not there."""

    def job(comm):
        if comm.rank == 1:
            return comm.all_gather_object({"error": None, "scale": 1.0})
        scaler = loaded(comm, scale=8.0)
        with pytest.raises(MissingRankError, match="waiting for rank 1,"):
            reconcile(scaler)
        return scaler.get_scale()

    here, _ = run_ranks(job, size=2)
    assert here == 8.0


def test_ranks_that_bring_different_ones_of_two_scalers_are_told():
    """Or the states of both would be mixed, and the next verdicts agree."""

    def job(comm):
        scalers = [loaded(comm, scale=8.0), loaded(comm, scale=4.0)]
        with pytest.raises(
            StateError, match=r"scaler \(in order of making\): 0 on ranks 0, 2, 1 on"
        ):
            reconcile(scalers[comm.rank % 2])
        return [scaler.get_scale() for scaler in scalers]

    assert run_ranks(job, size=3) == [[8.0, 4.0]] * 3


@pytest.mark.parametrize(
    "options", [{}, {"comm": Solo()}, {"enabled": False}, {"enabled": False, "comm": Solo()}]
)
def test_alone_or_disabled_there_is_nothing_to_reconcile(options):
    assert reconcile(ShardedGradScaler("cpu", **options)) is False
