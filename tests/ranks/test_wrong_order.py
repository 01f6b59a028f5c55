"""Calls that come when they cannot: an error on every rank, and no parameter moves."""

from __future__ import annotations

import copy
import re
import warnings
from functools import partial

import pytest
import torch

from shardscale import ShardedGradScaler, distinct
from tests.ranks.rank import outcome

SCALE = 4.0


def make(num=1, **how):
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(num)]
    return params, [torch.optim.SGD([p], lr=0.5, **how) for p in params]


def give(params):
    for p in params:
        p.grad = torch.full_like(p, SCALE)


def values(params):
    return [p[0].item() for p in params]


# ------------------------------------------------------------------------------- two scalers a job


def interleave(rank, size, fused):
    """Each of two scalers steps its optimizer; the last rank has them the other way round."""
    params, optimizers = make(2, fused=fused)
    scalers = [ShardedGradScaler("cpu", init_scale=SCALE) for _ in optimizers]
    pairs = list(zip(scalers, optimizers, strict=True))
    if rank == size - 1:
        pairs.reverse()
    told = []
    for scaler, optimizer in pairs * 2:  # where nothing is read in time, the second update tells
        give(params)
        told.append(outcome(lambda s=scaler, o=optimizer: (s.step(o), s.update())))
        if told[-1].error is not None:
            break
    return told[-1].error, told[-1].message, values(params)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("size", [2, 3])
def test_two_scalers_whose_calls_interleave_differently_disagree(ranks, size, fused):
    for error, message, moved in ranks.run(interleave, size, fused=fused):
        assert error == "DisagreementError"
        # Numbered from 0 in this process, unless it has made others before.
        first, second = re.findall(r"(\d+) on rank", message.partition("in order of making): ")[2])
        assert int(second) == int(first) + 1
        assert moved == [1.0, 1.0]


def keep_order(rank, size):
    params, optimizers = make(2)
    scalers = [ShardedGradScaler("cpu", init_scale=s) for s in (4.0, 8.0)]
    for p, scale in zip(params, (4.0, 8.0), strict=True):
        p.grad = torch.full_like(p, torch.inf if (scale, rank) == (8.0, 1) else scale)
    for scaler, optimizer in zip(scalers, optimizers, strict=True):
        scaler.step(optimizer)
    for scaler in scalers:
        scaler.update()
    return values(params), [scaler.get_scale() for scaler in scalers]


def test_two_scalers_in_one_order_are_two_verdicts(ranks):
    assert ranks.run(keep_order, 3) == [([0.5, 1.0], [4.0, 4.0])] * 3


# ---------------------------------------------------------------------------------- inside backward


def step_in_a_hook(rank, size, on_ranks, method):
    params, (optimizer, *_) = make(2, fused=False)
    optimizer.add_param_group({"params": params[1]})
    scaler = ShardedGradScaler("cpu", init_scale=SCALE, timeout_s=5.0, sync=True)
    scaler.attach(torch.nn.ParameterList(params), copies=distinct)
    call = {
        "step": lambda: scaler.step(optimizer),
        "unscale_": lambda: scaler.unscale_(optimizer),
        "clip_grad_norm_": lambda: scaler.clip_grad_norm_(optimizer, 1.0),
    }[method]
    loss = scaler.scale(sum(p.sum() for p in params))
    if rank in on_ranks:
        params[0].register_post_accumulate_grad_hook(lambda _: call())
        found = outcome(loss.backward)
    else:
        loss.backward()
        found = outcome(call)
    return found.error, found.message, values(params)


@pytest.mark.parametrize("method", ["step", "unscale_", "clip_grad_norm_"])
@pytest.mark.parametrize("on_ranks", [{0, 1}, {1}], ids=["all", "one"])
def test_a_step_inside_backward_is_refused_with_the_reason(ranks, on_ranks, method):
    for rank, (error, message, moved) in enumerate(
        ranks.run(step_in_a_hook, 2, on_ranks=on_ranks, method=method)
    ):
        assert error == ("StageError" if rank in on_ranks else "DisagreementError")
        assert f"{method}() was called inside backward(), by a hook" in message
        assert moved == [1.0, 1.0]


