"""Keys in a group's store by which ranks find out who came to a verdict that is late.

No rank writes anything while verdicts are in time.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import pickle
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from torch.distributed.distributed_c10d import Store

from shardscale.comm.attendance import Attendance, Crew, Place, tell
from shardscale.comm.register import Register

__all__ = ["GIVEN_UP", "RollCall"]

GIVEN_UP = "another rank gave up, or the store is gone"
# Ranks that are waiting look for an alarm every 1.5 s at the latest; the rest is the store's time.
_GRACE_S = 5.0
_POLL_S = 0.05
_STORE_PATIENCE_S = 5.0
_GLANCE_S = 1.0  # for what is asked while a rank waits for something else
_BATCH = 64  # keys that one request asks for

T = TypeVar("T")


class RollCall:
    """One rank's part in the roll calls of a group.

    The store may have died with its rank, or be stopped and not answer at all. Every conversation
    with it therefore runs on a thread of its own and is waited for at most a few seconds. One that
    does not answer may come back; one that raises is gone.

    Args:
        crew: The ranks of the group, and this one.
        register: This process's entry among those of the job.
        store: Gives the group's store. Called once, and not before it is needed.
        job_store: Likewise the default group's, where the register is.
    """

    def __init__(
        self,
        crew: Crew,
        register: Register,
        store: Callable[[], Store],
        job_store: Callable[[], Store],
    ) -> None:
        self.crew = crew
        self._register = register
        self._open = store
        self._open_job = job_store
        self._unanswered: threading.Thread | None = None
        self._has_written: tuple[str, Place] | None = None
        self._num_gathers = 0
        self.num_verdicts = 0
        self.last: Place | None = None  # the newest verdict that is known to be complete

    def enter(self, step: int | None) -> Place:
        """A verdict begins."""
        self.num_verdicts += 1
        return Place(self.num_verdicts, step)

    def look(self, place: Place, is_late: bool) -> bool:
        """Whether a rank has given up, or begun to gather after a verdict that it read first.

        No answer is taken for no, for the store's host may only be held up. An error is taken for
        yes.

        Args:
            place: Where this rank waits.
            is_late: Whether to write so, in case it cannot be asked later.
        """

        def look() -> bool:
            prefix = self._prefix()
            if is_late and self._has_written != (prefix, place):
                self._store.set(f"{prefix}/late/{self.crew.rank}", _pack(place))
                self._has_written = prefix, place
            keys = [f"{prefix}/alarm", _gathering(prefix, self._num_gathers + 1)]
            return any(self._store.check([key]) for key in keys)

        try:
            return self._ask(look, _GLANCE_S)
        except _StoreSilentError as error:
            return error.is_gone

    def report(self, place: Place, how: str, timeout_s: float) -> str:
        """Say that this rank is at a verdict, and tell in sentences who is not.

        Every rank that waits for the same verdict sees the alarm and reports too, so after a short
        grace those that did not are the ones that never came.

        Args:
            place: The verdict.
            how: What became of it, after "did not complete".
            timeout_s: How long it was given. Who counts in seconds gets no grace of minutes.
        """
        head = f"{self.crew.myself}: {place} did not complete{how}."
        grace_s = min(_GRACE_S, timeout_s)
        try:
            found = self._ask(lambda: self._call_roll(place, grace_s), grace_s + _STORE_PATIENCE_S)
        except _StoreSilentError as error:
            body = (
                f"Who is missing cannot be told: the store does not answer ({error}). It probably "
                "died with the rank that hosted it (rank 0, unless a launcher holds it)."
            )
            if self.last is not None:
                body += f" All {self.crew.size} ranks were last heard of at {self.last.short}."
        else:
            body = tell(found, self.crew, place, self.last)
        if place.verdict == 1:
            body += (
                " It was the first verdict: if some ranks never train, name the group of those that"
                " do with process_group=."
            )
        return f"{head} {body}"

    def gather(self, obj: object, timeout_s: float) -> list[object]:
        """Every rank's object in rank order, None for those that did not write one in time.

        Most ranks of a large job say the same, so a text is kept once, under its digest, and a
        rank's own key holds the digest: what n ranks read grows with the square of n.
        """
        self._num_gathers += 1
        num = self._num_gathers
        text = _pack(obj)
        digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

        def write(prefix: str) -> list[str]:
            keys = [f"{prefix}/gather/{num}/{rank}" for rank in range(self.crew.size)]
            self._store.set(_gathering(prefix, num), "1")
            self._store.set(f"{prefix}/text/{digest}", text)
            self._store.set(keys[self.crew.rank], digest)
            return keys

        def exchange() -> list[object]:
            prefix, keys = self._meet(write, timeout_s)
            told = {rank: key.decode() for rank, key in _read(self._store, keys).items()}
            different = list(set(told.values()))
            texts = self._store.multi_get([f"{prefix}/text/{each}" for each in different])
            things = dict(zip(different, map(_unpack, texts), strict=True))
            return [things[told[r]] if r in told else None for r in range(self.crew.size)]

        try:
            return self._ask(exchange, timeout_s + _STORE_PATIENCE_S)
        except _StoreSilentError:
            return [obj if rank == self.crew.rank else None for rank in range(self.crew.size)]

    @functools.cached_property
    def _store(self) -> Store:
        return self._open()

    @functools.cached_property
    def _job_store(self) -> Store:
        return self._open_job()

    def _prefix(self) -> str:
        return f"shardscale/{self._register.count(self._job_store)}"

    def _call_roll(self, place: Place, grace_s: float) -> Attendance:
        """What every rank has written by the end of the grace."""
        ranks = range(self.crew.size)

        def write(prefix: str) -> list[str]:
            self._store.set(f"{prefix}/answer/{self.crew.rank}", _pack(place))
            self._store.set(f"{prefix}/alarm", "1")
            return [f"{prefix}/answer/{rank}" for rank in ranks]

        prefix, answers = self._meet(write, grace_s)
        late = [f"{prefix}/late/{rank}" for rank in ranks]
        hosts = self._register.hosts(
            _read(self._job_store, self._register.host_keys),
            self._register.count(self._job_store),
            all_have_joined=self.last is not None,
        )
        in_job = self.crew.in_job or ranks
        return Attendance(
            {rank: _unpack(text) for rank, text in _read(self._store, answers).items()},
            {rank: _unpack(text) for rank, text in _read(self._store, late).items()},
            {rank: hosts[number] for rank, number in enumerate(in_job) if number in hosts},
        )

    def _meet(self, write: Callable[[str], list[str]], timeout_s: float) -> tuple[str, list[str]]:
        """Write something, and wait until all others have written the same kind of thing.

        If a process joins meanwhile, all of them go on under the new number.

        Args:
            write: Given what keys begin with, writes this rank's and returns those of all.
            timeout_s: Seconds that others have for it.
        """
        deadline = time.monotonic() + timeout_s
        under, keys = "", [""]
        while True:
            if (prefix := self._prefix()) != under:
                under, keys = prefix, write(prefix)
            elif time.monotonic() >= deadline:  # looked once more since then
                return under, keys
            if self._await(keys, min(deadline, time.monotonic() + _GLANCE_S)):
                return under, keys

    def _await(self, keys: list[str], deadline: float) -> bool:
        """Wait until all ``keys`` are written; False if they are not by the deadline."""
        # The same number of requests a second reach the store, however many ranks send them.
        poll_s = _POLL_S * max(1.0, self.crew.size / _BATCH)
        for batch in _batches(keys):
            while not self._store.check(batch):
                if time.monotonic() >= deadline:
                    return False
                time.sleep(min(poll_s, max(0.0, deadline - time.monotonic())))
        return True

    def _ask(self, question: Callable[[], T], patience_s: float) -> T:
        """Run ``question`` on a thread and wait for its answer at most ``patience_s`` seconds."""
        if self._unanswered is not None:
            # It is still at the store, and so would the next one be.
            self._unanswered.join(min(patience_s, _STORE_PATIENCE_S))
            if self._unanswered.is_alive():
                raise _StoreSilentError(f"no answer within {patience_s:.0f} s")
            self._unanswered = None
        answers: queue.Queue[tuple[T | None, Exception | None]] = queue.Queue()

        def run() -> None:
            try:
                answers.put((question(), None))
            except Exception as error:  # noqa: BLE001 - whatever its client raises means the same
                answers.put((None, error))

        thread = threading.Thread(target=run, name="shardscale-roll-call", daemon=True)
        thread.start()
        try:
            answer, error = answers.get(timeout=patience_s)
        except queue.Empty:
            self._unanswered = thread
            raise _StoreSilentError(f"no answer within {patience_s:.0f} s") from None
        if error is not None:
            raise _StoreSilentError(f"{type(error).__name__}: {error}") from error
        return answer  # type: ignore[return-value]


class _StoreSilentError(Exception):
    """The store raised or did not answer."""

    @property
    def is_gone(self) -> bool:
        """Whether it raised."""
        return self.__cause__ is not None


def _gathering(prefix: str, num: int) -> str:
    return f"{prefix}/alarm/gather/{num}"


def _read(store: Store, keys: list[str]) -> dict[int, bytes]:
    """What is written under those of ``keys`` that exist, by their positions."""
    written: list[str] = []
    for batch in _batches(keys):
        written += batch if store.check(batch) else [key for key in batch if store.check([key])]
    texts = dict(zip(written, store.multi_get(written), strict=True)) if written else {}
    return {i: texts[key] for i, key in enumerate(keys) if key in texts}


def _batches(keys: list[str]) -> list[list[str]]:
    return [keys[first : first + _BATCH] for first in range(0, len(keys), _BATCH)]


def _pack(obj: object) -> str:
    # Stores take text; a pickle as base64 is.
    return base64.b64encode(pickle.dumps(obj)).decode()


def _unpack(text: bytes) -> Any:
    return pickle.loads(base64.b64decode(text))
