"""A rank that does not come is named by all who waited for it, whatever became of it."""

from __future__ import annotations

import itertools
import math
import os
import re
import signal
import socket
from functools import partial

import pytest
import torch
import torch.distributed as dist

from shardscale import ShardedGradScaler
from tests.ranks.rank import log, outcome
from tests.ranks.report import Signal

TIMEOUT_S = 2.0
HOST = socket.gethostname()


def make(fused=False, **options):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([p], lr=0.5, fused=fused)
    return p, optimizer, ShardedGradScaler("cpu", init_scale=1024.0, **options)


def one_iteration(p, optimizer, scaler, grad=1.0):
    scaler.scale(torch.ones(()))
    p.grad = torch.full_like(p, grad * 1024.0)
    scaler.step(optimizer)
    scaler.update()


# -------------------------------------------------------------------------------------- never comes


def last_rank_stays_away(rank, size, num_good, fused):
    if rank == size - 1 and num_good == 0:
        return None
    p, optimizer, scaler = make(fused, timeout_s=TIMEOUT_S)
    for _ in range(num_good):
        one_iteration(p, optimizer, scaler)
    if rank == size - 1:
        return None
    before = p.tolist()
    found = outcome(lambda: one_iteration(p, optimizer, scaler))
    return found.error, found.kinds, found.message, p.tolist() == before


@pytest.mark.parametrize(("num_good", "fused"), [(0, False), (2, True)])
def test_every_rank_that_waited_names_the_one_that_did_not_come(ranks, num_good, fused):
    """At the first verdict it may be a rank that was never meant to train: the error says so."""
    found = ranks.run(last_rank_stays_away, 3, num_good=num_good, fused=fused)
    assert found.pop() is None
    # The first one to give up may take the others with it, by its alarm or its connection.
    assert any("did not complete within 2 s." in message for _, _, message, _ in found)
    for rank, (error, kinds, message, unmoved) in enumerate(found):
        assert error == "MissingRankError"
        assert "TimeoutError" in kinds
        assert unmoved
        here = f"verdict {num_good + 1} (step {num_good})"
        assert f"rank {rank} of 3 ({HOST}): {here} did not complete" in message
        absent = (
            f"rank 2 ({HOST}), last heard of at step 1" if num_good else "rank 2, never heard of"
        )
        assert f"Did not come: {absent}." in message
        assert f"Came: rank {1 - rank} ({HOST}) at step {num_good}." in message
        assert ("process_group=" in message) == (num_good == 0)


# ---------------------------------------------------------------------------------- killed, stopped


def train_until_it_ends(rank, size, fused, bad_every=5):
    """A log line a step, on the disk before the next one begins; every fifth step overflows
    somewhere."""
    p, optimizer, scaler = make(fused, timeout_s=TIMEOUT_S)
    for step in itertools.count():
        bad = step % bad_every == 3 and rank == step % size
        grad = math.inf if bad else step % 3
        found = outcome(partial(one_iteration, p, optimizer, scaler, grad))
        if found.error is not None:
            return found.error, found.message
        log(f"{step} {scaler.get_scale()} {p.tolist()}")
    raise AssertionError("unreachable")


def assert_one_history(reports):
    """No two ranks hold different entries for one step; nobody is more than a step ahead.

    The killed rank counts too: what it wrote before the signal, others have decided alike.
    """
    logs = [report.lines for report in reports]
    for entries in itertools.zip_longest(*logs):
        assert len({entry for entry in entries if entry is not None}) == 1
    assert max(map(len, logs)) - min(map(len, logs)) <= 1


def assert_last_heard_of(rank, reports, message):
    """By name, host and step: one that it took part in, and as many as it can prove."""
    told = re.search(
        rf"Did not come: rank {rank} \({HOST}\), last heard of at step (\d+)\.", message
    )
    assert told, message
    num_steps = max(len(report.lines) for report in reports)
    assert num_steps - 2 <= int(told[1]) <= num_steps


