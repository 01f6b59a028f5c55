"""Ranks that do not do the same thing find out together, and nothing moves any more."""

from __future__ import annotations

import math
import re
from functools import partial

import pytest
import torch

from shardscale import ShardedGradScaler
from tests.ranks.rank import outcome

NUM_STEPS = 5
DRIFTS_AT = 1


class Job:
    """One optimizer under one scaler on one rank, with the calls that an iteration makes."""

    def __init__(self, odd, drift, fused, sync):
        self.p = torch.nn.Parameter(torch.ones(3))
        self.optimizer = torch.optim.SGD([self.p], lr=0.5, fused=fused)
        interval = 30 if odd and drift == "growth interval" else 2000
        self.scaler = ShardedGradScaler("cpu", init_scale=4.0, growth_interval=interval, sync=sync)
        self.odd, self.drift = odd, drift

    def begin(self):
        self.scaler.scale(torch.ones(()))
        self.p.grad = torch.full_like(self.p, self.scaler.get_scale())

    def judge_and_step(self, drifted):
        """All calls of an iteration but `update`; if ``drifted``, the odd ranks' calls differ."""
        odd = drifted and self.odd
        unscale = {
            "unscale_ and step": odd,
            "clip_grad_norm_ and step": odd,
            "unscale_ and clip_grad_norm_": True,
            "max_norm": True,
        }.get(self.drift, False)
        if unscale:
            max_norm = {"max_norm": 2.0 if odd else 3.0}.get(self.drift, math.inf)
            by_clip = ("clip" in self.drift and odd) or self.drift == "max_norm"
            if by_clip:
                self.scaler.clip_grad_norm_(self.optimizer, max_norm)
            else:
                self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)

    def drift_apart(self):
        """What an odd rank alone does to its scaler between two iterations."""
        if self.drift == "scale":
            self.scaler.update(8.0)
        if self.drift == "tracker":
            state = self.scaler.state_dict()
            self.scaler.load_state_dict({**state, "_growth_tracker": 17})


DRIFTS = {
    "scale": ("4.0", "8.0"),
    "tracker": ("1", "17"),
    "growth interval": ("2000", "30"),
    "unscale_ and step": ("step", "unscale_"),
    "clip_grad_norm_ and step": ("step", "clip_grad_norm_"),
    "unscale_ and clip_grad_norm_": ("unscale_", "clip_grad_norm_"),
    "max_norm": ("3.0", "2.0"),
}
"""Name -> what the message must say of the even ranks and of the odd ones."""


def drift_in_every_way(rank, size, odd_ranks, fused, sync):
    """{drift: for each iteration, (error of its calls, error of its update, parameters
    unmoved)}."""
    found = {}
    for drift in DRIFTS:
        odd = rank in odd_ranks
        job = Job(odd, drift, fused, sync)
        job.scaler.attach(torch.nn.ParameterList([job.p]), copies=lambda name, p: None)
        found[drift] = history = []
        for step in range(NUM_STEPS):
            if step == DRIFTS_AT and odd:
                job.drift_apart()
            before = job.p.tolist()
            job.begin()
            called = outcome(partial(job.judge_and_step, drifted=step == DRIFTS_AT))
            updated = outcome(job.scaler.update)
            history.append((called[1:], updated[1:], job.p.tolist() == before))
    return found


ODD_RANKS = [
    pytest.param(2, (1,), id="one of two"),
    pytest.param(3, (0,), id="first of three"),
    pytest.param(3, (1,), id="middle of three"),
    pytest.param(4, (1, 2), id="two of four alike"),
    pytest.param(4, (1, 3), id="every other of four"),
]


def first_step_apart(drift):
    return 0 if drift == "growth interval" else DRIFTS_AT


def assert_told(error, kinds, message, drift, odd_ranks):
    assert error == "DisagreementError", (drift, error, message)
    assert "RuntimeError" in kinds
    for rank in odd_ranks:
        assert re.search(rf"\b{rank}\b", message), (drift, message)
    for value in DRIFTS[drift]:
        assert re.search(rf"(?<![\w.]){re.escape(value)}(?![\w.])", message), (drift, message)


@pytest.mark.parametrize(("size", "odd_ranks"), ODD_RANKS)
@pytest.mark.parametrize("fused", [False, True])
def test_where_the_host_reads_the_verdict_all_ranks_raise_at_that_step(
    ranks, size, odd_ranks, fused
):
    """Contract 46: not fused: the host decides, so it reads. Fused with ``sync=True`` reads too."""
    options = {"fused": fused, "sync": fused}
    for found in ranks.run(drift_in_every_way, size, odd_ranks=odd_ranks, **options):
        assert found.keys() == DRIFTS.keys()
        for drift, history in found.items():
            first = first_step_apart(drift)
            for called, updated, unmoved in history[:first]:
                assert (called[0], updated[0], unmoved) == (None, None, False), (drift, history)
            assert_told(*history[first][0], drift, odd_ranks)
            assert all(unmoved for _, _, unmoved in history[first:]), (drift, history)


