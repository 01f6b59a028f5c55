"""Ask what may never answer, and wait for a limited time only."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import TypeVar

__all__ = ["within"]

T = TypeVar("T")


def within(timeout_s: float, ask: Callable[[], T]) -> T:
    """What ``ask`` returns or raises, if it does so in time.

    A store's client can block for ever inside torch, where no timeout reaches it: when a peer took
    the connection and says nothing. So it is asked on a thread, which is left behind.

    Raises:
        TimeoutError: It did not.
    """
    answers: queue.Queue[tuple[T, None] | tuple[None, BaseException]] = queue.Queue()

    def run() -> None:
        try:
            answers.put((ask(), None))
        except BaseException as error:  # noqa: BLE001 - it is the caller's
            answers.put((None, error))

    threading.Thread(target=run, name="shardscale-patience", daemon=True).start()
    try:
        answer, error = answers.get(timeout=timeout_s)
    except queue.Empty:
        raise TimeoutError(f"no answer within {timeout_s:.0f} s") from None
    if error is not None:
        raise error
    return answer  # type: ignore[return-value]
