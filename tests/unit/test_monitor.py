"""The watch over a stream, with events, a clock, a roll call and a group that stand in.

There is no GPU here, and where there is one its events cannot be told when to be over. The same
monitor on a real stream is in ``tests/gpu/test_monitor.py``, and with the store of several ranks in
``tests/ranks/test_late_verdicts.py``.
"""

from __future__ import annotations

import gc
import logging
import threading
import weakref

import pytest
import torch

from shardscale.comm import monitor as module
from shardscale.comm.attendance import Crew, Place
from shardscale.comm.monitor import Monitor

LIMIT_S = 60.0
OWN_GPU = "This rank's own GPU has not reached it"


class Event:
    """The stream has gone past it once ``is_over`` is set."""

    made: list[Event]

    def __init__(self, device):
        self.is_over, self.num_records, self.num_queries = False, 0, 0
        self.made.append(self)

    def record(self):
        self.num_records += 1
        self.is_over = False

    def query(self):
        self.num_queries += 1
        return self.is_over


class Clock:
    now = 1000.0

    def monotonic(self):
        return self.now


class Group:
    """Notes what is done to it, and to the roll call."""

    def __init__(self):
        self.crew = Crew(1, 4, "n2")
        self.last = None
        self.alarm = False
        self.done = []

    def look(self, place, is_late):
        self.done += [f"write {place.short}"] if is_late else []
        return self.alarm

    def report(self, place, how, timeout_s):
        self.done.append("call the roll")
        return f"{place} did not complete{how}. Did not come: rank 3."

    def abort(self):
        self.done.append("abort")


class Watch:
    """A monitor and all it knows, its thread asleep: the test looks when it likes."""

    def __init__(self):
        self.group, self.clock, self.is_destroyed = Group(), Clock(), False
        self.monitor = Monitor(torch.device("meta"), self.group, self.find)

    def find(self):
        return None if self.is_destroyed else self.group

    def verdict(self, number):
        """Launch a verdict; its two events."""
        with self.monitor.watch(Place(number, number - 1), LIMIT_S):
            pass
        last = self.monitor._under_way[-1]
        return last.before, last.after

    def look_after(self, age_s):
        self.clock.now += age_s
        return self.monitor.look()


@pytest.fixture
def watch(monkeypatch):
    Event.made = []
    watch = Watch()
    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(module, "time", watch.clock)
    monkeypatch.setattr(Monitor, "_start", lambda self: None)
    return watch


def test_a_verdict_in_time_costs_two_events_and_no_question(watch, caplog):
    for number in range(1, 100):
        for event in watch.verdict(number):
            event.is_over = True
        watch.look_after(0.01)
    assert len(Event.made) == 2  # those of the verdict before are over when the next begins
    assert watch.group.last == Place(98, 97)
    assert watch.look_after(LIMIT_S / 2 - 0.1) <= 1.0
    assert sum(event.num_queries for event in Event.made) == 98  # one as the next begins
    assert watch.group.done == []
    assert caplog.records == []


def test_a_rank_that_waits_inside_the_collective_writes_so_at_half_the_time(watch, caplog):
    before, _ = watch.verdict(37)
    before.is_over = True
    watch.look_after(LIMIT_S / 2 - 0.1)
    assert watch.group.done == []
    watch.look_after(0.2)
    assert watch.group.done == ["write step 36"]
    assert caplog.records == []


def test_a_rank_whose_own_gpu_is_late_writes_nothing_and_says_so_once(watch, caplog):
    before, _ = watch.verdict(37)
    for _ in range(5):
        watch.look_after(LIMIT_S / 6)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "rank 1 of 4 (n2): verdict 37 (step 36) takes 30 of at most 60 s" in record.getMessage()
    assert OWN_GPU in record.getMessage()
    assert watch.group.done == []
    before.is_over = True
    watch.monitor.look()
    assert watch.group.done == ["write step 36"]


def test_a_verdict_that_completes_late_does_no_harm(watch):
    before, after = watch.verdict(37)
    before.is_over = True
    watch.look_after(LIMIT_S * 0.9)
    after.is_over = True
    watch.look_after(LIMIT_S)
    assert watch.group.done == ["write step 36"]
    assert watch.monitor.finding is None
    assert watch.group.last == Place(37, 36)