@pytest.mark.parametrize(("size", "odd_ranks"), ODD_RANKS[2:4])
def test_where_it_does_not_all_raise_at_the_next_update_and_nothing_moved(ranks, size, odd_ranks):
    """Contract 46: as the name says.

    Fused: the host goes on and reads one iteration later; the flag on the device has stopped the
    step."""
    for found in ranks.run(drift_in_every_way, size, odd_ranks=odd_ranks, fused=True, sync=False):
        for drift, history in found.items():
            first = first_step_apart(drift)
            for called, updated, unmoved in history[:first]:
                assert (called[0], updated[0], unmoved) == (None, None, False), (drift, history)
            called, updated, _ = history[first]
            assert (called[0], updated[0]) == (None, None), (drift, history)
            called, updated, _ = history[first + 1]
            assert called[0] is None, (drift, history)
            assert_told(*updated, drift, odd_ranks)
            assert all(unmoved for _, _, unmoved in history[first:]), (drift, history)


# ----------------------------------------------------------------------- different numbers of calls


def step_own_optimizers_one_by_one(rank, size, fused):
    """Rank 1 owns two optimizers, the others one; each is stepped by a call of its own."""
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2 if rank == 1 else 1)]
    optimizers = [torch.optim.SGD([p], lr=0.5, fused=fused) for p in params]
    scaler = ShardedGradScaler("cpu", init_scale=4.0, timeout_s=3.0)
    told, moved = [], []
    for _ in range(3):
        scaler.scale(torch.ones(()))
        for p, optimizer in zip(params, optimizers, strict=True):
            p.grad = torch.full_like(p, 4.0)
            before = p.tolist()
            told.append(outcome(lambda optimizer=optimizer: scaler.step(optimizer))[1:])
            moved.append(p.tolist() != before)
            if told[-1][0] is not None:
                return told, moved
        told.append(outcome(scaler.update)[1:])
        if told[-1][0] is not None:
            return told, moved
    return told, moved


@pytest.mark.parametrize("fused", [False, True])
def test_different_numbers_of_calls_stop_all_ranks_at_the_first_mispaired_one(ranks, fused):
    """The first call pairs rightly on all ranks and is taken; what rank 1 calls next is not the
    others' next."""
    for told, moved in ranks.run(step_own_optimizers_one_by_one, 3, fused=fused):
        assert moved[0]
        assert not any(moved[1:])
        assert told[-1][0] == "DisagreementError", told


def step_all_in_one_call(rank, size, fused):
    """The same ownership, and rank 2 owns nothing, in one call an iteration."""
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range((1, 2, 0)[rank])]
    optimizers = [torch.optim.SGD([p], lr=0.5, fused=fused) for p in params]
    scaler = ShardedGradScaler("cpu", init_scale=4.0)
    for _ in range(3):
        scaler.scale(torch.ones(()))
        for p in params:
            p.grad = torch.full_like(p, 4.0)
        scaler.step(optimizers)
        scaler.update()
    return [p[0].item() for p in params]


@pytest.mark.parametrize("fused", [False, True])
def test_one_call_for_all_optimizers_is_the_way_to_own_different_numbers(ranks, fused):
    assert ranks.run(step_all_in_one_call, 3, fused=fused) == [[-0.5], [-0.5, -0.5], []]


def update_between_two_optimizers(rank, size):
    """Everyone steps two optimizers; only rank 1 calls `update` in between."""
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    a, b = (torch.optim.SGD([p], lr=0.5) for p in params)
    scaler = ShardedGradScaler("cpu", init_scale=4.0, growth_interval=100)
    scaler.scale(torch.ones(()))
    for p in params:
        p.grad = torch.full_like(p, 4.0)
    scaler.step(a)
    if rank == 1:
        scaler.update()
    found = outcome(lambda: scaler.step(b))
    return found.error, found.message, [p[0].item() for p in params]


def test_ranks_with_different_numbers_of_updates_disagree(ranks):
    for error, message, values in ranks.run(update_between_two_optimizers, 3):
        assert error == "DisagreementError"
        assert re.search(r"\b1\b", message)
        assert values == [0.5, 1.0]


# ------------------------------------------------------------------------------------- scale stamps


def last_rank_sees_no_loss(rank, size, begins):
    """The pattern of Accelerate and Ray, an `update` after each optimizer, while the scale grows.

    Two iterations; what each optimizer's step came to, and where its parameter then was.
    """
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizers = [torch.optim.SGD([p], lr=0.25) for p in params]
    scaler = ShardedGradScaler("cpu", init_scale=4.0, growth_interval=1)
    history = []
    for scale in (4.0, 16.0):  # of the backward; each update doubles it
        if rank != size - 1:
            scaler.scale(torch.ones(()))
        elif begins:
            scaler.begin()
        for p, optimizer in zip(params, optimizers, strict=True):
            p.grad = torch.full_like(p, scale)
            history.append((outcome(partial(scaler.step, optimizer)).error, p[0].item()))
            if history[-1][0] is not None:
                return history
            scaler.update()
    return history


