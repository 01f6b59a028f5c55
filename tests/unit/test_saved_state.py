"""The layout of a saved state, apart from any scaler."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

import pytest
import torch

from shardscale import ConfigError, ConstantScale, DynamicScale, StateError
from shardscale.records import ScaleState
from shardscale.saved_state import from_state_dict, to_state_dict

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
        "shardscale": (
            ("version", 2),
            ("policy", "DynamicScale"),
            (
                "policy_fields",
                (
                    ("growth_factor", 3.0),
                    ("backoff_factor", 0.25),
                    ("growth_interval", 17),
                    ("hysteresis", 4),
                    ("min_scale", 2.0),
                    ("max_scale", 1e6),
                ),
            ),
            ("hysteresis_tracker", 2),
            ("num_updates", 41),
            ("num_skipped", 7),
        ),
    }


def test_the_first_layout_is_read_still():
    """It had dictionaries where there are pairs now."""
    saved = to_state_dict(POLICY, state_of(), 41, 7)
    ours = dict(saved["shardscale"])
    first = {**ours, "version": 1, "policy_fields": dict(ours["policy_fields"])}
    assert repr(from_state_dict({**saved, "shardscale": first}, DynamicScale())) == repr(
        from_state_dict(saved, DynamicScale())
    )


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
    with pytest.raises(ConfigError, match="must be a finite and positive number"):
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
    assert dict(saved["shardscale"])["policy_fields"] == (("patience", 9),)
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


# ------------------------------------------------------------------------------------ Megatron-Core


def megatrons(**changes):
    """What its DynamicGradScaler saves."""
    state = {"scale": torch.tensor([512.0]), "growth_tracker": 3, "hysteresis_tracker": 2}
    return {**state, **changes}


def by_megatrons_rule(scale, good, tolerated, bad, policy):
    """The next (scale, good steps, bad steps tolerated); growth alone refills the last."""
    if bad:
        tolerated -= 1
        backs_off = tolerated <= 0
        return (
            max(scale * policy.backoff_factor, policy.min_scale) if backs_off else scale,
            0,
            tolerated,
        )
    if good + 1 == policy.growth_interval:
        return scale * policy.growth_factor, 0, policy.hysteresis
    return scale, good + 1, tolerated


@pytest.mark.parametrize("tolerated", [3, 2, 1, 0, -5])
@pytest.mark.parametrize("good", [0, 3])
def test_megatrons_state_goes_on_as_megatron_would(good, tolerated):
    """It counts on below 0, where it tolerates no more than at 0."""
    policy = DynamicScale(2.0, 0.5, 5, hysteresis=3, min_scale=4.0)
    saved = megatrons(growth_tracker=good, hysteresis_tracker=tolerated)
    state = from_state_dict(saved, policy).state
    theirs = (512.0, good, tolerated)
    draw = random.Random(10 * good + tolerated)
    for _ in range(60):
        bad = draw.random() < 0.3
        theirs = by_megatrons_rule(*theirs, bad, policy)
        state = policy.next_state(state, torch.tensor(float(bad)))
        scale, good, tolerated = (t.item() for t in state)
        assert (scale, good, tolerated) == (*theirs[:2], max(theirs[2], 0))


def test_megatrons_state_leaves_the_policy_and_begins_to_count():
    loaded = from_state_dict(megatrons(), POLICY)
    assert loaded.policy == POLICY
    assert (loaded.num_updates, loaded.num_skipped) == (0, 0)


def test_megatrons_state_gives_a_constant_scale_its_value():
    assert from_state_dict(megatrons(), ConstantScale()).state.scale.item() == 512.0


def test_more_hysteresis_than_the_policys_is_warned_of():
    """Ours begins with 1 by default, Megatron's with 2."""
    with pytest.warns(UserWarning, match="2 more bad steps, but .* hysteresis=1, so 1 is taken"):
        loaded = from_state_dict(megatrons(), DynamicScale())
    assert loaded.state.hysteresis_tracker.item() == 1


@pytest.mark.parametrize(
    "saved", [{"nonsense": 1}, {"scale": 8.0}, {"optimizer": {}, "grad_scaler": megatrons()}]
)
def test_an_unknown_layout_is_refused_with_those_that_are_known(saved):
    keys = re.escape(f"keys {sorted(saved)}")
    with pytest.raises(StateError, match=f"{keys}.*'_growth_tracker'.*'hysteresis_tracker'"):
        from_state_dict(saved, POLICY)
