"""Statements 28 to 35: how the scale moves, and which scale a gradient is divided by."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardscale import ConfigError, ConstantScale, DynamicScale, ShardedGradScaler
from tests.conformance.side_by_side import (
    BOTH,
    assert_fails_alike,
    assert_same_scale,
    full,
    grad_of,
    params_of,
    run_verdicts,
    sgd,
)


def skip(scaler, times=1):
    run_verdicts(scaler, [False] * times)


@settings(deadline=None, max_examples=40)
@given(
    verdicts=st.lists(st.booleans(), min_size=1, max_size=25),
    growth=st.sampled_from([2.0, 1.1, 1.5, 4.0, 1 + 2**-23]),
    backoff=st.sampled_from([0.5, 0.9, 0.3, 0.125]),
    interval=st.integers(1, 4),
    init_scale=st.sampled_from([65536.0, 1.0, 3.7, 1e30]),
)
def test_any_run_of_verdicts_moves_scale_and_tracker_as_torchs(
    verdicts, growth, backoff, interval, init_scale
):
    """Contract 28: bit for bit, factors that no float32 holds among them."""
    numbers = {
        "init_scale": init_scale,
        "growth_factor": growth,
        "backoff_factor": backoff,
        "growth_interval": interval,
    }
    theirs = torch.amp.GradScaler("cpu", **numbers)
    ours = ShardedGradScaler("cpu", **numbers)
    assert run_verdicts(theirs, verdicts) == run_verdicts(ours, verdicts)
    assert_same_scale(theirs, ours)


@BOTH
def test_the_rule_by_hand(make):
    """Contract 28: back off once however many were bad, count, grow at the interval."""
    scaler = make("cpu", init_scale=8.0, growth_interval=2)
    assert run_verdicts(scaler, [True, False, True, True, True]) == [
        (8.0, 1),
        (4.0, 0),
        (4.0, 1),
        (8.0, 0),
        (8.0, 1),
    ]


@BOTH
@pytest.mark.parametrize("order", [(1.0, math.inf), (math.inf, 1.0), (math.nan, math.inf)])
def test_one_bad_optimizer_of_several_backs_off_once(make, order):
    """Contract 28: first or last, unscaled only or stepped."""
    scaler = make("cpu", init_scale=8.0, growth_interval=1)
    scaler.scale(torch.ones(()))
    one, other = (sgd(full(value)) for value in order)
    scaler.unscale_(one)
    scaler.step(other)
    scaler.update()
    assert scaler.get_scale() == 4.0
    assert scaler._growth_tracker.item() == 0


@BOTH
def test_a_growth_that_overflows_does_not_happen(make):
    """Contract 29: the tracker begins anew, and the scale can still back off."""
    scaler = make("cpu", init_scale=2.0**127, growth_interval=2)
    assert run_verdicts(scaler, [True, True, True, False]) == [
        (2.0**127, 1),
        (2.0**127, 0),
        (2.0**127, 1),
        (2.0**126, 0),
    ]


@pytest.mark.parametrize("init_scale", [2.0**-125, 2.0**-126, 1.7 * 2.0**-126])
def test_the_scale_never_falls_below_the_smallest_normal_float32(init_scale):
    """Contract 30: torch's sinks to 0, and steps on a finite gradient divided by it."""
    theirs = torch.amp.GradScaler("cpu", init_scale=init_scale)
    skip(theirs, 30)
    assert theirs.get_scale() == 0.0
    ours = ShardedGradScaler("cpu", init_scale=init_scale)
    with pytest.warns(UserWarning, match="at its floor"):
        skip(ours, 30)
    assert ours.get_scale() == 2.0**-126
    optimizer = sgd(full(2.0**-126))
    ours.step(optimizer)
    assert params_of(optimizer)[0].tolist() == [0.0] * 4


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("floor", [2.0**-126, 64.0, 0.3, 0.7])
def test_repeated_skips_at_the_floor_warn_once(floor, fused):
    """Contract 30: the scale is not what is wrong; floors that no float32 holds among them."""
    scaler = ShardedGradScaler("cpu", init_scale=floor, policy=DynamicScale(min_scale=floor))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(8):
            scaler.step(sgd(full(math.inf), fused=fused))
            scaler.update()
    assert len(caught) == 1
    assert f"at its floor, {floor:g}" in str(caught[0].message)