@pytest.mark.parametrize(("size", "fused"), [(3, False), (4, True)])
def test_survivors_of_a_kill_share_one_history_and_name_the_dead(ranks, size, fused):
    """The signal comes from outside, after 40 steps, wherever in a step the rank then is."""
    reports = ranks.spawn(
        train_until_it_ends, size, fused=fused, signals=[Signal(1, signal.SIGKILL, after_lines=40)]
    )
    assert reports[1].exit_code == -signal.SIGKILL
    assert len(reports[1].lines) >= 40
    assert_one_history(reports)
    for report in reports[:1] + reports[2:]:
        assert report.error is None
        error, message = report.result
        assert error == "MissingRankError"
        assert_last_heard_of(1, reports, message)


def test_survivors_of_a_stop_share_one_history_and_name_the_stopped(ranks):
    """A stopped process keeps its connections open: only the time tells."""
    reports = ranks.spawn(
        train_until_it_ends, 3, fused=False, signals=[Signal(2, signal.SIGSTOP, after_lines=40)]
    )
    assert reports[2].exit_code == -signal.SIGSTOP
    assert_one_history(reports)
    for report in reports[:2]:
        error, message = report.result
        assert error == "MissingRankError"
        assert_last_heard_of(2, reports, message)


def test_if_the_store_died_with_its_rank_the_error_says_so(ranks):
    reports = ranks.spawn(
        train_until_it_ends,
        3,
        fused=False,
        store="tcp",
        signals=[Signal(0, signal.SIGKILL, after_lines=40)],
    )
    assert reports[0].exit_code == -signal.SIGKILL
    assert_one_history(reports)
    for report in reports[1:]:
        error, message = report.result
        assert error == "MissingRankError"
        assert "the store does not answer" in message
        assert "rank 0" in message
        assert re.search(r"All 3 ranks were last heard of at step \d+\.", message)


def killed_inside_the_optimizer(rank, size):
    """The middle rank dies after its verdict and before its parameters have moved."""
    p, optimizer, scaler = make(timeout_s=TIMEOUT_S)
    one_iteration(p, optimizer, scaler)
    log(str(p.tolist()))
    if rank == 1:
        optimizer.register_step_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    one_iteration(p, optimizer, scaler)
    log(str(p.tolist()))
    return outcome(lambda: one_iteration(p, optimizer, scaler)).error


def test_a_rank_killed_between_verdict_and_update_is_missed_at_the_next_verdict(ranks):
    survivor, killed, other = ranks.spawn(killed_inside_the_optimizer, 3)
    assert killed.exit_code == -signal.SIGKILL
    assert killed.lines == ["[0.5, 0.5, 0.5]"]
    assert survivor.lines == other.lines == ["[0.5, 0.5, 0.5]", "[0.0, 0.0, 0.0]"]
    assert survivor.result == other.result == "MissingRankError"


# --------------------------------------------------------------------------------- not in its group


def step_after_the_group_is_gone(rank, size):
    p, optimizer, scaler = make()
    one_iteration(p, optimizer, scaler)
    dist.destroy_process_group()
    before = p.tolist()
    found = outcome(lambda: one_iteration(p, optimizer, scaler))
    return found.error, found.message, p.tolist() == before


def test_a_scaler_whose_group_was_destroyed_says_what_to_do(ranks):
    """It must neither crash inside torch nor go on alone: alone, each rank would decide for
    itself."""
    for error, message, unmoved in ranks.run(step_after_the_group_is_gone, 2):
        assert error == "StageError"
        assert "destroyed" in message
        assert "scaler" in message
        assert unmoved


def make_in_a_group_of_two(rank, size):
    group = dist.new_group([0, 2])
    return outcome(lambda: make(process_group=group) and None)[1:]


def test_a_group_this_rank_is_no_member_of_is_refused_at_construction(ranks):
    """torch's collectives silently do nothing there: each rank outside would decide alone."""
    member, outsider, other = ranks.run(make_in_a_group_of_two, 3)
    assert member[0] is None
    assert other[0] is None
    error, kinds, message = outsider
    assert error == "ConfigError"
    assert {"ValueError", "AssertionError"} <= set(kinds)
    assert "rank 1" in message
    assert "member" in message
