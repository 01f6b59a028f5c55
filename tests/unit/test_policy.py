"""Policies: torch's rule to the bit, hysteresis and range by hand, nothing read from a device."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardscale import ConfigError, ConstantScale, DynamicScale
from shardscale.policy import LARGEST_SCALE, SMALLEST_SCALE


def run(policy, init_scale, flags):
    state = policy.init(init_scale, "cpu")
    seen = []
    for found_inf in flags:
        state = policy.next_state(state, torch.tensor(float(found_inf)))
        seen.append(tuple(t.item() for t in state))
    return seen


@settings(deadline=None, max_examples=150)
@given(
    scale=st.floats(SMALLEST_SCALE, LARGEST_SCALE, width=32),
    tracker=st.integers(0, 5),
    growth=st.floats(1, 16, exclude_min=True),
    backoff=st.floats(0, 1, exclude_min=True, exclude_max=True),
    interval=st.integers(1, 5),
    flags=st.lists(st.booleans(), min_size=1, max_size=12),
)
def test_every_scale_and_factor_moves_as_by_torchs_operator(
    scale, tracker, growth, backoff, interval, flags
):
    """Until torch's scale falls below the smallest normal number, where we stop."""
    tracker = min(tracker, interval - 1)
    policy = DynamicScale(growth, backoff, interval)
    ours = policy.init(scale, "cpu")
    ours = ours._replace(growth_tracker=torch.tensor(tracker, dtype=torch.int32))
    their_scale, their_tracker = ours.scale.clone(), ours.growth_tracker.clone()
    for found_inf in flags:
        flag = torch.tensor(float(found_inf))
        ours = policy.next_state(ours, flag)
        torch._amp_update_scale_(their_scale, their_tracker, flag, growth, backoff, interval)
        if their_scale < SMALLEST_SCALE:
            assert ours.scale.item() == SMALLEST_SCALE
            return
        assert ours.scale.item() == their_scale.item()
        assert ours.growth_tracker.item() == their_tracker.item()
        assert [t.dtype for t in ours] == [torch.float32, torch.int32, torch.int32]
        assert [t.shape for t in ours] == [()] * 3


def test_hysteresis_tolerates_bad_steps_until_growth_refills_it():
    """By hand: (scale, growth_tracker, hysteresis_tracker)."""
    policy = DynamicScale(growth_interval=2, hysteresis=3)
    assert run(policy, 8.0, [1, 0, 1, 1, 1, 0, 0, 1]) == [
        (8.0, 0, 2),
        (8.0, 1, 2),
        (8.0, 0, 1),
        (4.0, 0, 0),
        (4.0 / 2, 0, 0),
        (2.0, 1, 0),
        (4.0, 0, 3),
        (4.0, 0, 2),
    ]


def test_a_long_run_of_bad_steps_does_not_count_below_zero():
    assert run(DynamicScale(hysteresis=2), 8.0, [1] * 50)[-1] == (8.0 * 2**-49, 0, 0)


def test_growth_stops_at_the_largest_scale_and_backoff_at_the_smallest():
    policy = DynamicScale(growth_interval=1, min_scale=3.0, max_scale=20.0)
    assert [s for s, _, _ in run(policy, 8.0, [0, 0, 0, 1, 1, 1])] == [
        16.0,
        20.0,
        20.0,
        10.0,
        5.0,
        3.0,
    ]


def test_growth_that_overflows_is_dropped_and_the_tracker_begins_anew():
    seen = run(DynamicScale(growth_interval=2), LARGEST_SCALE, [0, 0, 0, 1])
    assert [s for s, _, _ in seen] == [LARGEST_SCALE] * 3 + [LARGEST_SCALE / 2]
    assert [t for _, t, _ in seen] == [1, 0, 1, 0]


def test_an_interval_below_the_tracker_grows_at_the_next_good_step():
    state = DynamicScale().init(8.0, "cpu")
    state = state._replace(growth_tracker=torch.tensor(100, dtype=torch.int32))
    after = DynamicScale(growth_interval=5).next_state(state, torch.tensor(0.0))
    assert (after.scale.item(), after.growth_tracker.item()) == (16.0, 0)


@pytest.mark.parametrize("policy", [DynamicScale(growth_interval=1), ConstantScale()], ids=repr)
@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_the_state_given_is_left_alone(policy, found_inf):
    state = policy.init(8.0, "cpu")
    policy.next_state(state, torch.tensor(found_inf))
    assert [t.item() for t in state][:2] == [8.0, 0]


@pytest.mark.parametrize("policy", [DynamicScale(1.1, 0.3, 1), DynamicScale()], ids=repr)
def test_the_next_state_reads_no_state_and_works_where_nothing_can_be_read(policy):
    """The meta device has no values: a branch on one would raise."""
    state = policy.init(8.0, "meta")
    after = policy.next_state(state, torch.zeros((), device="meta"))
    assert {t.device.type for t in after} == {"meta"}


def test_constant_never_moves():
    assert run(ConstantScale(), 7.3, [0, 1, 1, 0])[-1][0] == torch.tensor(7.3).item()


@pytest.mark.parametrize(
    "numbers",
    [
        {"hysteresis": 0},
        {"hysteresis": 1.5},
        {"growth_interval": True},
        {"growth_interval": 2.0},
        {"growth_interval": 2**31},
        {"min_scale": 2.0**-127},
        {"min_scale": 8.0, "max_scale": 4.0},
        {"max_scale": math.inf},
        {"min_scale": math.nan},
    ],
    ids=str,
)
def test_numbers_out_of_range_are_refused(numbers):
    with pytest.raises(ConfigError, match="must be"):
        DynamicScale(**numbers)


@pytest.mark.parametrize("bound", [0.3, 0.7, 1000.1])
def test_a_bound_that_float32_does_not_hold_is_reached_and_can_be_begun_with(bound):
    for policy in (DynamicScale(min_scale=bound), DynamicScale(max_scale=bound)):
        state = policy.init(bound, "cpu")
        assert policy.init(state.scale.item(), "cpu").scale.item() == state.scale.item()
    assert run(DynamicScale(min_scale=bound), bound, [1])[0][0] == torch.tensor(bound).item()


def test_policies_are_values():
    """Equal numbers, equal reprs: the repr is what ranks compare."""
    assert DynamicScale(growth_interval=7) == DynamicScale(growth_interval=7)
    assert repr(DynamicScale(growth_interval=7)) != repr(DynamicScale())
    for field in dataclasses.fields(DynamicScale):
        assert f"{field.name}=" in repr(DynamicScale())
    with pytest.raises(dataclasses.FrozenInstanceError):
        DynamicScale().growth_factor = 3.0
