"""A roll call over a store in this process: whose keys are read, and what if it does not answer."""

from __future__ import annotations

import threading
import time

import pytest
import torch.distributed as dist

from shardscale.comm import register, roll_call
from shardscale.comm.attendance import Crew, Place
from shardscale.comm.register import Register
from shardscale.comm.roll_call import RollCall

FIRST = Place(1, 0)


def one_of(store, rank=0, size=2):
    """A process that has joined."""
    mine = Register(rank, size)
    mine.join(store)
    return RollCall(Crew(rank, size, f"n{rank}"), mine, lambda: store, lambda: store)


def world(store, size=2):
    return [one_of(store, rank, size) for rank in range(size)]


def report(call, place=FIRST, timeout_s=0.0):
    return call.report(place, " within 9 s", timeout_s)


def leave_everything(call):
    """All that a rank can write."""
    call.look(FIRST, is_late=True)
    report(call)
    call.gather("something", 0.0)


def test_what_another_rank_has_written_is_read():
    mine, other = world(dist.HashStore())
    leave_everything(other)
    assert mine.look(FIRST, is_late=False)
    assert report(mine).startswith(
        "rank 0 of 2 (n0): verdict 1 (step 0) did not complete within 9 s. All ranks came"
    )
    assert mine.gather("mine", 0.0) == ["mine", "something"]


@pytest.mark.parametrize("size", [2, 3])
def test_what_an_earlier_world_has_written_is_not(size):
    """The store outlives the processes: torchrun starts them anew, or another number of them."""
    store = dist.HashStore()
    for call in world(store):
        leave_everything(call)
    mine = one_of(store, size=size)
    assert not mine.look(FIRST, is_late=False)
    others = "ranks 1, 2" if size == 3 else "rank 1"
    assert f"Did not come: {others}, never heard of." in report(mine)
    assert mine.gather("mine", 0.0) == ["mine"] + [None] * (size - 1)


def test_a_rank_that_has_joined_again_is_known_by_its_new_host(monkeypatch):
    store = dist.HashStore()
    world(store)
    monkeypatch.setattr(register.socket, "gethostname", lambda: "new")
    mine, _ = world(store)
    assert "Did not come: rank 1 (new), ready but never at a verdict." in report(mine)
    mine.last = FIRST
    assert "Did not come: rank 1 (new), last heard of at step 0." in report(mine, Place(2, 1))


def test_a_process_that_joins_during_a_roll_call_does_not_divide_the_others():
    """As where one rank is late to the first verdict, and another one is not there at all."""
    store = dist.HashStore()
    mine, other = one_of(store, 0, 4), one_of(store, 1, 4)
    told = []
    asking = threading.Thread(target=lambda: told.append(report(mine, timeout_s=30.0)))
    asking.start()
    wait_for(lambda: store.check(["shardscale/2/alarm"]))
    third, fourth = one_of(store, 2, 4), one_of(store, 3, 4)
    wait_for(lambda: other.look(FIRST, is_late=True))
    for call in (other, third, fourth):
        report(call)
    asking.join(30)
    assert "All ranks came" in told[0]


def test_who_joins_while_another_one_gathers_is_heard_however_short_the_time(monkeypatch):
    monkeypatch.setattr(roll_call, "_GLANCE_S", 60.0)
    store = dist.HashStore()
    mine = one_of(store, 0)
    heard = []
    gathering = threading.Thread(target=lambda: heard.extend(mine.gather("mine", 2.0)))
    gathering.start()
    wait_for(lambda: store.check(["shardscale/1/gather/1/0"]))
    one_of(store, 1).gather("other", 0.0)
    gathering.join(30)
    assert heard == ["mine", "other"]


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_late_mark_is_overwritten_by_the_next_one():
    store = dist.HashStore()
    mine, other = world(store)
    num_before = store.num_keys()
    for place in (Place(3, 2), Place(8, 7)):
        other.look(place, is_late=True)
    assert store.num_keys() == num_before + 1
    assert "Came, but no longer there: rank 1 (" in report(mine, Place(8, 7))


class Frozen(dist.Store):
    """A store whose host is stopped: it takes a request and does not answer before it goes on."""

    def __init__(self):
        super().__init__()
        self.inner, self.goes_on, self.num_requests = dist.HashStore(), threading.Event(), 0

    def _wait(self):
        self.num_requests += 1
        self.goes_on.wait(30)

    def check(self, keys):
        self._wait()
        return self.inner.check(keys)

    def set(self, key, value):
        self._wait()
        return self.inner.set(key, value)

    def get(self, key):
        self._wait()
        return self.inner.get(key)

    def add(self, key, amount):
        self._wait()
        return self.inner.add(key, amount)

    def multi_get(self, keys):
        self._wait()
        return self.inner.multi_get(keys)


@pytest.fixture
def hasty(monkeypatch):
    for name in ("_GLANCE_S", "_STORE_PATIENCE_S"):
        monkeypatch.setattr(roll_call, name, 0.05)
    monkeypatch.setattr(register, "_PATIENCE_S", 0.05)


@pytest.mark.usefixtures("hasty")
def test_a_store_that_does_not_answer_is_no_alarm_and_is_asked_only_once():
    """Its host may be stopped for a while, and each thread that asks it would stay there."""
    store = Frozen()
    store.goes_on.set()
    mine, other = world(store)
    store.goes_on.clear()
    num_before = store.num_requests
    assert [mine.look(FIRST, is_late=True) for _ in range(3)] == [False] * 3
    assert store.num_requests == num_before + 1
    store.goes_on.set()
    report(other)
    assert mine.look(FIRST, is_late=True)


@pytest.mark.usefixtures("hasty")
def test_a_report_does_not_wait_for_such_a_store_and_says_what_is_known_without_it():
    call = one_of(Frozen(), size=4)
    call.last = Place(8, 7)
    message = report(call, Place(9, 8))
    assert "Who is missing cannot be told: the store does not answer" in message
    assert "All 4 ranks were last heard of at step 7." in message


class Dead(dist.Store):
    """A store whose host is gone."""

    def __getattribute__(self, name):
        if name in ("add", "get", "set", "check"):
            raise dist.DistNetworkError("Connection reset by peer")
        return super().__getattribute__(name)


def test_a_store_that_is_gone_is_an_alarm_and_the_report_says_so():
    call = one_of(Dead())  # and no error yet
    assert call.look(FIRST, is_late=False)
    assert "the store does not answer (DistNetworkError: Connection reset by peer)" in report(call)
    assert "died with the rank that hosted it" in report(call)


def test_who_could_not_join_at_once_does_so_when_it_matters():
    """It must not take the number of an earlier world for its own."""
    store = dist.HashStore()
    world(store)
    mine = Register(0, 2)
    mine.join(Dead())  # and no error
    report(RollCall(Crew(0, 2, "n0"), mine, lambda: store, lambda: store))
    assert store.check(["shardscale/3/answer/0"])
    assert not store.check(["shardscale/2/answer/0"])
