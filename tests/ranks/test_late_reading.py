"""What the host learns late: at one call on every rank, and without a word on one rank alone."""

from __future__ import annotations

import math

import pytest
import torch

from shardscale import ShardedGradScaler
from tests.ranks.rank import outcome

SCALE = 4.0


def make(fused):
    p = torch.nn.Parameter(torch.ones(3))
    return p, torch.optim.SGD([p], lr=0.5, fused=fused)


def disagree_once(rank, size, sync):
    """In the third iteration rank 1 has another scale; at which call each rank hears of it."""
    p, optimizer = make(fused=True)
    scaler = ShardedGradScaler("cpu", init_scale=SCALE, sync=sync)
    for iteration in range(5):
        if iteration == 2 and rank == 1:
            scaler._scale.fill_(2 * SCALE)
        p.grad = torch.full_like(p, scaler.get_scale())
        for name, call in (("step", lambda: scaler.step(optimizer)), ("update", scaler.update)):
            found = outcome(call)
            if found.error is not None:
                return iteration, name, found.error, found.message, p.tolist()
    return None


@pytest.mark.parametrize(("sync", "at"), [(False, (3, "update")), (True, (2, "step"))])
@pytest.mark.parametrize("size", [2, 3])
def test_a_verdict_nobody_read_surfaces_at_the_next_update_of_every_rank(ranks, size, sync, at):
    """With ``sync=True`` at once. The parameters have stopped moving at the same step."""
    for iteration, call, error, message, values in ranks.run(disagree_once, size, sync=sync):
        assert (iteration, call) == at
        assert error == "DisagreementError"
        assert "8.0 on rank 1" in message
        assert values == [0.0] * 3


def report_on_one(rank, size, fused):
    """Only rank 1 ever asks for a report, in the midst of the calls of all."""
    p, optimizer = make(fused)
    scaler = ShardedGradScaler("cpu", init_scale=SCALE)
    reports = []

    def ask():
        if rank == 1:
            reports.append(scaler.last_report())

    for iteration in range(3):
        is_bad = iteration == 1 and rank == 0
        p.grad = torch.full_like(p, math.inf if is_bad else scaler.get_scale())
        scaler.step(optimizer)
        ask()
        scaler.update()
        ask()
    told = [r and (r.step, r.skipped, r.scale, r.next_scale) for r in reports]
    return told, p.tolist()


@pytest.mark.parametrize("fused", [False, True])
def test_one_rank_alone_may_ask_for_the_last_report(ranks, fused):
    """It learns of a skip that another rank caused, as late as everybody."""
    good, bad, last = (0, False, 4.0, 4.0), (1, True, 4.0, 2.0), (2, False, 2.0, 2.0)
    expected = [None, good, good, bad, bad, last]
    if fused:
        expected = [None, None, None, good, good, bad]
    (silent, values), (told, other_values), _ = ranks.run(report_on_one, 3, fused=fused)
    assert silent == []
    assert told == expected
    assert values == other_values == [0.0] * 3


def count_skips(rank, size):
    """Five fused iterations, of which two are skipped; what one state_dict holds after each."""
    p, optimizer = make(fused=True)
    scaler = ShardedGradScaler("cpu", init_scale=SCALE)
    counts = []
    for iteration in range(5):
        is_bad = iteration in (1, 3) and rank == iteration % size
        p.grad = torch.full_like(p, math.nan if is_bad else scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
        counts.append(dict(scaler.state_dict()["shardscale"])["num_skipped"])
    return counts


def test_a_saved_count_is_never_late(ranks):
    """A resumed run must go on as the unbroken one would have."""
    assert ranks.run(count_skips, 2) == [[0, 1, 1, 2, 2]] * 2
