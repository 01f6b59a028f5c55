"""All ranks of a job are here, in this life of theirs, and have keys that no earlier one used."""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Callable
from datetime import timedelta

from torch.distributed.distributed_c10d import PrefixStore, Store

from shardscale.errors import MissingRankError

__all__ = ["assemble"]

logger = logging.getLogger(__name__)

_QUIET_S = 10.0  # a wait that lasts longer is talked about
_AT_MOST = 16  # ranks that a sentence names


def assemble(
    store: Store,
    rank: int,
    world_size: int,
    timeout_s: float,
    told: str,
    decide: Callable[[list[str]], str],
) -> tuple[Store, str]:
    """Wait for all ranks, and let rank 0 decide something for them from what they told it.

    torchrun's store outlives its ranks, and so do their keys: a restarted rank that reads an
    address there may get that of a process which is gone (torch 2.13 with Gloo, if a lower rank is
    late). So each rank greets with a word made up for this life of its own, rank 0 answers to that
    word with the name of the incarnation, and all go on under that name.

    Args:
        store: One that all ranks reach.
        rank: This rank.
        world_size: How many there are.
        timeout_s: How long to wait for all of them.
        told: What this rank has to say.
        decide: Called on rank 0 with what all ranks said.

    Returns:
        A store with the keys of this incarnation alone, and the decision.

    Raises:
        MissingRankError: Not all came in time; names those who did not.

    Collective: every rank must call.
    """
    deadline = time.monotonic() + timeout_s
    word = uuid.uuid4().hex
    if rank == 0:
        said = [told, *_welcome(store, word, world_size, timeout_s)]
        store.set(f"{word}/go", decide(said))
        return PrefixStore(word, store), store.get(f"{word}/go").decode()
    name = ""
    store.set(f"greeting/{rank}", json.dumps([word, told]))
    try:
        name = _await(store, f"welcome/{word}", deadline)
        store.set(f"{name}/here/{rank}", "1")
        return PrefixStore(name, store), _await(store, f"{name}/go", deadline)
    except RuntimeError as error:  # too late, or no store any more
        raise MissingRankError(
            f"rank {rank} of {world_size}: {_who_is_missing(store, name, world_size, error)}"
        ) from error


def _welcome(store: Store, name: str, world_size: int, timeout_s: float) -> list[str]:
    """On rank 0: answer every greeting until all others have taken the answer; what they said."""
    started = time.monotonic()
    greetings = dict.fromkeys(range(1, world_size), "")
    missing = list(greetings)
    pause, quiet_s = 0.001, _QUIET_S
    while True:
        for rank in missing:
            if not store.check([f"greeting/{rank}"]):
                continue
            greeting = store.get(f"greeting/{rank}").decode()
            if greeting != greetings[rank]:  # the one before it was of an earlier life
                greetings[rank] = greeting
                store.set(f"welcome/{json.loads(greeting)[0]}", name)
        missing = [rank for rank in missing if not store.check([f"{name}/here/{rank}"])]
        if not missing:
            return [json.loads(greeting)[1] for greeting in greetings.values()]
        passed = time.monotonic() - started
        if passed > timeout_s:
            raise MissingRankError(
                f"rank 0 of {world_size}: {_ranks(missing)} did not come within {timeout_s:g} s. "
                "Every rank must call init_distributed; look at the output of those, or raise "
                "timeout_s if they are slow to start."
            )
        if passed > quiet_s:
            quiet_s *= 2
            logger.warning("rank 0 of %d is waiting for %s", world_size, _ranks(missing))
        time.sleep(pause)
        pause = min(0.05, 1.5 * pause)


def _await(store: Store, key: str, deadline: float) -> str:
    """The value of a key that is written by the deadline.

    Raises:
        RuntimeError: It was not, or the store is gone.
    """
    store.wait([key], timedelta(seconds=max(0.001, deadline - time.monotonic())))
    return store.get(key).decode()


def _who_is_missing(store: Store, name: str, world_size: int, error: Exception) -> str:
    try:
        missing = [
            rank
            for rank in range(1, world_size)
            if name and not store.check([f"{name}/here/{rank}"])
        ]
    except RuntimeError:
        return (
            f"the store broke off ({str(error).splitlines()[0]}). Its host is rank 0 or torchrun; "
            "look at its output first."
        )
    if not name:
        return "rank 0 has not come. Look at its output, or raise timeout_s if it is slow to start."
    return f"{_ranks(missing)} did not come. Look at the output of those first."


def _ranks(ranks: list[int]) -> str:
    named = ", ".join(map(str, ranks[:_AT_MOST]))
    more = f" and {len(ranks) - _AT_MOST} more" if len(ranks) > _AT_MOST else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {named}{more}"
