"""What the ranks tell rank 0 and what it answers, through a store, and never waiting for ever."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch.distributed.distributed_c10d import PrefixStore, Store

from shardscale.comm.patience import within

__all__ = ["Exchange", "LostError"]

# A store that is asked this often, by every rank, still has time for its other work.
_POLL_S = 0.02
_PATIENCE_S = 10.0

T = TypeVar("T")


class LostError(Exception):
    """Nobody answers: the store, or rank 0."""


class Exchange:
    """For each name: all ranks tell, rank 0 hears them and answers, all listen.

    The store may have died with its rank, or be stopped and not answer at all, so every
    conversation with it has a limit of its own.

    Args:
        store: Of this job and of this start of it alone, or an earlier one would be heard.
        rank: This rank.
        size: The number of ranks.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        # A client of a store serves one request at a time, and groups are made over the other one.
        self._store = PrefixStore("shardscale/doctor", store.clone())  # type: ignore[attr-defined]
        self._rank = rank
        self.size = size

    def tell(self, name: str, thing: Any) -> None:
        """Leave what can be written as JSON for rank 0."""
        self._ask(lambda: self._store.set(f"{name}/{self._rank}", json.dumps(thing)))

    def hear(self, name: str, limit_s: float, ranks: Iterable[int]) -> dict[int, Any]:
        """What these ranks have told by then, by rank; whoever is not in it has not."""
        keys = {f"{name}/{rank}": rank for rank in ranks}

        def collect() -> dict[int, Any]:
            deadline = time.monotonic() + limit_s
            while not (all_came := self._store.check(list(keys))) and time.monotonic() < deadline:
                time.sleep(_POLL_S)
            came = [key for key in keys if all_came or self._store.check([key])]
            told = self._store.multi_get(came)
            return {keys[key]: json.loads(text) for key, text in zip(came, told, strict=True)}

        return self._ask(collect, limit_s)

    def answer(self, name: str, thing: Any) -> None:
        """Let all ranks hear, from rank 0, what can be written as JSON."""
        self._ask(lambda: self._store.set(f"{name}/answer", json.dumps(thing)))

    def listen(self, name: str, limit_s: float) -> Any:
        """What rank 0 answered."""
        key = f"{name}/answer"

        def poll() -> Any:
            deadline = time.monotonic() + limit_s
            while not self._store.check([key]):
                if time.monotonic() > deadline:
                    raise LostError(f"rank 0 has not answered within {limit_s:g} s")
                time.sleep(_POLL_S)
            return json.loads(self._store.get(key))

        return self._ask(poll, limit_s)

    def _ask(self, question: Callable[[], T], limit_s: float = 0.0) -> T:
        try:
            return within(limit_s + _PATIENCE_S, question)
        except (RuntimeError, TimeoutError) as error:
            raise LostError(f"the store does not answer ({error})") from error
