"""What the host learns late: one iteration after it was made, and nothing twice."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from shardscale.ledger import Flags, Ledger, Unread
from shardscale.records import Agreement, Call, ScaleState


def agreement(found=0.0, drifted=0.0, faulted=0.0, wished=0.0, norm=math.nan):
    words = torch.zeros(2, dtype=torch.float64)
    return Agreement(torch.tensor([found, drifted, faulted, wished]), torch.tensor(norm), words)


def call(max_norm=None):
    one = torch.tensor(1.0)
    return Call(0, "step", 0, 0, max_norm, "p", ScaleState(one, one, one), one)


def turn(ledger, step, made, scale=8.0, next_scale=8.0, floor=None, max_norm=None):
    verdicts = [(a, call(max_norm)) for a in made]
    ledger.turn(step, torch.tensor(scale), torch.tensor(next_scale), verdicts, floor)


def test_an_iteration_whose_verdicts_were_read_is_reported_at_once():
    ledger, good = Ledger(), agreement(norm=2.0)
    ledger.note(Unread(good, call(1.0), None))

    assert ledger.read(good) == Flags(False, False, False, False)
    turn(ledger, 0, [good], max_norm=1.0)

    assert ledger.last_report[:5] == (0, 8.0, 8.0, False, 2.0)


def test_an_iteration_with_an_unread_verdict_is_reported_at_the_next_opening():
    ledger, bad = Ledger(), agreement(found=1.0)
    ledger.note(Unread(bad, call(), None))
    turn(ledger, 0, [bad], next_scale=4.0)

    assert ledger.last_report is None
    assert ledger.num_skipped == 1
    assert ledger.open(None) == []
    assert ledger.last_report.skipped and ledger.last_report.next_scale == 4.0
    assert ledger.num_skipped == 1
    assert ledger.num_skipped == 1


def test_one_drift_among_several_verdicts_is_kept():
    ledger, odd, good = Ledger(), agreement(found=1.0, drifted=1.0), agreement()
    for made in (odd, good):
        ledger.note(Unread(made, call(), None))
    turn(ledger, 0, [odd, good])

    assert [unread.agreement for unread in ledger.open(None)] == [odd]
    assert ledger.open(None) == []


def test_an_update_without_verdicts_leaves_no_report():
    ledger = Ledger()
    turn(ledger, 0, [])

    assert ledger.open(None) == []
    assert ledger.last_report is None


def skip_at_floor(ledger, times):
    for step in range(times):
        bad = agreement(found=1.0)
        ledger.read(bad)
        turn(ledger, step, [bad], scale=1.0, next_scale=1.0, floor=1.0)


def test_repeated_skips_at_the_floor_warn_once():
    ledger = Ledger()

    with pytest.warns(UserWarning, match="scaling is not the cause") as told:
        skip_at_floor(ledger, 10)

    assert len(told) == 1


def test_one_skip_at_the_floor_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        skip_at_floor(Ledger(), 1)


def test_a_wish_is_known_with_its_iteration_however_its_verdict_was_read():
    """Also that of a verdict which another one has taken the place of since."""
    for is_read in (True, False):
        ledger, first, second = Ledger(), agreement(wished=1.0), agreement()
        for made in (first, second):
            ledger.note(Unread(made, call(), None))
        ledger.read(second)
        if is_read:
            ledger.read(first)
        turn(ledger, 3, [second])
        ledger.open(None)
        turn(ledger, 4, [agreement(wished=1.0)])
        ledger.open(None)

        assert [ledger.knew_of_a_wish(step) for step in (2, 3, 4, 5)] == [False, False, True, True]


def test_a_verdict_is_not_taken_for_one_that_is_gone():
    """Python gives a new object the id of an old one that nobody holds any more."""
    ledger = Ledger()
    for i in range(100):
        found = agreement(found=float(i % 2))
        ledger.note(Unread(found, call(), None))
        assert ledger.read(found).found == bool(i % 2)
        del found
