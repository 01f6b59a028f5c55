"""A state that was saved and loaded holds every field, so that a resumed run decides as before."""

from __future__ import annotations

import pytest
import torch

from shardscale import DynamicScale
from shardscale.records import ScaleState
from shardscale.saved_state import from_state_dict, to_state_dict


@pytest.fixture
def loaded():
    policy = DynamicScale(3.0, 0.25, 7, hysteresis=5, min_scale=0.5, max_scale=2.0**20)
    tracker, hysteresis = (torch.tensor(n, dtype=torch.int32) for n in (4, 2))
    state = ScaleState(torch.tensor(48.0), tracker, hysteresis)
    saved = to_state_dict(policy, state, num_updates=11, num_skipped=6)
    return from_state_dict(saved, DynamicScale())


def test_the_scale_comes_back(loaded):
    assert loaded.state.scale.item() == 48.0


def test_the_good_steps_since_the_last_change_come_back(loaded):
    assert loaded.state.growth_tracker.item() == 4


def test_the_bad_steps_still_tolerated_come_back(loaded):
    assert loaded.state.hysteresis_tracker.item() == 2


def test_the_policys_numbers_come_back(loaded):
    assert loaded.policy == DynamicScale(
        3.0, 0.25, 7, hysteresis=5, min_scale=0.5, max_scale=2.0**20
    )


def test_the_counts_come_back(loaded):
    assert (loaded.num_updates, loaded.num_skipped) == (11, 6)
