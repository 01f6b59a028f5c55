"""Gradients that `no_sync` still holds back: no call judges them, and no rank steps on them."""

from __future__ import annotations

import signal
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import shardscale
from shardscale import ShardedGradScaler
from tests.ranks.models import (
    batch,
    equal,
    held_back,
    lay_out,
    local,
    make_net,
    reference_grads,
    whole_bits,
)
from tests.ranks.rank import outcome

SCALE = 8.0
CALLS = {
    "step": lambda scaler, optimizer: scaler.step(optimizer),
    "unscale_": lambda scaler, optimizer: scaler.unscale_(optimizer),
    "clip_grad_norm_": lambda scaler, optimizer: scaler.clip_grad_norm_(optimizer, 1.0),
}
LAYOUTS = {
    "DDP": "the model (DDP)",
    "FSDP1 FULL_SHARD flat": "the model (FSDP1)",
    "FSDP1 FULL_SHARD original": "the model (FSDP1)",
    "FSDP1 SHARD_GRAD_OP flat": "the model (FSDP1)",
    "FSDP1 SHARD_GRAD_OP original": "the model (FSDP1)",
    "FSDP1 NO_SHARD original": "the model (FSDP1)",
    "FSDP2": "the model (FSDP2)",
}
LOCAL_ARE_LIKE_ANY = {"DDP", "FSDP1 NO_SHARD original"}
"""Where local gradients have the shape of averaged ones, nothing tells once `no_sync` is left."""


def sgd(params):
    return torch.optim.SGD(params, lr=0.5, momentum=0.5)


# --------------------------------------------------------------------------------- on every rank


def judge_too_early(rank, size):
    """In every layout, each call within `no_sync`, and after it without a synchronised backward.

    With what became of the step that was then made in the right way.
    """
    return {
        (name, call, place): mistake_and_recovery(size, name, call, place)
        for name in LAYOUTS
        for call in CALLS
        for place in ("within", "after")
        if place == "within" or name not in LOCAL_ARE_LIKE_ANY
    }


def mistake_and_recovery(size, name, call, place):
    laid = lay_out(name, size)
    optimizer = sgd(laid.model.parameters())
    scaler = ShardedGradScaler("cpu", init_scale=SCALE, model=laid.model)
    before = whole_bits(laid)
    with held_back(laid.model):
        laid.backward(scaler, 0)
        if place == "within":
            found = outcome(lambda: CALLS[call](scaler, optimizer))
    if place == "after":
        found = outcome(lambda: CALLS[call](scaler, optimizer))
    untouched = equal(before, whole_bits(laid))
    laid.backward(scaler, 1)
    again = outcome(lambda: (scaler.step(optimizer), scaler.update()))
    return found.error, found.message, untouched, again.error, scaler.get_scale(), laid.whole()


@pytest.fixture(scope="module")
def too_early(ranks):
    return ranks.run(judge_too_early, 2, limit_s=90)


def test_a_call_before_the_last_micro_batch_is_an_error_on_every_rank(too_early):
    """Contract 50: it names the unit and says what to do, and nothing moves."""
    for rank, found in enumerate(too_early):
        for (name, *key), (error, message, untouched, *_) in found.items():
            assert error == "StageError", (name, key)
            assert f"rank {rank} of 2: {LAYOUTS[name]} holds gradients back" in message
            wanted = "set_requires_gradient_sync(True)" if name == "FSDP2" else "leave no_sync()"
            assert wanted in message
            assert untouched, (name, key)


def test_after_the_error_the_last_micro_batch_can_still_be_made(too_early):
    """Contract 50: bit for bit the step that would have been made without the early call."""
    net = make_net()
    reference_grads(net, 2, 0, 1)
    sgd(net.parameters()).step()
    expected = {name: p.detach() for name, p in net.named_parameters()}
    for found in too_early:
        for key, (*_, error, scale, whole) in found.items():
            assert (error, scale) == (None, SCALE), key
            assert equal(whole, expected), key


# ------------------------------------------------------------------------------- replicas of HSDP


def leave_replicas_apart(rank, size):
    """`set_requires_all_reduce(False)`: scattered, but not added up over the replicas."""
    laid = lay_out("HSDP", size)
    optimizer = sgd(laid.model.parameters())
    scaler = ShardedGradScaler("cpu", init_scale=SCALE, model=laid.model)
    laid.model.set_requires_all_reduce(False)
    laid.backward(scaler, 0)
    laid.model.set_requires_all_reduce(True)
    found = outcome(lambda: scaler.step(optimizer))
    laid.backward(scaler, 1)
    scaler.step(optimizer)
    return found.error, found.message, laid.whole(), laid.num_batches


def test_gradients_that_have_not_met_the_other_replicas_are_an_error(ranks):
    """Contract 50: see the name."""
    for error, message, whole, num_batches in ranks.run(leave_replicas_apart, 4):
        assert error == "StageError"
        assert "set_requires_all_reduce(True)" in message
        net = make_net()
        reference_grads(net, num_batches, 0, 1)
        sgd(net.parameters()).step()
        assert equal(whole, {name: p.detach() for name, p in net.named_parameters()})


# --------------------------------------------------------------------------------- on some ranks