def test_a_rank_without_a_loss_that_begins_unscales_as_the_others(ranks):
    """Both optimizers by the scale of the backward, although an update came in between."""
    expected = [(None, 0.75), (None, 0.75), (None, 0.5), (None, 0.5)]
    assert ranks.run(last_rank_sees_no_loss, 3, begins=True) == [expected] * 3


def test_a_rank_without_a_loss_that_forgets_to_begin_is_a_disagreement(ranks):
    """Never a silent factor of two."""
    expected = [(None, 0.75), ("DisagreementError", 1.0)]
    assert ranks.run(last_rank_sees_no_loss, 3, begins=False) == [expected] * 3


def update_after_each(rank, size, unscales, owned, begins, fused, writes):
    """Three optimizers, an update after each, while the scale grows; ranks own the first few.

    Where a rank has no optimizer it passes `()`. Gradients are of 1.0 before they are scaled.
    """
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(owned[rank])]
    optimizers = [torch.optim.SGD([p], lr=0.25, fused=fused) for p in params]
    passed = [*optimizers, (), (), ()][:3]
    scaler = ShardedGradScaler("cpu", init_scale=4.0, growth_interval=1, sync=True)
    for _ in range(2):
        scale = scaler.get_scale()
        if params:
            scaler.scale(torch.ones(()))
        elif begins:
            scaler.begin()
        for p in params:
            p.grad = torch.full_like(p, scale)
        found = outcome(lambda: [scaler.unscale_(each) for each in passed if unscales])
        for number, each in enumerate(passed):
            if found.error is None and number == 1 and rank == writes and params[1:]:
                params[1].grad.clamp_(-10, 10)  # changes no number
            found = found if found.error else outcome(partial(scaler.step, each))
            found = found if found.error else outcome(scaler.update)
    return found.error, [p[0].item() for p in params]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("owned", "unscales"),
    [((2, 3, 2), False), ((2, 3, 2), True), ((3, 3, 0), True), ((3, 0, 1), True)],
    ids=str,
)
def test_ranks_of_few_optimizers_unscale_as_the_others(ranks, owned, unscales, fused):
    """Their `()` stands for the optimizer that another rank has."""
    for rank, (error, values) in enumerate(
        ranks.run(
            update_after_each,
            3,
            unscales=unscales,
            owned=owned,
            begins=True,
            fused=fused,
            writes=None,
        )
    ):
        assert error is None
        assert values == [0.5] * owned[rank]


@pytest.mark.parametrize("fused", [False, True])
def test_what_one_rank_writes_to_unscaled_gradients_divides_them_nowhere_again(ranks, fused):
    """Replicas stay replicas: whether gradients are unscaled goes by the calls, which all make."""
    how = {"unscales": True, "owned": (3, 3), "begins": True, "fused": fused, "writes": 0}
    assert ranks.run(update_after_each, 2, **how) == [(None, [0.5] * 3)] * 2


@pytest.mark.parametrize("owned", [(3, 3, 0), (3, 0, 1)], ids=str)
def test_a_rank_without_two_of_three_optimizers_cannot_follow_an_update_after_each(ranks, owned):
    """Its second `()` may as well begin the next iteration. Never a silent factor, though."""
    how = {"unscales": False, "owned": owned, "begins": True, "fused": False, "writes": None}
    for error, _ in ranks.run(update_after_each, 3, **how):
        assert error == "DisagreementError"


def test_a_rank_that_forgets_to_begin_and_unscales_twice_is_a_disagreement(ranks):
    """Never a silent factor: also where the scale itself is the same on all ranks."""
    how = {"unscales": True, "owned": (3, 3, 0), "begins": False, "fused": False, "writes": None}
    for error, _ in ranks.run(update_after_each, 3, **how):
        assert error == "DisagreementError"


# --------------------------------------------------------------------------------- join, then raise


def one_rank_errs(rank, size, fused):
    """Rank 1 calls `step` twice on one optimizer; the others step another one."""
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    a, b = (torch.optim.SGD([p], lr=0.5, fused=fused) for p in params)
    scaler = ShardedGradScaler("cpu", init_scale=4.0, sync=True)
    scaler.scale(torch.ones(()))
    for p in params:
        p.grad = torch.full_like(p, 4.0)
    scaler.step(a)
    found = outcome(lambda: scaler.step(a if rank == 1 else b))
    return found.error, found.message, [p[0].item() for p in params]


@pytest.mark.parametrize("fused", [False, True])
def test_a_mistake_on_one_rank_is_raised_on_all_and_its_own_error_there(ranks, fused):
    first, faulty, last = ranks.run(one_rank_errs, 3, fused=fused)
    assert faulty[0] == "StageError"
    assert faulty[1].startswith("step() has already been called since the last update().")
    for error, message, values in (first, last):
        assert error == "DisagreementError"
        assert "rank 1" in message
        assert "step() has already been called since the last update()." in message
        assert values == [0.5, 1.0]
