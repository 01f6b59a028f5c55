"""Ranks that loaded different states find it together, and go on together if they are asked to."""

from __future__ import annotations

import math
import re
import warnings

import pytest
import torch

from shardscale import DynamicScale, ShardedGradScaler
from shardscale.checkpoint import reconcile
from tests.ranks.rank import outcome

POLICY = DynamicScale(growth_interval=100, hysteresis=3)


class Job:
    """One optimizer under one scaler, whose gradients are ones."""

    def __init__(self, fused=False, **options):
        self.p = torch.nn.Parameter(torch.ones(3))
        self.optimizer = torch.optim.SGD([self.p], lr=0.25, fused=fused)
        self.scaler = ShardedGradScaler("cpu", init_scale=64.0, policy=POLICY, **options)

    def step(self, value=1.0):
        self.scaler.scale(torch.ones(()))
        self.p.grad = torch.full_like(self.p, value * self.scaler.get_scale())
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return self.p[0].item()


def state(policy=POLICY, **changes):
    """A state as it is after some training; ``changes`` by the names that messages have."""
    scaler = ShardedGradScaler("cpu", init_scale=64.0, policy=policy)
    ours = {
        **dict(scaler.state_dict()["shardscale"]),
        "hysteresis_tracker": changes.get("hysteresis_tracker", 2),
        "num_updates": changes.get("number of updates", 40),
        "num_skipped": 4,
    }
    return {
        **scaler.state_dict(),
        "scale": changes.get("scale", 64.0),
        "_growth_tracker": changes.get("growth_tracker", 7),
        "shardscale": tuple(ours.items()),
    }


USUAL = state()
# Name -> the state that odd ranks load, and what the others' must be told to have.
DIFFERENCES = {
    "scale": (state(scale=16.0), {"scale": ("64.0", "16.0")}),
    "growth_tracker": (state(growth_tracker=8), {"growth_tracker": ("7", "8")}),
    "hysteresis_tracker": (state(hysteresis_tracker=1), {"hysteresis_tracker": ("2", "1")}),
    "counter": (state(**{"number of updates": 41}), {"number of updates": ("40", "41")}),
    "an older file": (
        state(**{"scale": 128.0, "growth_tracker": 99, "number of updates": 20}),
        {
            "scale": ("64.0", "128.0"),
            "growth_tracker": ("7", "99"),
            "number of updates": ("40", "20"),
        },
    ),
    "policy": (
        state(DynamicScale(growth_interval=50, hysteresis=3)),
        {"policy": ("growth_interval=100", "growth_interval=50")},
    ),
}
ODD_RANKS = [
    pytest.param(2, (1,), id="one of two"),
    pytest.param(3, (1,), id="middle of three"),
    pytest.param(4, (1, 2), id="two of four alike"),
]


def load_what_differs(rank, size, odd_ranks):
    """{name: (the first step, where the parameter was then, reconcile, its warnings, the next
    step, the state)}."""
    found = {}
    for name, (odd, _) in DIFFERENCES.items():
        job = Job()
        job.scaler.load_state_dict(odd if rank in odd_ranks else USUAL)
        first = outcome(job.step), job.p[0].item()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            reconciled = outcome(lambda job=job: reconcile(job.scaler))
        told = [str(warning.message) for warning in caught]
        reconciled = reconciled.error or reconciled.value, reconciled.message, told
        state_now = job.scaler.state_dict()
        found[name] = (*first, *reconciled, outcome(job.step)[:2], state_now)
    return found


@pytest.mark.parametrize(("size", "odd_ranks"), ODD_RANKS)
def test_states_that_differ_at_load_are_told_at_the_first_verdict_and_reconciled(
    ranks, size, odd_ranks
):
    """Contract 54: before any parameter moves; counters that differ draw other salts, too."""
    found = ranks.run(load_what_differs, size, odd_ranks=odd_ranks)
    for name, (odd, values) in DIFFERENCES.items():
        for first, where, reconciled, message, told, again, state_now in (f[name] for f in found):
            assert (first.error, where) == ("DisagreementError", 1.0), (name, first)
            for field, (usual, other) in values.items():
                pattern = rf"{field}: [^;]*{re.escape(usual)}[^;]* on rank[^;]*{re.escape(other)}"
                for text in (first.message, *told):
                    assert re.search(pattern, text), (name, text)
            assert ("reconcile(scaler)" in first.message) == (name != "policy"), first.message
            if name == "policy":
                assert (reconciled, told) == ("StateError", []), message
                assert "growth_interval=50" in message and "nothing was changed" in message
                assert again[1] == "DisagreementError"
            else:
                taken = odd if name == "scale" else USUAL  # the smallest, of equals rank 0's
                assert (reconciled, len(told), state_now) == (True, 1, taken), name
                assert again == (0.75, None)


def reconcile_at_once(rank, size):
    """Before the first step, in the middle of training, and where nothing differs."""
    job = Job()
    job.scaler.load_state_dict({**USUAL, "scale": (64.0, 8.0, 4.0)[rank]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [reconcile(job.scaler), job.scaler.get_scale(), job.step()]
    found += [reconcile(job.scaler), job.step(), job.step(math.inf)]
    if rank == 1:  # remembers no skip now, as the others do
        job.scaler.load_state_dict(job.scaler.state_dict())
    return [*found, reconcile(job.scaler), job.step(), job.scaler.get_scale()]


def test_reconciled_ranks_agree_at_their_first_verdict(ranks):
    """Contract 54: also where the states are equal and only one rank has just loaded its own."""
    expected = [True, 4.0, 0.75, False, 0.5, 0.5, False, 0.25, 4.0]
    assert ranks.run(reconcile_at_once, 3) == [expected] * 3


def find_it_late(rank, size):
    """With a fused optimizer the host learns of it one update later."""
    job = Job(fused=True)
    job.scaler.load_state_dict({**USUAL, "scale": (64.0, 8.0, 4.0)[rank]})
    found = [outcome(job.step)[:2], outcome(job.step)[1], job.p[0].item()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [*found, reconcile(job.scaler), job.step(), job.step(), job.scaler.get_scale()]


def test_ranks_that_learn_late_of_their_states_reconcile_as_well(ranks):
    """Nothing has moved in between."""
    expected = [(1.0, None), "DisagreementError", 1.0, True, 0.75, 0.5, 4.0]
    assert ranks.run(find_it_late, 3) == [expected] * 3


def one_does_not_come(rank, size):
    job = Job(timeout_s=2.0)
    job.scaler.load_state_dict({**USUAL, "scale": (64.0, 8.0, 4.0)[rank]})
    before = job.scaler.state_dict()
    found = outcome(lambda: reconcile(job.scaler)) if rank != 1 else None
    return found and found[1:], job.scaler.state_dict() == before


def test_a_rank_that_does_not_come_is_named_and_nothing_is_changed(ranks):
    """Contract 54: whoever reconciles alone is told so."""
    for rank, (found, is_unchanged) in enumerate(ranks.run(one_does_not_come, 3)):
        assert is_unchanged
        if rank != 1:
            error, _, message = found
            assert error == "MissingRankError" and "waiting for rank 1," in message, found
