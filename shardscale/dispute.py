"""What the ranks tell each other once they do not belong together, and what each of them raises."""

from __future__ import annotations

import contextlib
import threading

from shardscale import drift
from shardscale.comm import Communicator, Solo
from shardscale.errors import DisagreementError, MissingRankError
from shardscale.ledger import Unread
from shardscale.records import Agreement, Call

__all__ = ["PATIENCE_S", "Dispute", "answer"]

PATIENCE_S = 5.0
"""How long a rank that is about to raise waits for others that are there to hear of it."""


class Dispute:
    """The disagreements of one scaler; the ranks are asked once about each."""

    def __init__(self) -> None:
        self._told: dict[int, tuple[Agreement, Exception]] = {}  # by the verdict they are about

    def error_of(self, unread: Unread, comm: Communicator | None) -> Exception:
        """The error of a verdict in which the ranks did not belong together.

        Collective: every rank of ``comm`` should call; the first call for a verdict gathers.
        """
        agreement, call, fault = unread
        if id(agreement) not in self._told:
            comm = comm or Solo()
            accounts = comm.all_gather_object(drift.account(call, fault))
            error = DisagreementError(drift.explain(accounts, comm.rank))
            self._told[id(agreement)] = (agreement, error)
        return self._told[id(agreement)][1]

    def tell(self, unread: Unread, comm: Communicator | None, patience_s: float) -> None:
        """Let the others know what this rank is about to raise, and remember what they told.

        Args:
            unread: The verdict, and this rank's fault in it.
            comm: The agreeing group.
            patience_s: Seconds to wait for the others' accounts.

        Collective: as :func:`answer`.
        """
        agreement, call, fault = unread
        assert fault is not None
        accounts = answer(call, fault, comm, patience_s)
        told = fault
        if accounts:
            told = DisagreementError(drift.explain(accounts, (comm or Solo()).rank))
        self._told[id(agreement)] = (agreement, told)


def answer(
    call: Call, fault: Exception, comm: Communicator | None, patience_s: float
) -> list[object]:
    """Tell the others what this rank is about to raise, and give it a while to hear of theirs.

    Their question comes whenever they read the verdict, which this rank may not live to see.

    Args:
        call: What this rank was doing.
        fault: What it is about to raise.
        comm: The agreeing group.
        patience_s: Seconds to wait for the others' accounts.

    Returns:
        The accounts of all ranks in rank order, or nothing if they did not come in that time.

    Collective: meets the others' gathering, on a thread of its own.
    """
    account = drift.account(call, fault)
    accounts: list[object] = []

    def gather() -> None:
        with contextlib.suppress(MissingRankError):  # the group was given up, and this rank knows
            accounts.extend((comm or Solo()).all_gather_object(account))

    thread = threading.Thread(target=gather, daemon=True)
    thread.start()
    thread.join(patience_s)
    return list(accounts)
