"""The layout of a saved state, apart from any scaler."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch

from shardscale import ConfigError, ConstantScale, DynamicScale, StateError
from shardscale.checkpoint import from_state_dict, to_state_dict
from shardscale.records import ScaleState

POLICY = DynamicScale(3.0, 0.25, 17, hysteresis=4, min_scale=2.0, max_scale=1e6)


def state_of(scale=512.0, tracker=5, hysteresis=2):
    return ScaleState(
        torch.tensor(scale),
        torch.tensor(tracker, dtype=torch.int32),
        torch.tensor(hysteresis, dtype=torch.int32),
    )


def test_the_layout_is_written_down_here():
    """Whoever changes it changes the version, and keeps reading this one."""
    assert to_state_dict(POLICY, state_of(), 41, 7) == {
        "scale": 512.0,
        "growth_factor": 3.0,
        "backoff_factor": 0.25,
        "growth_interval": 17,
        "_growth_tracker": 5,
        "shardscale": {
            "version": 1,
            "policy": "DynamicScale",
            "policy_fields": {
                "growth_factor": 3.0,
                "backoff_factor": 0.25,
                "growth_interval": 17,
                "hysteresis": 4,
                "min_scale": 2.0,
                "max_scale": 1e6,
            },
            "hysteresis_tracker": 2,
            "num_updates": 41,
            "num_skipped": 7,
        },
    }


def test_everything_comes_back():
    loaded = from_state_dict(to_state_dict(POLICY, state_of(), 41, 7), DynamicScale())
    assert loaded.policy == POLICY
    assert [t.item() for t in loaded.state] == [512.0, 5, 2]
    assert [t.dtype for t in loaded.state] == [torch.float32, torch.int32, torch.int32]
    assert (loaded.num_updates, loaded.num_skipped) == (41, 7)


def torchs(**changes):
    return {**torch.amp.GradScaler("cpu", init_scale=8.0).state_dict(), **changes}


def test_torchs_state_keeps_what_torch_has_not():
    """Hysteresis and range of the scaler that loads; a fresh tolerance."""
    loaded = from_state_dict(torchs(_growth_tracker=3), POLICY)
    assert loaded.policy == DynamicScale(hysteresis=4, min_scale=2.0, max_scale=1e6)
    assert [t.item() for t in loaded.state] == [8.0, 3, 4]
    assert (loaded.num_updates, loaded.num_skipped) == (0, 0)


def test_torchs_state_gives_a_constant_scale_its_value():
    loaded = from_state_dict(torchs(), ConstantScale())
    assert loaded.policy == ConstantScale()
    assert loaded.state.scale.item() == 8.0


@pytest.mark.parametrize(("saved", "taken"), [(1.0, 2.0), (2e6, 1e6)])
def test_a_scale_out_of_range_is_clamped_with_a_warning(saved, taken):
    with pytest.warns(UserWarning, match=re.escape(f"{taken:g} is taken instead")):
        loaded = from_state_dict(torchs(scale=saved), POLICY)
    assert loaded.state.scale.item() == taken


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_that_is_none_is_refused(scale):
    with pytest.raises(ConfigError, match="must be finite and positive"):
        from_state_dict(torchs(scale=scale), POLICY)


def test_a_state_is_not_changed_by_reading_it():
    saved = to_state_dict(POLICY, state_of(), 1, 1)
    before = repr(saved)
    from_state_dict(saved, DynamicScale())
    assert repr(saved) == before


@dataclass(frozen=True)
class Mine:
    """A policy of somebody's own."""

    patience: int = 3

    def init(self, init_scale, device):
        return ConstantScale().init(init_scale, device)

    def next_state(self, state, found_inf):
        return state


def test_a_policy_of_ones_own_round_trips_by_its_fields():
    saved = to_state_dict(Mine(patience=9), Mine().init(8.0, "cpu"), 0, 0)
    assert saved["shardscale"]["policy_fields"] == {"patience": 9}
    assert from_state_dict(saved, Mine()).policy == Mine(patience=9)
    with pytest.raises(StateError, match="saved with policy Mine"):
        from_state_dict(saved, DynamicScale())


def test_without_our_key_the_scale_alone_is_taken_over():
    """The way out that the error names."""
    saved = to_state_dict(ConstantScale(), state_of(), 0, 0)
    with pytest.raises(StateError, match="drop the key 'shardscale'"):
        from_state_dict(saved, Mine())
    del saved["shardscale"]
    assert from_state_dict(saved, Mine()).state.scale.item() == 512.0