def hold_back_in_one_stage(rank, size, call):
    """Two pipeline stages, each a DDP model on two ranks; the first stage is within `no_sync`."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    model = DistributedDataParallel(make_net(), process_group=groups[rank // 2])
    optimizer = sgd(model.parameters())
    scaler = ShardedGradScaler("cpu", init_scale=SCALE)
    scaler.attach(model, copies=shardscale.distinct)
    before = [p.detach().clone() for p in model.parameters()]
    with held_back(model) if rank < 2 else nullcontext():
        scaler.scale(model(batch(rank, 0)).sum()).backward()
        found = outcome(lambda: (CALLS[call](scaler, optimizer), scaler.step(optimizer)))
    return found.error, found.message, all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("call", CALLS)
def test_where_some_ranks_hold_back_all_raise_and_nothing_moves(ranks, call):
    """Contract 50: those that found it join first; the others name them."""
    found = ranks.run(hold_back_in_one_stage, 4, call=call)
    assert [error for error, _, _ in found] == ["StageError"] * 2 + ["DisagreementError"] * 2
    for _, message, untouched in found:
        assert "the model (DDP) holds gradients back" in message
        assert untouched
    assert "rank 0 raised StageError" in found[2][1]


def hold_back_alone(rank, size, name):
    """Rank 1 is within `no_sync`, and its model's other ranks wait for it in their backward."""
    laid = lay_out(name, size)
    optimizer = sgd(laid.model.parameters())
    scaler = ShardedGradScaler("cpu", init_scale=SCALE, model=laid.model, timeout_s=3.0)
    laid.backward(scaler, 0)  # the wrapper's own set-up communicates, too
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    params = list(laid.model.parameters())  # a backward that fails leaves others in their place
    before = [local(p).clone() for p in params]
    found = outcome(lambda: backward_and_step(rank, laid, scaler, optimizer))
    return found.error, all(map(torch.equal, before, map(local, params)))


def backward_and_step(rank, laid, scaler, optimizer):
    with held_back(laid.model) if rank == 1 else nullcontext():
        laid.backward(scaler, 1)
        scaler.step(optimizer)


@pytest.mark.parametrize("name", ["DDP", "FSDP2"])
def test_a_rank_that_holds_back_from_its_own_wrapper_ends_all_ranks_in_an_error(ranks, name):
    """Contract 50: it is the wrapper's collective that the others wait in, so the error may be the
    transport's. Gloo even ends a process that receives what it does not expect."""
    reports = ranks.spawn(hold_back_alone, 3, name=name, group_timeout_s=4.0, limit_s=20.0)
    for report in reports:
        assert report.error is None
        if report.exit_code != -signal.SIGABRT:
            error, unmoved = report.result
            assert error is not None
            assert unmoved


# -------------------------------------------------------------------------------- no false alarms


def turn_the_flag_off_early(rank, size):
    """For the next micro-batch, after the last backward and before the step."""
    laid = lay_out("FSDP2", size)
    optimizer = sgd(laid.model.parameters())
    scaler = ShardedGradScaler("cpu", init_scale=SCALE, model=laid.model)
    laid.backward(scaler, 0)
    laid.model.set_requires_gradient_sync(False)
    scaler.step(optimizer)
    return laid.whole()


def step_within_no_sync_after_a_synchronised_backward(rank, size):
    """DDP's forward has decided, outside."""
    laid = lay_out("DDP", size)
    optimizer = sgd(laid.model.parameters())
    scaler = ShardedGradScaler("cpu", init_scale=SCALE, model=laid.model)
    laid.backward(scaler, 0)
    with laid.model.no_sync():
        scaler.step(optimizer)
    return laid.whole()


@pytest.mark.parametrize(
    "case", [turn_the_flag_off_early, step_within_no_sync_after_a_synchronised_backward]
)
def test_gradients_that_have_met_may_be_stepped_whatever_the_flag_says(ranks, case):
    """Contract 50: see the name."""
    net = make_net()
    reference_grads(net, 2, 0)
    sgd(net.parameters()).step()
    for whole in ranks.run(case, 2):
        assert equal(whole, {name: p.detach() for name, p in net.named_parameters()})


def step_the_one_while_the_other_is_held_back(rank, size):
    """A generator's turn: the loss runs through a discriminator whose gradients nobody wants."""
    generator, critic = (DistributedDataParallel(make_net()) for _ in range(2))
    widen = nn.Linear(3, 5, bias=False)
    nn.init.ones_(widen.weight)
    optimizer = sgd(generator.parameters())
    scaler = ShardedGradScaler("cpu", init_scale=SCALE, model=generator).attach(critic)
    with critic.no_sync():
        scaler.scale(critic(widen(generator(batch(rank, 0)))).sum()).backward()
        scaler.clip_grad_norm_(optimizer, 1.0)
        scaler.step(optimizer)
        other = outcome(lambda: scaler.step(sgd(critic.parameters())))
    return other.error, [p.detach() for p in generator.parameters()]


def test_a_model_may_be_held_back_while_another_one_steps(ranks):
    """Contract 50: what counts is whose gradients are judged."""
    (first, params), (second, others) = ranks.run(step_the_one_while_the_other_is_held_back, 2)
    assert all(map(torch.equal, params, others))
    assert not all(map(torch.equal, params, make_net().parameters()))
    assert (first, second) == ("StageError", "StageError")
