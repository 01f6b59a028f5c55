"""A roll call over a store in this process: whose keys are read, and what if it does not answer."""

from __future__ import annotations

import threading

import pytest
import torch.distributed as dist

from shardscale.comm import incarnation, roll_call
from shardscale.comm.attendance import Crew, Place
from shardscale.comm.roll_call import RollCall, introduce, prefix_of_world

FIRST = Place(1, 0)


@pytest.fixture(autouse=True)
def not_by_init_distributed(monkeypatch):
    monkeypatch.setattr(incarnation, "_name", None)


def one_of(store, rank=0, size=2):
    return RollCall(
        Crew(rank, size, f"n{rank}"), prefix_of_world(size), lambda: store, lambda: store
    )


def report(call, place=FIRST):
    return call.report(place, " within 9 s", timeout_s=0.0)  # and nobody waits for the others


def leave_everything(store, size):
    """All that a rank 1 can write."""
    introduce(store, prefix_of_world(size), 1)
    call = one_of(store, 1, size)
    call.write_late(FIRST)
    report(call)
    call.gather("something", 0.0)


def test_what_another_rank_has_written_is_read():
    store = dist.HashStore()
    leave_everything(store, size=2)
    assert one_of(store).is_alarmed()
    assert report(one_of(store)).startswith(
        "rank 0 of 2 (n0): verdict 1 (step 0) did not complete within 9 s. All ranks came"
    )


@pytest.mark.parametrize(("attempt", "size"), [("1", 2), ("0", 3)])
def test_what_an_earlier_world_has_written_is_not(attempt, size, monkeypatch):
    """The store outlives the processes: torchrun starts them anew, or another number of them."""
    store = dist.HashStore()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    leave_everything(store, size=2)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
    assert not one_of(store, size=size).is_alarmed()
    others = "ranks 1, 2" if size == 3 else "rank 1"
    assert f"Did not come: {others}, never heard of." in report(one_of(store, size=size))
    heard = one_of(store, size=size).gather("mine", 0.0)
    assert heard == ["mine"] + [None] * (size - 1)


def test_nodes_that_count_restarts_for_themselves_share_their_keys(monkeypatch):
    """As torchrun's do. What all ranks agree on is the name that ``init_distributed`` gave them."""

    def prefixes():
        incarnation.assemble(dist.HashStore(), 0, 1, 1.0, "", "".join)
        for count in "01":
            monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
            yield prefix_of_world(4)

    before, after = set(prefixes()), set(prefixes())
    assert len(before) == len(after) == 1
    assert before != after


def test_a_late_mark_is_overwritten_by_the_next_one():
    store = dist.HashStore()
    for place in (Place(3, 2), Place(8, 7)):
        one_of(store, 1).write_late(place)
    assert store.num_keys() == 1
    assert "Came, but no longer there: rank 1." in report(one_of(store), Place(8, 7))


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

    def multi_get(self, keys):
        self._wait()
        return self.inner.multi_get(keys)


@pytest.fixture
def hasty(monkeypatch):
    for name in ("_GLANCE_S", "_STORE_PATIENCE_S"):
        monkeypatch.setattr(roll_call, name, 0.05)


@pytest.mark.usefixtures("hasty")
def test_a_store_that_does_not_answer_is_no_alarm_and_is_asked_only_once():
    """Its host may be stopped for a while, and each thread that asks it would stay there."""
    store = Frozen()
    call = one_of(store)
    assert [call.is_alarmed() for _ in range(3)] == [False] * 3
    call.write_late(FIRST)
    assert store.num_requests == 1
    store.goes_on.set()
    report(one_of(store.inner, 1))
    assert call.is_alarmed()


@pytest.mark.usefixtures("hasty")
def test_a_report_does_not_wait_for_such_a_store_and_says_what_is_known_without_it():
    call = one_of(Frozen(), size=4)
    call.last = Place(8, 7)
    message = report(call, Place(9, 8))
    assert "Who is missing cannot be told: the store does not answer" in message
    assert "All 4 ranks were last heard of at step 7." in message


class Dead(dist.Store):
    """A store whose host is gone."""

    def check(self, keys):
        raise dist.DistNetworkError("Connection reset by peer")

    def set(self, key, value):
        raise dist.DistNetworkError("Connection reset by peer")


def test_a_store_that_is_gone_is_an_alarm_and_the_report_says_so():
    call = one_of(Dead())
    assert call.is_alarmed()
    assert "the store does not answer (DistNetworkError: Connection reset by peer)" in report(call)
    assert "died with the rank that hosted it" in report(call)


def test_a_host_that_cannot_be_written_is_no_error():
    introduce(Dead(), "job", 0)
