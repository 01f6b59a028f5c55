"""What a communicator promises: four members, and the same bits on every rank."""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

from torch import Tensor
from typing_extensions import Self

from shardscale.errors import ConfigError

__all__ = ["FIRST_TIMEOUT_S", "Communicator", "Solo", "Timed", "require_time"]

# A rank that never comes at all shows at the first verdict.
FIRST_TIMEOUT_S = 60.0


@runtime_checkable
class Communicator(Protocol):
    """The group of ranks that must decide alike.

    The n-th call of a method on one rank belongs together with the n-th call of that method on
    every other; all ranks call, or none. A call that does not complete raises
    :class:`~shardscale.errors.MissingRankError`; it never waits for ever.

    One that has an attribute ``step_under_way`` finds the scaler's number of updates there before
    each verdict, to say in an error how far the ranks had got.
    """

    @property
    def rank(self) -> int:
        """This rank's number in the group, 0 to ``size - 1``."""
        ...

    @property
    def size(self) -> int:
        """The number of ranks in the group."""
        ...

    def all_reduce_sum_(self, buffer: Tensor) -> None:
        """Replace ``buffer`` by its sum over all ranks.

        Args:
            buffer: (2,) float64 on any device; moving it to where the transport needs it, and back,
                is the communicator's work.

        Every rank must receive the same bits, NaN payloads apart. A transport that cannot promise
        it gathers the numbers and adds them in rank order.

        Collective: every rank must call; sends 2 float64.
        """
        ...

    def all_gather_object(self, obj: object) -> list[object]:
        """Every rank's picklable object, in rank order; None for one that did not answer in time.

        Called only when something went wrong, so it must not depend on the order in which other
        collectives were started.

        Collective: every rank should call.
        """
        ...


@runtime_checkable
class Timed(Communicator, Protocol):
    """A communicator whose caller can say how long to wait."""

    @property
    def timeout_s(self) -> float | None:
        """Seconds that a verdict may take; None for the communicator's own defaults."""
        ...

    def within(self, timeout_s: float) -> Self:
        """The same group for a caller who waits so long; verdicts are counted together."""
        ...


class Solo:
    """The group of one rank; its collectives are copies."""

    rank = 0
    size = 1

    def all_reduce_sum_(self, buffer: Tensor) -> None:
        """Leave ``buffer`` as it is: the sum over one rank.

        Collective: none.
        """

    def all_gather_object(self, obj: object) -> list[object]:
        """``[obj]``.

        Collective: none.
        """
        return [obj]


def require_time(timeout_s: float | None) -> None:
    """Seconds that can be waited, or None.

    Raises:
        ConfigError: it is neither.
    """
    is_number = isinstance(timeout_s, int | float)
    if timeout_s is not None and not (is_number and 0.001 <= timeout_s < math.inf):
        raise ConfigError(
            f"timeout_s is {timeout_s!r}, but must be a number of seconds, at least 0.001."
        )
