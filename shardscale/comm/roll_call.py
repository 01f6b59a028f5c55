"""Who came to a verdict that did not complete, asked through the group's store."""

from __future__ import annotations

import base64
import hashlib
import pickle
import queue
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from torch.distributed.distributed_c10d import Store

__all__ = ["RollCall"]

# Ranks that are waiting look for an alarm every 1.25 s at the latest; the rest is the store's time.
_GRACE_S = 5.0
_POLL_S = 0.05
_STORE_PATIENCE_S = 5.0
_BATCH = 64  # keys that one request asks for

T = TypeVar("T")


class RollCall:
    """Keys in a store that are written only after something went wrong.

    The store may have died with its rank, or be stopped and not answer at all. Every conversation
    with it therefore runs on a thread of its own and is waited for at most a few seconds.

    Args:
        store: The group's store.
        prefix: Put before every key.
        rank: This rank's number in the group.
        size: The number of ranks in the group.
    """

    def __init__(self, store: Store, prefix: str, rank: int, size: int) -> None:
        self._store = store
        self._prefix = prefix
        self._rank = rank
        self._size = size
        self._num_gathers = 0
        self.num_verdicts = 0

    def is_alarmed(self) -> bool:
        """Whether a rank has given up on the current verdict, or on one before that it read first.

        A store that is silent counts as yes.
        """
        keys = [f"{self._prefix}/alarm/{self.num_verdicts}", self._gathering(self._num_gathers + 1)]
        try:
            return self._ask(
                lambda: any(self._store.check([key]) for key in keys), _STORE_PATIENCE_S
            )
        except _StoreSilentError:
            return True

    def report(self) -> str:
        """Say that this rank is at the current verdict, and tell in a sentence who is not.

        Every rank that waits for the same verdict sees the alarm and reports too, so after a short
        grace those that did not are the ones that never came.
        """
        verdict = self.num_verdicts
        try:
            came = self._ask(lambda: self._call_roll(verdict), _GRACE_S + _STORE_PATIENCE_S)
        except _StoreSilentError as error:
            return (
                f"Who is missing cannot be told: the store does not answer ({error}). It probably "
                "died with the rank that hosted it (rank 0, unless a launcher holds it)."
            )
        missing = [rank for rank in range(self._size) if rank not in came]
        elsewhere = {rank: at for rank, (at, _) in came.items() if at != verdict}
        here = ", ".join(
            f"{rank} ({host})" for rank, (at, host) in sorted(came.items()) if at == verdict
        )
        sentences = []
        if missing:
            sentences.append(f"Did not come: {_ranks(missing)}. Came: {here}.")
            sentences.append(
                "Every rank must make every call of the scaler; if one is slow, raise timeout_s."
            )
        if elsewhere:
            others = ", ".join(f"rank {rank} was at verdict {at}" for rank, at in elsewhere.items())
            sentences.append(f"The ranks do not make the same calls: {others}.")
        if not sentences:
            sentences.append(
                "All ranks came, so a connection broke or the ranks entered different collectives "
                "of this group in between. Make the same calls in the same order on all of them."
            )
        return " ".join(sentences)

    def gather(self, obj: object, timeout_s: float) -> list[object]:
        """Every rank's object in rank order, None for those that did not write one in time.

        Most ranks of a large job say the same, so a text is kept once, under its digest, and a
        rank's own key holds the digest: what n ranks read grows with the square of n.
        """
        self._num_gathers += 1
        num = self._num_gathers
        keys = [f"{self._prefix}/gather/{num}/{rank}" for rank in range(self._size)]

        def exchange() -> list[object]:
            text = _pack(obj)
            digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
            self._store.set(self._gathering(num), "1")
            self._store.set(self._text(digest), text)
            self._store.set(keys[self._rank], digest)
            came = self._written(keys, time.monotonic() + timeout_s)
            told = dict(zip(came, map(bytes.decode, self._store.multi_get(came)), strict=True))
            different = list(set(told.values()))
            texts = self._store.multi_get(list(map(self._text, different)))
            things = dict(zip(different, map(_unpack, texts), strict=True))
            return [things[told[key]] if key in told else None for key in keys]

        try:
            return self._ask(exchange, timeout_s + _STORE_PATIENCE_S)
        except _StoreSilentError:
            return [obj if rank == self._rank else None for rank in range(self._size)]

    def _text(self, digest: str) -> str:
        return f"{self._prefix}/text/{digest}"

    def _gathering(self, num: int) -> str:
        return f"{self._prefix}/alarm/gather/{num}"

    def _call_roll(self, verdict: int) -> dict[int, tuple[int, str]]:
        """The verdict and the host of every rank that has written them by the end of the grace."""
        keys = {f"{self._prefix}/arrived/{rank}": rank for rank in range(self._size)}
        mine = _pack((verdict, socket.gethostname()))
        self._store.set(f"{self._prefix}/arrived/{self._rank}", mine)
        self._store.set(f"{self._prefix}/alarm/{verdict}", "1")
        came = self._written(list(keys), time.monotonic() + _GRACE_S)
        told = map(_unpack, self._store.multi_get(came))
        return {keys[key]: at for key, at in zip(came, told, strict=True)}

    def _written(self, keys: list[str], deadline: float) -> list[str]:
        """Those of ``keys`` that have been written by the deadline; all, as soon as they are."""
        # The same number of requests a second reach the store, however many ranks send them.
        poll_s = _POLL_S * max(1.0, self._size / _BATCH)
        written: list[str] = []
        for first in range(0, len(keys), _BATCH):
            batch = keys[first : first + _BATCH]
            while not (is_complete := self._store.check(batch)) and time.monotonic() < deadline:
                time.sleep(min(poll_s, max(0.0, deadline - time.monotonic())))
            written += batch if is_complete else [key for key in batch if self._store.check([key])]
        return written

    def _ask(self, question: Callable[[], T], patience_s: float) -> T:
        """Run ``question`` on a thread and wait for its answer at most ``patience_s`` seconds."""
        answers: queue.Queue[tuple[T | None, Exception | None]] = queue.Queue()

        def run() -> None:
            try:
                answers.put((question(), None))
            except Exception as error:  # noqa: BLE001 - whatever its client raises means the same
                answers.put((None, error))

        threading.Thread(target=run, name="shardscale-roll-call", daemon=True).start()
        try:
            answer, error = answers.get(timeout=patience_s)
        except queue.Empty:
            raise _StoreSilentError(f"no answer within {patience_s:.0f} s") from None
        if error is not None:
            raise _StoreSilentError(f"{type(error).__name__}: {error}") from error
        return answer  # type: ignore[return-value]


def _pack(obj: object) -> str:
    # Stores take text; a pickle as base64 is.
    return base64.b64encode(pickle.dumps(obj)).decode()


def _unpack(text: bytes) -> Any:
    return pickle.loads(base64.b64decode(text))


class _StoreSilentError(Exception):
    """The store raised or did not answer."""


def _ranks(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