def test_when_the_time_is_over_it_is_logged_then_kept_and_then_the_group_is_aborted(
    watch, monkeypatch
):
    before, _ = watch.verdict(37)
    before.is_over = True
    order = watch.group.done
    monkeypatch.setattr(module.logger, "error", lambda *_: order.append("log"))
    monkeypatch.setattr(
        watch.group, "abort", lambda: order.append(("abort", watch.monitor.finding))
    )
    assert watch.look_after(LIMIT_S) is None
    finding = (
        "verdict 37 (step 36) did not complete within 60 s. Did not come: rank 3. A rank that came "
        "less than 30 s ago may be named, too. The process group is aborted."
    )
    assert order == ["call the roll", "log", ("abort", finding)]


def test_a_rank_whose_own_gpu_is_late_to_the_end_blames_no_other(watch, caplog):
    watch.verdict(37)
    assert watch.look_after(LIMIT_S) is None
    assert watch.group.done == ["abort"]
    assert OWN_GPU in watch.monitor.finding
    assert "did not complete within 60 s" in watch.monitor.finding
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


def test_an_alarm_is_answered_before_the_own_time_is_over(watch):
    before, _ = watch.verdict(37)
    before.is_over = watch.group.alarm = True
    assert watch.look_after(LIMIT_S / 2) is None
    assert watch.group.done == ["write step 36", "call the roll", "abort"]


def test_the_verdict_that_hangs_is_the_oldest_of_those_launched(watch):
    """The host runs ahead, and launches verdicts behind one that hangs."""
    events = [watch.verdict(number) for number in (36, 37, 38)]
    for event in (*events[0], events[1][0]):
        event.is_over = True
    watch.look_after(LIMIT_S)
    assert watch.monitor.finding.startswith("verdict 37 (step 36)")
    assert watch.group.last == Place(36, 35)


def test_while_a_graph_is_captured_no_event_is_recorded_or_asked_for(watch, monkeypatch):
    watch.verdict(1)
    asked = [(event.num_records, event.num_queries) for event in Event.made]
    monkeypatch.setattr(module, "is_capturing", lambda device: True)
    with watch.monitor.watch(Place(2, 1), LIMIT_S):
        pass
    watch.look_after(LIMIT_S)
    assert [(event.num_records, event.num_queries) for event in Event.made] == asked
    assert watch.group.done == []


def test_a_destroyed_group_is_left_alone(watch):
    watch.verdict(1)
    watch.is_destroyed = True
    assert watch.look_after(LIMIT_S) is None
    assert watch.group.done == []


def test_a_group_that_is_destroyed_during_the_roll_call_is_not_aborted(watch, monkeypatch):
    before, _ = watch.verdict(1)
    before.is_over = True

    def report(*_):
        watch.is_destroyed = True
        return "late"

    monkeypatch.setattr(watch.group, "report", lambda *args, **kwargs: report())
    watch.look_after(LIMIT_S)
    assert watch.group.done == []


def test_a_device_that_has_failed_is_not_asked_again(watch, monkeypatch):
    watch.verdict(1)

    def fail(self):
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(Event, "query", fail)
    assert watch.look_after(LIMIT_S) is None
    assert watch.group.done == []


def test_a_verdict_that_could_not_be_launched_is_not_watched(watch):
    with pytest.raises(ZeroDivisionError), watch.monitor.watch(Place(1, 0), LIMIT_S):
        raise ZeroDivisionError
    assert watch.look_after(LIMIT_S) <= 1.0
    assert watch.group.done == []


def test_an_event_used_before_does_not_speak_for_a_verdict_still_being_launched(watch):
    """The host may wait inside the launch: a first call of NCCL meets the others there."""
    for event in watch.verdict(1):
        event.is_over = True
    with watch.monitor.watch(Place(2, 1), LIMIT_S):
        reused = watch.monitor._under_way[-1]
        assert reused.after.is_over
        reused.before.is_over = True
        watch.look_after(LIMIT_S / 2)
        assert watch.group.done == ["write step 1"]


def test_the_thread_keeps_neither_the_monitor_nor_the_process(monkeypatch):
    """It is started by the first verdict, and again where a fork has left it behind."""
    Event.made = []
    monkeypatch.setattr(torch, "Event", Event)
    group = Group()
    monitor = Monitor(torch.device("meta"), group, lambda: group)
    assert monitor._thread is None
    for _ in range(2):
        with monitor.watch(Place(1, 0), LIMIT_S):
            pass
        thread = monitor._thread
        assert thread.is_alive() and thread.daemon
    monitor._thread = threading.Thread()  # not alive, as after a fork
    with monitor.watch(Place(2, 1), LIMIT_S):
        pass
    threads = [thread, monitor._thread]
    gone = weakref.ref(monitor)
    del monitor
    gc.collect()
    assert gone() is None
    for each in threads:
        each.join(10)
        assert not each.is_alive()
