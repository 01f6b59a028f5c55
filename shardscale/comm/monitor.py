"""Watches verdicts that an accelerator's stream waits for, while the host has gone on.

Not yet run on more than one GPU; what several ranks do is tested on stand-ins.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from shardscale.capturing import is_capturing
from shardscale.comm.attendance import Place
from shardscale.comm.roll_call import GIVEN_UP, RollCall

__all__ = ["Monitor"]

logger = logging.getLogger(__name__)

_PAUSE_S = 1.0  # between two looks of the thread; a look at what is not late costs nothing
_NOT_REACHED = (
    "This rank's own GPU has not reached it: something launched before it has not ended, perhaps a "
    "collective of another group. Others may be waiting for this rank."
)


class Monitor:
    """One for each group whose sums run on an accelerator.

    A verdict costs two events and an entry in a queue. A daemon thread looks once a second how old
    the oldest entry is. Only when half of its time is over it asks for the events. If the stream
    waits inside the collective, it writes so to the store; if the stream has not come that far, the
    delay is this rank's own, and it is logged. When the time is over it logs who did not write and
    aborts the group, so that the host comes back from whatever it does with the stream; the next
    call of the communicator raises what was logged. A sum that was never made reads as a
    disagreement, so nothing moves on one.

    Verdicts inside a captured graph are not watched: Python does not see their replays.

    Args:
        device: Where the sums run.
        roll_call: The group's.
        find_group: Gives the group, or None when it has been destroyed.
    """

    def __init__(
        self,
        device: torch.device,
        roll_call: RollCall,
        find_group: Callable[[], dist.ProcessGroup | None],
    ) -> None:
        self.finding: str | None = None  # why the group was aborted
        self._device = device
        self._roll_call = roll_call
        self._find_group = find_group
        self._lock = threading.Lock()  # of the next two, for no longer than a query takes
        self._under_way: deque[_Watched] = deque()
        self._spare: list[tuple[torch.Event, torch.Event]] = []
        self._pause_s = _PAUSE_S
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        weakref.finalize(self, self._stop.set)  # when nobody uses it any more, and at exit

    @contextmanager
    def watch(self, place: Place, limit_s: float) -> Iterator[None]:
        """Watch what is launched within.

        Args:
            place: The verdict.
            limit_s: Seconds from now that it may take.

        Sync: none.
        """
        if is_capturing(self._device):
            with self._lock:  # an event may not be asked for while a graph is captured
                self._spare += [(one.before, one.after) for one in self._under_way]
                self._under_way.clear()
            yield
            return
        with self._lock:
            self._retire()
            before, after = self._spare.pop() if self._spare else self._fresh()
            watched = _Watched(place, limit_s, time.monotonic(), before, after)
            before.record()
            self._under_way.append(watched)
        self._pause_s = min(self._pause_s, limit_s / 8)
        self._start()
        try:
            yield
        except BaseException:
            with self._lock:
                self._under_way.remove(watched)
            raise
        watched.after.record()
        watched.is_launched = True

    def look(self) -> float | None:
        """Look at the oldest verdict under way.

        Returns:
            Seconds until the next look; None where there will be nothing to look at.
        """
        if self._find_group() is None:
            return None
        with self._lock:
            try:
                if self._is_late():
                    self._retire()
                if not self._is_late():
                    return self._pause_s
                late = self._under_way[0]
                is_reached = late.before.query()
            except RuntimeError:  # the device has failed; the host will find out by itself
                return None
        return self._ask_others(late) if is_reached else self._blame_itself(late)

    def _ask_others(self, late: _Watched) -> float | None:
        """The stream waits inside the collective."""
        if late.age_s >= late.limit_s:
            how = f" within {late.limit_s:g} s"
        elif self._roll_call.look(late.place, is_late=True):
            how = f" ({GIVEN_UP})"
        else:
            return self._pause_s
        finding = self._roll_call.report(late.place, how, late.limit_s)
        half_s = late.limit_s / 2  # before that, their monitors do not look
        self._give_up(f"{finding} A rank that came less than {half_s:g} s ago may be named, too.")
        return None

    def _blame_itself(self, late: _Watched) -> float | None:
        """The stream has not come as far as the collective."""
        what = f"{self._roll_call.crew.myself}: {late.place}"
        if late.age_s >= late.limit_s:
            self._give_up(f"{what} did not complete within {late.limit_s:g} s. {_NOT_REACHED}")
            return None
        if not late.has_warned:
            late.has_warned = True
            times = late.age_s, late.limit_s
            logger.warning("%s takes %.3g of at most %g s so far. %s", what, *times, _NOT_REACHED)
        return self._pause_s

    def _give_up(self, finding: str) -> None:
        finding += " The process group is aborted."
        logger.error("%s", finding)
        self.finding = finding  # before the host comes back
        group = self._find_group()
        if group is not None:
            group.abort()

    def _is_late(self) -> bool:
        """Whether half of the oldest one's time is over."""
        return bool(self._under_way) and self._under_way[0].age_s >= self._under_way[0].limit_s / 2

    def _retire(self) -> None:
        """Drop what the stream has gone past; the verdict of the last such is complete."""
        while self._under_way and self._under_way[0].is_done():
            done = self._under_way.popleft()
            self._roll_call.last = done.place
            self._spare.append((done.before, done.after))

    def _fresh(self) -> tuple[torch.Event, torch.Event]:
        return torch.Event(self._device.type), torch.Event(self._device.type)

    def _start(self) -> None:
        # A fork leaves the thread behind.
        if self._thread is None or not self._thread.is_alive():
            args = (weakref.ref(self), self._stop)
            self._thread = threading.Thread(
                target=_keep_looking, args=args, name="shardscale-monitor", daemon=True
            )
            self._thread.start()


@dataclass
class _Watched:
    """One verdict on the stream, between two events."""

    place: Place
    limit_s: float
    since: float
    before: torch.Event
    after: torch.Event
    is_launched: bool = False  # until then, `after` may speak of the verdict that used it before
    has_warned: bool = False

    def is_done(self) -> bool:
        """Whether the stream has gone past it."""
        return self.is_launched and bool(self.after.query())

    @property
    def age_s(self) -> float:
        """How long it has been under way."""
        return time.monotonic() - self.since


def _keep_looking(find: Callable[[], Monitor | None], stop: threading.Event) -> None:
    # Between two looks it holds on to nothing: it neither keeps a group alive nor the process.
    pause_s: float | None = 0.0
    while not stop.wait(pause_s):
        monitor = find()
        pause_s = None if monitor is None else monitor.look()
        del monitor
        if pause_s is None:
            return
