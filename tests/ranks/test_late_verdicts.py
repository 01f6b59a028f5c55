"""What is written when a verdict is late, what is not when it is in time, and who reads it."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from functools import partial
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_process_group_store

from shardscale import ShardedGradScaler
from shardscale.comm import ProcessGroupComm
from shardscale.comm.attendance import Place
from shardscale.comm.monitor import Monitor
from shardscale.comm.process_group import _roll_call_of
from tests.ranks import accelerator
from tests.ranks.rank import outcome, scratch, store
from tests.ranks.test_missing_rank import make, one_iteration

TIMEOUT_S = 2.0
HOST = socket.gethostname()


def wait_for(condition, what, limit_s=20.0):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


# --------------------------------------------------------------------------------------- good steps


def count_requests(rank, size):
    p, optimizer, scaler = make()
    other = make(fused=True)
    made = list(store().requests)
    store().requests.clear()
    for step in range(20):
        one_iteration(p, optimizer, scaler, float("inf") if step == 5 else 1.0)
        one_iteration(*other)
    return made, store().requests


def test_good_steps_and_skips_ask_nothing_of_the_store(ranks):
    """Once, before the first of them, each process has entered itself and its host."""
    for rank, (made, asked) in enumerate(ranks.run(count_requests, 2, store="counting")):
        ours = [(how, key.partition("shardscale/")[2]) for how, key in made if "shardscale" in key]
        assert ours == [("add", "joined"), ("set", f"host/{rank}")]
        assert asked == []


# -------------------------------------------------------------------------------- late, and in time


def is_written(what):
    world = dist.group.WORLD
    return _get_process_group_store(world).check([f"shardscale/{world.size()}/{what}"])


def let_go_on_once_all_wait(pid, waiting):
    """The stopped rank is late only when the others have written so."""
    for rank in waiting:
        wait_for(partial(is_written, f"late/{rank}"), f"rank {rank} did not write that it waits")
    os.kill(pid, signal.SIGCONT)


def stopped_for_a_while(rank, size):
    """Rank 1 stops before its verdict of step 3 and goes on in time; rank 2 makes five of six."""
    p, optimizer, scaler = make(timeout_s=1.5 * TIMEOUT_S)
    for step in range(5):
        if step == 3 and rank == 1:
            (scratch() / "pid").write_text(str(os.getpid()))
            os.rename(scratch() / "pid", scratch() / "stopped")
            os.kill(os.getpid(), signal.SIGSTOP)
        if step == 3 and rank == 0:
            wait_for((scratch() / "stopped").exists, "rank 1 did not come to its step")
            pid = int((scratch() / "stopped").read_text())
            threading.Thread(target=let_go_on_once_all_wait, args=(pid, (0, 2))).start()
        one_iteration(p, optimizer, scaler, grad=float(step))
    values = p.tolist()
    wrote_late = [is_written(f"late/{r}") for r in range(3)]
    p, optimizer, hasty = make(timeout_s=TIMEOUT_S / 2)
    if rank == 2:
        return values, wrote_late, None
    return values, wrote_late, outcome(lambda: one_iteration(p, optimizer, hasty)).message


def test_a_rank_stopped_and_let_go_on_in_time_changes_nothing_and_confuses_nobody(ranks):
    """Rank 2 wrote that it waits for rank 1. That is over, and no sign of it two steps later."""
    reports = ranks.spawn(stopped_for_a_while, 3)
    assert [report.error for report in reports] == [None] * 3
    for rank, report in enumerate(reports):
        values, wrote_late, message = report.result
        assert values == [1.0 - 0.5 * sum(range(5))] * 3
        assert wrote_late == [True, False, True]
        if rank < 2:
            assert f"rank {rank} of 3 ({HOST}): verdict 6 (step 0) did not complete" in message
            assert f"Did not come: rank 2 ({HOST}), last heard of at step 4." in message
            assert f"Came: rank {1 - rank} ({HOST}) at step 0." in message


# ------------------------------------------------------------------------------------ smaller group


def miss_one_of_a_smaller_group(rank, size):
    group = dist.new_group([1, 2])
    if rank == 0:
        return None
    p, optimizer, scaler = make(process_group=group, timeout_s=TIMEOUT_S / 2)
    one_iteration(p, optimizer, scaler)
    if rank == 2:
        return None
    return outcome(lambda: one_iteration(p, optimizer, scaler)).message


def test_in_a_smaller_group_the_ranks_are_named_by_both_their_numbers(ranks):
    _, message, _ = ranks.run(miss_one_of_a_smaller_group, 3)
    assert f"rank 0 of 2 (rank 1 of the job, {HOST}): verdict 2 (step 1)" in message
    assert f"Did not come: rank 1 (rank 2 of the job, {HOST}), last heard of at step 0." in message


# ----------------------------------------------------------------------------- the host has gone on


class Passed:
    """An event that the stream has gone past; there is no stream here, so events stand in."""

    def record(self):
        pass

    def query(self):
        return True


class Ahead(Passed):
    """One that it never comes to."""

    def query(self):
        return False


def watch_a_verdict(rank, size):
    """Each rank's own monitor and thread; rank 2's device never gets as far as the collective.

    Rank 1 has more time, which is not over yet when it has to answer rank 0.
    """
    world = dist.group.WORLD
    events = (Ahead(), Ahead()) if rank == 2 else (Passed(), Ahead())
    Monitor._fresh = lambda self: events
    aborted = threading.Event()
    group = SimpleNamespace(abort=aborted.set)
    ProcessGroupComm(world)  # joins the job
    monitor = Monitor(torch.device("meta"), _roll_call_of(world, is_host=False), lambda: group)
    limit_s = TIMEOUT_S * (1.5 if rank == 1 else 1)
    with monitor.watch(Place(37, 36), limit_s):
        pass
    assert aborted.wait(20)
    return monitor.finding


def test_a_monitor_names_the_rank_whose_device_did_not_come(ranks):
    *waiting, late = ranks.run(watch_a_verdict, 3)
    for rank, finding in enumerate(waiting):
        assert f"rank {rank} of 3 ({HOST}): verdict 37 (step 36) did not complete" in finding
        assert f"Did not come: rank 2 ({HOST})" in finding
        assert f"Came: rank {1 - rank} ({HOST}) at step 36." in finding
    assert "within 2 s" in waiting[0]
    assert "another rank gave up" in waiting[1]
    assert "This rank's own GPU has not reached it" in late
    assert "Did not come" not in late


def hang_on_a_device(rank, size):
    """The transport of the stand-in never sums, and its host goes on, as with NCCL."""
    accelerator.install()
    group = dist.new_group(backend=f"cpu:gloo,{accelerator.NAME}:{accelerator.TRANSPORT}")
    if rank == 1:
        return None
    calls = []
    done = torch.futures.Future()
    done.set_result(None)
    work = torch._C._distributed_c10d._create_work_from_future(done)
    accelerator._Transport.allreduce = lambda *args: calls.append("sum") or work
    accelerator._Transport.abort = lambda self: calls.append("abort")
    Monitor._fresh = lambda self: (Passed(), Ahead())
    p = torch.nn.Parameter(torch.ones(3, device=accelerator.NAME))
    optimizer = torch.optim.SGD([p], lr=0.5, fused=True)
    scaler = ShardedGradScaler(accelerator.NAME, process_group=group, timeout_s=TIMEOUT_S / 2)
    p.grad = torch.ones_like(p)
    scaler.step(optimizer)
    wait_for(lambda: "abort" in calls, "the group was not aborted")
    comm = ProcessGroupComm(group)
    scaler.update()
    with accelerator.counted_waits() as waits:
        after = [
            outcome(lambda: scaler.step(optimizer)),
            outcome(lambda: comm.all_reduce_sum_(torch.zeros(2, dtype=torch.float64))),
            outcome(lambda: comm.all_gather_object("here")),
        ]
    return calls, [(each.error, each.message) for each in after], waits[0], p.tolist()


def test_what_the_monitor_has_found_is_raised_by_whatever_is_called_next(ranks):
    """Nothing is sent any more, and nothing waits for a device that may never be done."""
    (calls, after, num_waits, values), _ = ranks.run(hang_on_a_device, 2)
    assert calls == ["sum", "abort"]
    assert len(set(after)) == 1
    error, message = after[0]
    assert error == "MissingRankError"
    assert "Did not come: rank 1, never heard of." in message
    assert num_waits == 0
    assert values == [1.0] * 3
