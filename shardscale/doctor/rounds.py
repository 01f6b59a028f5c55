"""One part after the other: all ranks look, rank 0 judges and says whether to go on."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from shardscale.comm.patience import within
from shardscale.doctor.codes import Code, Failure
from shardscale.doctor.exchange import Exchange, LostError
from shardscale.doctor.report import Report
from shardscale.doctor.sections import Judged, Section, who_said

__all__ = ["EndedError", "Part", "Rounds"]

# Ranks come to a part at different times, and the last one must still be heard.
_GRACE_S = 5.0


class EndedError(Exception):
    """Rank 0 said that the examination is over; carries its exit code."""

    def __init__(self, code: Code) -> None:
        super().__init__(code)
        self.code = code


class Part(NamedTuple):
    """One thing to look at."""

    name: str
    limit_s: float
    look: Callable[[], Any]
    """What every rank does."""
    tell: Callable[[Any], Any]
    """What of it is sent, as JSON."""
    judge: Callable[[Mapping[int, Any]], Judged]
    """What rank 0 makes of it, by rank; there is at least one."""
    code: Code | None
    """What it means if a rank raises or is stuck here; None if that is a fact and no failure."""


class Rounds:
    """The ranks' common way through the parts; rank 0 names those that leave it.

    Args:
        exchange: Between these ranks.
        report: What rank 0 writes into; None on the others.
    """

    def __init__(self, exchange: Exchange, report: Report | None) -> None:
        self._exchange = exchange
        self._report = report

    def go(self, part: Part) -> tuple[Any, Any]:
        """Look, and wait for what rank 0 says.

        Returns:
            What this rank found, and what rank 0 handed on.

        Raises:
            EndedError: a rank did not come, raised or was stuck, so what follows would mean
                nothing.
            LostError: the store or rank 0 does not answer.

        Collective: every rank must call, for the same parts.
        """
        found, told = _attempt(part)
        self._exchange.tell(part.name, told)
        if self._report is not None:
            all_ranks = range(self._exchange.size)
            heard = self._exchange.hear(part.name, part.limit_s + _GRACE_S, all_ranks)
            answer = _answer(part, heard, all_ranks, self._report)
            self._exchange.answer(part.name, answer)
        answer = self._exchange.listen(part.name, part.limit_s + 2 * _GRACE_S)
        if answer["ends_with"] is not None:
            self._leave(answer["came"])
            raise EndedError(Code(answer["ends_with"]))
        return found, answer["hand_on"]

    def end(self) -> Code:
        """Conclude the report and agree on the exit code.

        Collective: every rank must call.
        """
        if self._report is not None:
            self._exchange.answer("end", self._report.conclude())
        code = Code(self._exchange.listen("end", _GRACE_S))
        self._leave(range(self._exchange.size))
        return code

    def _leave(self, ranks: Iterable[int]) -> None:
        """Let rank 0 go last: the store may be its own."""
        with contextlib.suppress(LostError):  # gone already
            self._exchange.tell("leave", None)
            if self._report is not None:
                self._exchange.hear("leave", _GRACE_S, ranks)


def _attempt(part: Part) -> tuple[Any, dict[str, Any]]:
    """What this rank finds, and what it tells."""
    try:
        found = within(part.limit_s, part.look)
    except Exception as error:  # noqa: BLE001 - rank 0 is told, whatever it is
        return None, {"failed": f"{type(error).__name__}: {textwrap.shorten(str(error), 300)}"}
    return found, {"found": part.tell(found)}


def _answer(
    part: Part, heard: Mapping[int, Any], ranks: Iterable[int], report: Report
) -> dict[str, Any]:
    """Judge what was found, and put into words what was not."""
    found = {rank: told["found"] for rank, told in heard.items() if "found" in told}
    failed = {rank: told["failed"] for rank, told in heard.items() if "failed" in told}
    silent = {rank: "did not answer" for rank in ranks if rank not in heard}
    judged = part.judge(found) if found else Judged([])
    report.add(part.name, found, judged)
    if silent or failed:
        words = [who_said(report.with_hosts(of_ranks)) for of_ranks in (silent, failed) if of_ranks]
        what = f"{part.name}: {'; '.join(words)}."
        if part.code is None:
            report.show(Section("broken off", [(what,)]))
        else:
            report.fail(Failure(Code.MISSING if silent else part.code, what))
    return {
        # Concluded before the others hear of it: a launcher ends all ranks as soon as one fails.
        "ends_with": report.conclude() if silent or failed else None,
        "came": list(heard),
        "hand_on": judged.hand_on,
    }