def test_one_skip_that_reaches_the_floor_does_not_warn():
    """Contract 30: a single bad batch there is nobody's fault."""
    scaler = ShardedGradScaler("cpu", init_scale=64.0, policy=DynamicScale(min_scale=64.0))
    assert run_verdicts(scaler, [False, True, False, True]) == [
        (64.0, 0),
        (64.0, 1),
        (64.0, 0),
        (64.0, 1),
    ]


def test_a_policys_range_holds_the_scale():
    """Contract 30: growth stops at max_scale, backing off at min_scale."""
    policy = DynamicScale(growth_interval=1, min_scale=6.0, max_scale=20.0)
    scaler = ShardedGradScaler("cpu", init_scale=8.0, policy=policy)
    assert [s for s, _ in run_verdicts(scaler, [True, True, False, False])] == [
        16.0,
        20.0,
        10.0,
        6.0,
    ]


@BOTH
@pytest.mark.parametrize("new_scale", [4.0, torch.tensor(4.0)], ids=repr)
def test_update_sets_the_scale_and_keeps_the_tracker(make, new_scale):
    """Contract 31: with and without a verdict before; the records are cleared."""
    scaler = make("cpu")
    run_verdicts(scaler, [True, True])
    optimizer = sgd(full(math.inf))
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    scaler.update(new_scale)
    assert (scaler.get_scale(), scaler._growth_tracker.item()) == (4.0, 2)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)  # no error: the iteration was closed
    scaler.update()
    assert scaler.get_scale() == 2.0


@pytest.mark.parametrize(
    "new_scale",
    [4, torch.tensor(4), torch.tensor(4.0, dtype=torch.float64), torch.full((1, 1), 4.0)],
    ids=repr,
)
def test_update_takes_integers_and_tensors_of_any_dtype_and_shape(new_scale):
    """Contract 31: torch knows no int, and fails on a tensor that has a dimension."""
    for refused in (4, torch.full((1,), 4.0)):
        theirs = torch.amp.GradScaler("cpu")
        theirs.scale(torch.ones(()))
        with pytest.raises((AttributeError, RuntimeError)):
            theirs.update(refused)
    scaler = ShardedGradScaler("cpu")
    scaler.update(new_scale)
    assert scaler.get_scale() == 4.0


def test_the_tensor_given_is_not_kept():
    """Contract 31: writing to it later changes nothing."""
    mine = torch.tensor(4.0)
    scaler = ShardedGradScaler("cpu")
    scaler.update(mine)
    mine.fill_(9.0)
    assert scaler.get_scale() == 4.0


@pytest.mark.parametrize(
    "new_scale",
    [
        0.0,
        -2.0,
        math.inf,
        math.nan,
        1e39,
        1e-40,
        torch.tensor(math.inf),
        torch.ones(2),
        torch.ones(0),
        torch.ones(1, requires_grad=True),
        True,
        "4.0",
    ],
    ids=repr,
)
def test_a_wrong_scale_is_refused_and_nothing_is_changed(new_scale):
    """Contract 31: scale, tracker, records and last report."""
    scaler, optimizer = ShardedGradScaler("cpu", init_scale=8.0), sgd(full(8.0))
    run_verdicts(scaler, [True])
    report = scaler.last_report()
    scaler.unscale_(optimizer)
    with pytest.raises(ConfigError) as caught:
        scaler.update(new_scale)
    assert isinstance(caught.value, AssertionError)
    assert (scaler.get_scale(), scaler._growth_tracker.item()) == (8.0, 1)
    assert scaler.last_report() == report
    scaler.step(optimizer)
    scaler.update()
    assert params_of(optimizer)[0].tolist() == [0.0] * 4
    assert scaler._growth_tracker.item() == 2