def optimizer_in_backward(rank, size, attached):
    """torch's own way to overlap the two."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript, by torch itself
        from torch.distributed.optim import _apply_optimizer_in_backward
    net = torch.nn.Linear(3, 2)
    before = [p.detach().clone() for p in net.parameters()]
    _apply_optimizer_in_backward(torch.optim.SGD, net.parameters(), {"lr": 0.5})
    scaler = ShardedGradScaler("cpu", init_scale=SCALE)
    if attached:
        found = outcome(lambda: scaler.attach(net))
    else:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        found = outcome(lambda: scaler.step(optimizer))
    unmoved = all(map(torch.equal, before, net.parameters()))
    return found.error, found.message, unmoved


@pytest.mark.parametrize("attached", [True, False])
def test_torchs_optimizer_in_backward_is_refused_with_the_reason(ranks, attached):
    for error, message, unmoved in ranks.run(optimizer_in_backward, 2, attached=attached):
        assert error == "StageError"
        assert "steps inside backward() (_apply_optimizer_in_backward)" in message
        assert unmoved


# -------------------------------------------------------------------------- asked for at a bad time


def ask_too_early(rank, size):
    """A verdict before there is one, on one rank alone; then all go on."""
    params, (optimizer,) = make()
    scaler = ShardedGradScaler("cpu", init_scale=SCALE)
    give(params)
    found = outcome(lambda: scaler.verdict(optimizer)) if rank == 1 else None
    scaler.step(optimizer)
    scaler.update()
    return found and (found.error, found.message), values(params)


def test_a_verdict_asked_for_before_there_is_one_costs_nobody_anything(ranks):
    """Nothing is sent for it, so one rank may be wrong alone."""
    first, (told, moved), last = ranks.run(ask_too_early, 3)
    assert first == last == (None, [0.5])
    assert told[0] == "StageError"
    assert "before there is one" in told[1]
    assert moved == [0.5]


def begin_on_some(rank, size, which, fused):
    """Between two optimizers the scale grows, and some ranks begin a new iteration there."""
    params, (one, other) = make(2, fused=fused)
    scaler = ShardedGradScaler("cpu", init_scale=SCALE, growth_interval=1)
    scaler.scale(torch.ones(()))
    give(params)
    scaler.step(one)
    scaler.update()
    if rank in which:
        scaler.begin()
    step_other, step_one = (partial(scaler.step, o) for o in (other, one))
    for call in (step_other, scaler.update, step_one, scaler.update):
        found = outcome(call)
        if found.error is not None:
            break
    return found.error, found.message, values(params)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("which", [{0}, {1, 2}], ids=str)
def test_beginning_on_some_ranks_only_is_a_disagreement(ranks, which, fused):
    for error, message, moved in ranks.run(begin_on_some, 3, which=which, fused=fused):
        assert error == "DisagreementError"
        assert "scale of these gradients" in message
        assert re.search(r"\b8\.0 on rank", message)
        assert moved == [0.5, 1.0]


def copy_mid_step(rank, size):
    """Rank 1 tries to copy its scaler between `unscale_` and `step`."""
    params, (optimizer,) = make()
    scaler = ShardedGradScaler("cpu", init_scale=SCALE)
    give(params)
    scaler.unscale_(optimizer)
    found = outcome(lambda: copy.deepcopy(scaler)) if rank == 1 else None
    before = values(params)
    scaler.step(optimizer)
    scaler.update()
    return found and (found.error, found.kinds), before, values(params), copy.deepcopy(scaler)


def test_a_copy_in_the_middle_of_a_step_is_torchs_assertion_and_the_step_goes_on(ranks):
    for rank, (told, before, moved, copied) in enumerate(ranks.run(copy_mid_step, 2)):
        assert (told is not None) == (rank == 1)
        if told:
            assert told[0] == "StateError"
            assert "AssertionError" in told[1]
        assert (before, moved) == ([1.0], [0.5])
        assert copied.get_scale() == SCALE
