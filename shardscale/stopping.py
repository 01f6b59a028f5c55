"""Stopping together: one rank's wish rides in its verdicts, and all ranks learn of it at one step.

Methods of the scaler, over what its judge and its ledger know.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from typing_extensions import Self

from shardscale.errors import ConfigError
from shardscale.judge import Judge
from shardscale.untraced import leave_untraced

__all__ = ["Stopping"]


@leave_untraced("should_stop")
class Stopping:
    """Mixed into the scaler; holds nothing of its own."""

    if TYPE_CHECKING:
        _enabled: bool
        _judge: Judge

    def listen(self, wish: Callable[[], bool]) -> Self:
        """Let a wish of this rank stop all of them: it rides in the message of each verdict.

        Each verdict asks ``wish()`` once, on the host. Up to 3259 ranks every wish is heard at
        once. In a larger group rank 0's is, and the others take turns, so theirs must last; beyond
        107,000 ranks only rank 0 is heard. A verdict captured into a graph does not ask, for a
        replay would repeat the answer: run an iteration as usual from time to time. Neither a
        pickle nor a copy of the scaler goes on listening.

        Args:
            wish: Whether this rank wishes to stop, such as a :class:`~shardscale.StopSignal`. If it
                raises an Exception, so does the call that asked, once this rank has joined the
                others; SystemExit ends this rank at once, as anywhere.

        Raises:
            ConfigError: ``wish`` is no function.

        Collective: none; other ranks may listen to something else, or to nothing.
        """
        if not callable(wish):
            raise ConfigError(
                f"wish is {wish!r}, but must be a function without arguments that says whether "
                "this rank wishes to stop."
            )
        self._judge.wish = wish
        return self

    def should_stop(self) -> bool:
        """Whether a rank wished to stop: the same answer on every rank after the same ``update``.

        It speaks of all iterations before the one closed last, because ranks with fused optimizers
        do not know that one yet. Once true it stays true until ``load_state_dict``. A scaler that
        is alone, or disabled, agrees with nobody and gives this rank's own wish of now.

        Raises:
            StageError: the group in which this scaler agreed exists no more.

        Collective: none; may be called on one rank.
        Sync: none.
        """
        judge = self._judge
        if not self._enabled or judge.bond.communicator() is None:
            return bool(judge.wish())
        return judge.ledger.knew_of_a_wish(judge.num_updates - 1)
