"""The message of a disagreement names who differs, in what, and what to do."""

from __future__ import annotations

import torch

from shardscale.drift import account, explain
from shardscale.errors import LayoutError
from shardscale.records import Call, ScaleState


def call(scale=8.0, **changes):
    state = ScaleState(
        torch.tensor(scale),
        torch.tensor(3, dtype=torch.int32),
        torch.tensor(1, dtype=torch.int32),
    )
    made = Call(5, "step", 0, 0, None, "DynamicScale()", state, torch.tensor(scale))
    return made._replace(**changes)


def test_only_what_differs_is_named_with_its_ranks():
    message = explain([account(call()), account(call(scale=4.0)), account(call())], 2)

    assert message.startswith("rank 2 of 3: the ranks disagree, so no rank moved its parameters.")
    assert "scale: 8.0 on ranks 0, 2, 4.0 on rank 1" in message
    assert "growth_tracker" not in message
    assert "Make the same calls" in message


def test_states_that_differ_can_be_reconciled():
    """What a load brings; other calls or another policy it does not."""
    state = call(scale=4.0, num_updates=9)
    assert "reconcile(scaler)" in explain([account(call()), account(state)], 0)
    for other in (call(policy="ConstantScale()"), call(method="unscale_"), call(4.0, ordinal=1)):
        assert "reconcile" not in explain([account(call()), account(other)], 0)
    assert "reconcile" not in explain([account(call()), account(state, LayoutError("no"))], 0)


def test_a_fault_is_told_with_its_rank_and_its_own_words():
    fault = LayoutError("the gradient of w has dtype torch.float8_e5m2")
    message = explain([account(call()), account(call(), fault)], 0)

    assert "rank 1 raised LayoutError: the gradient of w has dtype torch.float8_e5m2" in message


def test_ranks_that_did_not_answer_are_named():
    assert "ranks 1, 3 did not answer" in explain([account(call()), None, account(call()), None], 0)


def test_equal_accounts_point_to_the_past():
    assert "earlier verdicts had different bits" in explain([account(call())] * 2, 0)


def test_a_thousand_ranks_are_named_in_a_line():
    """Written out one by one they would fill a hundred kilobytes at 16,384."""
    rows = [account(call(scale=4.0 if rank == 341 else 8.0)) for rank in range(1_024)]

    assert "scale: 8.0 on ranks 0-340, 342-1023, 4.0 on rank 341;" in explain(rows, 0)
