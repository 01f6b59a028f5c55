"""What the host learns late: verdicts and reports, read one iteration after they were made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shardscale.caller import warn_caller
from shardscale.records import Agreement, Call, ScaleState, StepReport

__all__ = ["Flags", "Ledger", "Unread", "summary"]


class Flags(NamedTuple):
    """A verdict's flags, read by the host."""

    found: bool
    drifted: bool
    faulted: bool
    wished: bool


class Unread(NamedTuple):
    """A verdict whose flags the host has not read, and what this rank would tell about it."""

    agreement: Agreement
    call: Call
    fault: Exception | None


class _Suspicion(NamedTuple):
    """An optimizer whose gradients may have been added up over two scales."""

    name: str
    made_with: Tensor  # () float32
    unscaled_by: Tensor  # () float32; where both are equal, all is well


class _Page(NamedTuple):
    """One iteration, on its way to the host."""

    step: int
    # (4 + 4k + 2m,) float32 on the host: found, scale, next scale, norm, then the flags of
    # `unread`, then the scales of `suspicions`
    numbers: Tensor
    arrived: torch.Event | None  # the copy is done; None where there was nothing to copy
    unread: list[Unread]  # the iteration's k verdicts that the host did not read
    wished: bool  # one of the others carried a wish to stop
    suspicions: list[_Suspicion]  # m of them