@pytest.mark.parametrize("new_scale", [torch.ones(2), torch.ones(1, requires_grad=True)])
def test_what_torch_refuses_as_a_scale_is_refused_in_its_words(new_scale):
    """Contract 31: AssertionError, with the same beginning."""
    theirs, ours = torch.amp.GradScaler("cpu"), ShardedGradScaler("cpu")
    theirs.scale(torch.ones(()))
    text = "new_scale should be a float or a 1-element torch.cuda.FloatTensor or torch.FloatTensor"
    assert_fails_alike(
        lambda: theirs.update(new_scale), lambda: ours.update(new_scale), text, AssertionError
    )


def test_a_scale_outside_the_policys_range_is_refused_and_a_loaded_one_clamped():
    """Contract 31: ``update`` refuses, ``load_state_dict`` warns."""
    policy = DynamicScale(min_scale=2.0, max_scale=512.0)
    scaler = ShardedGradScaler("cpu", init_scale=8.0, policy=policy)
    for wrong in (1.0, 1024.0):
        with pytest.raises(ConfigError, match=r"\[2, 512\]"):
            scaler.update(wrong)
    with pytest.warns(UserWarning, match=r"65536.*\[2, 512\]; 512 is taken"):
        scaler.load_state_dict(torch.amp.GradScaler("cpu").state_dict())
    assert scaler.get_scale() == 512.0


def test_update_without_a_verdict_is_torchs_assertion():
    """Contract 32: before the first step, and twice in a row."""
    theirs, ours = torch.amp.GradScaler("cpu"), ShardedGradScaler("cpu")
    theirs.scale(torch.ones(()))
    text = "No inf checks were recorded prior to update."
    assert_fails_alike(theirs.update, ours.update, text, AssertionError)
    run_verdicts(theirs, [True])
    run_verdicts(ours, [True])
    assert_fails_alike(theirs.update, ours.update, text, AssertionError)
    assert_same_scale(theirs, ours)


def test_an_interval_lowered_below_the_tracker_still_grows():
    """Contract 33: torch tests for equality, and never grows again."""
    seen = {}
    for make in (torch.amp.GradScaler, ShardedGradScaler):
        scaler = make("cpu", init_scale=8.0, growth_interval=10)
        run_verdicts(scaler, [True] * 4)
        scaler.set_growth_interval(3)
        seen[make] = run_verdicts(scaler, [True] * 2)
    assert seen[torch.amp.GradScaler] == [(8.0, 5), (8.0, 6)]
    assert seen[ShardedGradScaler] == [(16.0, 0), (16.0, 1)]


@BOTH
def test_factors_can_be_changed_on_the_way(make):
    """Contract 33: all three; they count from the next update on."""
    scaler = make("cpu", init_scale=8.0)
    scaler.set_growth_factor(3.0)
    scaler.set_backoff_factor(0.25)
    scaler.set_growth_interval(1)
    assert (scaler.get_growth_factor(), scaler.get_backoff_factor()) == (3.0, 0.25)
    assert scaler.get_growth_interval() == 1
    assert [s for s, _ in run_verdicts(scaler, [True, False])] == [24.0, 6.0]


def test_a_factor_out_of_range_or_that_the_policy_has_not_is_refused():
    """Contract 33: the old one stays."""
    scaler = ShardedGradScaler("cpu")
    with pytest.raises(ConfigError, match=r"growth_factor is 0\.5"):
        scaler.set_growth_factor(0.5)
    with pytest.raises(ConfigError, match="growth_interval is 0"):
        scaler.set_growth_interval(0)
    assert scaler.get_growth_factor() == 2.0
    constant = ShardedGradScaler("cpu", policy=ConstantScale())
    with pytest.raises(ConfigError, match="ConstantScale has no such number"):
        constant.set_backoff_factor(0.5)
    disabled = ShardedGradScaler("cpu", enabled=False)
    disabled.set_growth_factor(3.0)  # as torch's, which nothing reads


def two_optimizers_and_an_update_between(make, how):
    """The pattern of Accelerate and Ray: each of two optimizers has a wrapper that updates."""
    scaler = make("cpu", init_scale=8.0, growth_interval=1)
    one, other = sgd(full(0.0), **how), sgd(full(0.0), **how)
    for optimizer in (one, other):
        params_of(optimizer)[0].grad = None
        loss = params_of(optimizer)[0].sum()
        scaler.scale(loss).backward()
    scaler.step(one)
    scaler.update()
    scaler.step(other)
    scaler.update()
    return [params_of(o)[0][0].item() for o in (one, other)], scaler


