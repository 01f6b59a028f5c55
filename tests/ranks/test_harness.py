"""The harness: results in rank order, failures told in full, nothing left for the next case."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks.rank import log, outcome, scratch, store
from tests.ranks.report import RanksFailed, Signal


def sum_of_ranks(rank, size):
    total = torch.tensor([float(rank)])
    dist.all_reduce(total)
    return rank, size, total.item(), os.getpid()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("store_kind", ["file", "tcp", "counting"])
def test_results_come_in_rank_order_from_as_many_processes(ranks, size, store_kind):
    results = ranks.run(sum_of_ranks, size, store=store_kind)
    assert [r[:3] for r in results] == [(rank, size, sum(range(size))) for rank in range(size)]
    assert len({r[3] for r in results} | {os.getpid()}) == size + 1


def leave_traces(rank, size):
    found = (
        getattr(torch, "left_behind", None),
        dist.is_initialized(),
        torch.rand(1).item(),
        "RANK" in os.environ,
    )
    torch.left_behind = rank
    os.environ["RANK"] = str(rank)
    return found


def test_no_state_passes_from_one_case_to_the_next(ranks):
    first, second = ranks.run(leave_traces, 2), ranks.run(leave_traces, 2)
    assert first == second
    assert [found[0] for found in first] == [None, None]


def test_a_case_can_run_without_a_process_group(ranks):
    assert [found[1] for found in ranks.run(leave_traces, 2, backend=None)] == [False, False]


def one_rank_raises(rank, size):
    print(f"printed by {rank}")
    log(f"logged by {rank}")
    if rank == 1:
        raise KeyError("only here")
    return rank


def test_a_failure_shows_every_rank(ranks):
    with pytest.raises(RanksFailed) as caught:
        ranks.run(one_rank_raises, 3)
    message = str(caught.value)
    assert "rank 1: raised" in message
    assert "KeyError: 'only here'" in message
    assert "one_rank_raises" in message
    assert "rank 0: returned" in message
    assert "rank 2: returned" in message
    assert all(
        f"{verb} by {rank}" in message for verb in ("printed", "logged") for rank in range(3)
    )


def one_rank_never_comes(rank, size):
    if rank != 1:
        dist.all_reduce(torch.ones(1))


def test_a_case_over_its_limit_is_killed_and_each_rank_says_where_it_was(ranks):
    started = time.monotonic()
    with pytest.raises(RanksFailed) as caught:
        ranks.run(stand_still, 2, limit_s=1.0)
    assert time.monotonic() - started < 10
    message = str(caught.value)
    assert message.count("still running when the time was up") == 2
    assert "in wait_for_nobody" in message
    assert "in all_reduce" in message


def stand_still(rank, size):
    dist.all_reduce(torch.ones(1)) if rank else wait_for_nobody()


def wait_for_nobody():
    store().wait(["never set"])


def test_ranks_waiting_for_one_that_failed_do_not_use_up_the_limit(ranks, monkeypatch):
    started = time.monotonic()
    with pytest.raises(RanksFailed, match="ZeroDivisionError"):
        ranks.run(fail_while_others_wait, 2, group_timeout_s=60)
    assert time.monotonic() - started < 15


def fail_while_others_wait(rank, size):
    1 / 0 if rank == 0 else dist.all_reduce(torch.ones(1))


def test_the_pool_works_after_all_of_that(ranks):
    assert len(ranks.run(sum_of_ranks, 4)) == 4


def die_in_turn(rank, size):
    log("alive")
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    if rank == 2:
        raise LookupError("raised")
    return "returned"


def test_spawn_reports_how_each_rank_ended(ranks):
    killed, stopped, raised, returned = ranks.spawn(die_in_turn, 4, backend=None)
    assert (killed.exit_code, killed.result, killed.lines) == (-signal.SIGKILL, None, ["alive"])
    assert (stopped.exit_code, stopped.lines) == (-signal.SIGSTOP, ["alive"])
    assert raised.exit_code == 0
    assert "LookupError: raised" in raised.error
    assert (returned.exit_code, returned.result, returned.error) == (0, "returned", None)


def count_until_killed(rank, size):
    for number in range(10_000_000):
        log(str(number))
        if rank == 1 and (scratch() / "rank0.log").read_text().count("\n") == 0:
            raise AssertionError("the ranks of one case share a folder")
        if rank == 1:
            return number
    return None


def test_a_signal_from_outside_waits_for_the_log_line_it_is_addressed_to(ranks):
    killed, _other = ranks.spawn(
        count_until_killed, 2, signals=[Signal(0, signal.SIGKILL, after_lines=25)]
    )
    assert killed.exit_code == -signal.SIGKILL
    assert len(killed.lines) >= 25
    assert killed.lines[:25] == [str(number) for number in range(25)]


def failing_outcomes(rank, size):
    return (
        outcome(lambda: 7),
        outcome(lambda: {}["missing"]),
        outcome(lambda: dist.all_reduce("no tensor")),
    )


def test_outcomes_hold_a_value_or_an_error_with_its_base_classes(ranks):
    for good, missing, refused in ranks.run(failing_outcomes, 2):
        assert (good.value, good.error) == (7, None)
        assert (missing.error, missing.message) == ("KeyError", "'missing'")
        assert "LookupError" in missing.kinds
        assert refused.error == "TypeError"


def unpicklable(rank, size):
    return lambda: None


def test_a_result_that_cannot_be_pickled_is_reported_as_that(ranks):
    with pytest.raises(RanksFailed, match="pickle"):
        ranks.run(unpicklable, 1)