class Ledger:
    """Verdicts the host has not seen, and reports of finished iterations.

    With a fused optimizer nothing is read while an iteration runs. Its numbers start their way to
    the host at ``update``, and are read at the next ``update``, when they have long arrived; on the
    CPU too, so that what is tested there is what happens on a GPU.
    """

    def __init__(self) -> None:
        self.last_report: StepReport | None = None
        self._wished_at: int | None = None  # the first iteration known to have carried a wish
        self._num_skipped = 0
        self._unread: dict[int, Unread] = {}
        self._read: dict[int, tuple[Agreement, Flags]] = {}  # kept, so that no other takes its id
        self._suspicions: list[_Suspicion] = []
        self._page: _Page | None = None
        self._num_skips_at_floor = 0
        self._warned_of: set[str] = set()

    @property
    def num_skipped(self) -> int:
        """Skipped iterations so far, the one not read yet included.

        Sync: waits for a copy that was started an iteration ago.
        """
        if self._page is None:
            return self._num_skipped
        if self._page.arrived is not None:
            self._page.arrived.synchronize()
        return self._num_skipped + int(self._page.numbers[0].item())

    @num_skipped.setter
    def num_skipped(self, num: int) -> None:
        self._num_skipped = num

    def note(self, unread: Unread) -> None:
        """Remember a verdict that was just made."""
        self._unread[id(unread.agreement)] = unread

    def suspect(self, name: str, made_with: Tensor, unscaled_by: Tensor) -> None:
        """Have an optimizer's scales compared once the host can see them.

        Args:
            name: Of the optimizer, for a warning.
            made_with: () float32, the scale that a part of its gradients was made with.
            unscaled_by: () float32, the scale that all of them are divided by.
        """
        self._suspicions.append(_Suspicion(name, made_with, unscaled_by.clone()))

    def find(self, agreement: Agreement) -> Unread | None:
        """What was noted of a verdict that is not read yet."""
        return self._unread.get(id(agreement))

    def read(self, agreement: Agreement) -> Flags:
        """The flags of a verdict, now.

        Sync: one read of a verdict not read before.
        """
        self._unread.pop(id(agreement), None)
        if id(agreement) not in self._read:
            flags = Flags(*(flag > 0 for flag in agreement.flags.tolist()))
            self._read[id(agreement)] = (agreement, flags)
        return self._read[id(agreement)][1]

    def unread(self) -> list[Unread]:
        """Every verdict that the host has not read, oldest first."""
        return [*(self._page.unread if self._page else []), *self._unread.values()]

    def knew_of_a_wish(self, step: int) -> bool:
        """Whether an iteration before ``step`` carried a wish to stop.

        Of the iteration closed last some ranks know, and others, which read it late, do not yet.
        Of those before it all ranks know, so for it the answer is the same everywhere.
        """
        return self._wished_at is not None and self._wished_at < step

    def drop(self) -> None:
        """Forget the verdicts of an iteration that no update will close."""
        self._unread, self._read, self._suspicions = {}, {}, []

    def turn(
        self,
        step: int,
        scale: Tensor,
        next_scale: Tensor,
        agreements: Sequence[tuple[Agreement, Call]],
        floor: float | None,
    ) -> None:
        """Close an iteration: its numbers set out for the host.

        Args:
            step: The iteration's number.
            scale: () float32, before the update.
            next_scale: () float32, after it.
            agreements: The iteration's verdicts.
            floor: The smallest scale of the policy, if it has one.

        Sync: none.
        """
        if not agreements:
            self.drop()
            return
        # The state is about to change in place, but what is told of a call is how it was made.
        unread = [u._replace(call=_snapshot(u.call)) for u in self._unread.values()]
        found_inf, norm = summary(agreements)
        on = found_inf.device
        rest = torch.stack([t.to(on) for t in (found_inf, scale, next_scale, norm)])
        scales = [torch.stack([t.to(on) for t in s[1:]]) for s in self._suspicions]
        numbers = torch.cat([rest, *(u.agreement.flags for u in unread), *scales])
        arrived = None
        if not numbers.is_cpu:
            numbers = numbers.to("cpu", non_blocking=True)
            arrived = torch.Event(on.type)
            arrived.record()
        wished = any(flags.wished for _, flags in self._read.values())
        self._page = _Page(step, numbers, arrived, unread, wished, self._suspicions)
        self.drop()
        if not unread and arrived is None:
            self.open(floor)

    def open(self, floor: float | None) -> list[Unread]:
        """Read the iteration closed last, if it was not read yet.

        Returns:
            Those of its verdicts that drifted or faulted and were not read in time.

        Sync: waits for a copy that was started an iteration ago.
        """
        page, self._page = self._page, None
        if page is None:
            return []
        if page.arrived is not None:
            page.arrived.synchronize()
        found, scale, next_scale, norm, *more = page.numbers.tolist()
        flags, scales = more[: 4 * len(page.unread)], more[4 * len(page.unread) :]
        if self._wished_at is None and (page.wished or any(flags[3::4])):
            self._wished_at = page.step
        skipped = found > 0
        self._num_skipped += skipped
        self.last_report = StepReport(page.step, scale, next_scale, skipped, norm, ())
        self._warn_at_floor(self.last_report, floor)
        for suspicion, made_with, unscaled_by in zip(
            page.suspicions, scales[::2], scales[1::2], strict=True
        ):
            self._warn_of_two_scales(suspicion.name, made_with, unscaled_by)
        return [
            unread
            for unread, drifted, faulted in zip(page.unread, flags[1::4], flags[2::4], strict=True)
            if drifted or faulted
        ]

    def _warn_at_floor(self, report: StepReport, floor: float | None) -> None:
        at_floor = floor is not None and report.skipped and report.next_scale <= floor
        self._num_skips_at_floor = self._num_skips_at_floor + 1 if at_floor else 0
        if self._num_skips_at_floor == 2:
            warn_caller(
                f"steps are skipped although the scale is at its floor, {floor:g}: scaling is not "
                "the cause. Look for Inf or NaN in the data, the loss or the learning rate.",
            )

    def _warn_of_two_scales(self, name: str, made_with: float, unscaled_by: float) -> None:
        if made_with == unscaled_by or name in self._warned_of:
            return
        self._warned_of.add(name)
        warn_caller(
            f"gradients of {name} were added up over two scales, {made_with:g} and "
            f"{unscaled_by:g}, because update() changed the scale while they had not been stepped "
            f"yet. All of them are divided by {unscaled_by:g}, so the older part counts "
            f"{made_with / unscaled_by:g} times. Step or zero them before update(), or give that "
            "optimizer a scaler of its own.",
        )


def summary(agreements: Sequence[tuple[Agreement, Call]]) -> tuple[Tensor, Tensor]:
    """Of an iteration's verdicts the joint flag and the norm, both () float32."""
    newest, _ = agreements[-1]
    found_inf = newest.found_inf
    if len(agreements) > 1:
        found_inf = torch.stack([agreement.found_inf for agreement, _ in agreements]).amax()
    normed = [a.grad_norm for a, call in agreements if call.max_norm is not None]
    return found_inf, normed[-1] if normed else newest.grad_norm


def _snapshot(call: Call) -> Call:
    state = ScaleState(*map(Tensor.clone, call.state))
    stamp = state.scale if call.stamp is call.state.scale else call.stamp.clone()
    max_norm = call.max_norm.clone() if isinstance(call.max_norm, Tensor) else call.max_norm
    replayed = None if call.num_replayed is None else call.num_replayed.clone()
    return call._replace(state=state, stamp=stamp, max_norm=max_norm, num_replayed=replayed)
