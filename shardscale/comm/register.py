"""Who has joined a job, in the order of coming; how many have tells the worlds of a store apart.

A launcher may keep its store when it starts the processes anew, as torchrun does: with torch 2.13 a
group that ``env://`` makes finds all keys of the one before. Nothing in the environment names a
world. torchrun's count of restarts does not: each node counts its own.
"""

from __future__ import annotations

import logging
import socket

from torch.distributed.distributed_c10d import Store

from shardscale.comm.patience import within

__all__ = ["Register"]

logger = logging.getLogger(__name__)

_PATIENCE_S = 1.0


class Register:
    """One process's entry. Every process of a job makes one, as soon as it has a scaler.

    An entry has a number, and the number of entries never falls. So what ranks write under it after
    this process has joined, no earlier world can have written; and it is the same number for all
    that ask at one time. It changes when another process joins, which in most jobs none does after
    the first verdict.

    Args:
        rank: This rank's number in the job.
        num_ranks: How many ranks the job has.
    """

    def __init__(self, rank: int, num_ranks: int) -> None:
        self._rank = rank
        self._number: int | None = None  # None until the store has answered
        self.host_keys = [f"shardscale/host/{r}" for r in range(num_ranks)]

    def join(self, store: Store) -> None:
        """Enter this process, with its host for others to name it by; only once.

        Args:
            store: The default group's.
        """
        try:
            within(_PATIENCE_S, lambda: self._enter(store))
        except Exception as error:  # noqa: BLE001 - it matters only once a rank is missing
            logger.debug("rank %d could not be entered in the store: %s", self._rank, error)

    def count(self, store: Store) -> int:
        """How many processes have joined, this one among them.

        Args:
            store: As for :meth:`join`, or a clone.
        """
        if self._number is None:
            self._enter(store)
        return int(store.get("shardscale/joined"))

    def hosts(self, cards: dict[int, bytes], count: int, all_have_joined: bool) -> dict[int, str]:
        """The hosts of ranks of this world, by their numbers in the job.

        Args:
            cards: What is written under ``host_keys``.
            count: How many processes have joined.
            all_have_joined: Whether all ranks of this world are known to have, so that no card is
                of an earlier one. If not, a card is believed if its rank joined after this one, or
                if no rank ever did so twice.
        """
        read = {rank: card.decode().split(" ", 1) for rank, card in cards.items()}
        is_first_world = all_have_joined or count == len(read)
        return {
            rank: host
            for rank, (number, host) in read.items()
            if is_first_world or int(number) >= (self._number or 0)
        }

    def _enter(self, store: Store) -> None:
        number = store.add("shardscale/joined", 1)
        store.set(self.host_keys[self._rank], f"{number} {socket.gethostname()}")
        self._number = number