@pytest.mark.parametrize("how", [{}, {"fused": True}], ids=["loop", "fused"])
def test_an_update_between_two_optimizers_unscales_both_alike(how):
    """Contract 34: torch divides the second by a scale that it was not made with."""
    moved, _ = two_optimizers_and_an_update_between(torch.amp.GradScaler, how)
    assert moved == [0.0, 0.5]
    moved, scaler = two_optimizers_and_an_update_between(ShardedGradScaler, how)
    assert moved == [0.0, 0.0]
    assert scaler.get_scale() == 32.0


@pytest.mark.parametrize("start", ["scale", "wrap_loss", "begin"])
@pytest.mark.parametrize("call", ["unscale_", "clip_grad_norm_", "step"])
def test_each_way_to_begin_an_iteration_stamps_its_gradients(start, call):
    """Contract 34: whatever unscales them later."""
    scaler = ShardedGradScaler("cpu", init_scale=8.0)
    if start == "scale":
        scaler.scale(torch.ones(()))
    elif start == "wrap_loss":
        scaler.wrap_loss(torch.sum)(torch.ones(2))
    else:
        scaler.begin()
    optimizer = sgd(full(8.0))
    scaler.update(2.0)
    scaler.update(32.0)
    if call == "clip_grad_norm_":
        scaler.clip_grad_norm_(optimizer, math.inf)
    else:
        getattr(scaler, call)(optimizer)
    assert grad_of(optimizer).tolist() == [1.0] * 4


def test_a_new_iteration_has_the_newest_scale():
    """Contract 34: for an optimizer that did not step in the one before, too."""
    scaler = ShardedGradScaler("cpu", init_scale=8.0)
    one, other = sgd(full(8.0)), sgd(full(2.0))
    scaler.scale(torch.ones(()))
    scaler.step(one)
    scaler.update(2.0)
    scaler.scale(torch.ones(()))
    scaler.unscale_(other)
    assert grad_of(other).tolist() == [1.0] * 4


def test_having_stepped_counts_for_one_iteration():
    """Contract 34: in the next one the optimizer has gradients of that one's scale again."""
    scaler, optimizer = ShardedGradScaler("cpu", init_scale=8.0), sgd(full(8.0))
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    scaler.update()
    scaler.scale(torch.ones(()))
    params_of(optimizer)[0].grad = full(8.0)
    scaler.update(2.0)
    scaler.unscale_(optimizer)
    assert grad_of(optimizer).tolist() == [1.0] * 4


def test_an_optimizer_that_has_stepped_is_unscaled_by_the_newest_scale():
    """Contract 34: a loop that never calls ``scale``, with one update for each iteration."""
    scaler, optimizer = ShardedGradScaler("cpu", init_scale=8.0, growth_interval=1), sgd(full(0.0))
    for scale in (8.0, 16.0, 32.0):
        assert scaler.get_scale() == scale
        params_of(optimizer)[0].grad = full(scale)
        scaler.step(optimizer)
        scaler.update()
    assert params_of(optimizer)[0].tolist() == [-2.0] * 4


@BOTH
def test_scale_and_tracker_stay_the_same_tensors(make):
    """Contract 35: whoever keeps a reference sees every change."""
    scaler = make("cpu", init_scale=8.0, growth_interval=2)
    scaler.scale(torch.ones(()))
    scale, tracker = scaler._scale, scaler._growth_tracker
    assert (scale.dtype, scale.shape) == (torch.float32, ())
    assert (tracker.dtype, tracker.shape) == (torch.int32, ())
    run_verdicts(scaler, [True, True, False])
    scaler.update(3.0)
    scaler.load_state_dict({**scaler.state_dict(), "scale": 5.0, "_growth_tracker": 1})
    assert scaler._scale is scale and scaler._growth_tracker is tracker
    assert (scale.item(), tracker.item()) == (5.0, 1)
