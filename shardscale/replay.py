"""What an iteration leaves on the device when a graph replays it, out of Python's sight."""

from __future__ import annotations

import torch
from torch import Tensor

from shardscale.errors import StageError
from shardscale.records import Agreement, StepReport

__all__ = ["Replays", "refuse_capture"]


class Replays:
    """Tensors that captured kernels read and write, the same ones as long as a graph may live.

    They are made before a capture, for what is made inside is made anew by each replay. What Python
    counts stands still while a graph is replayed: updates, skips and the verdict before this one,
    whose bits are part of the message, go on here.

    Args:
        device: Where the scale lives.
    """

    def __init__(self, device: torch.device) -> None:
        self.num_updates = torch.zeros((), dtype=torch.int64, device=device)  # made by replays
        self.num_skipped = torch.zeros((), dtype=torch.int64, device=device)  # likewise
        # (4,) float32: skipped, scale, next scale, norm of the newest iteration, replayed or not
        self._report = torch.full((4,), torch.nan, dtype=torch.float32, device=device)
        self._previous: Agreement | None = None
        self.has_captured = False

    def begin(self, previous: Agreement | None) -> None:
        """A graph is captured: the verdict before it is where all later ones are written to."""
        if not self.has_captured:
            self.has_captured = True
            self._previous = previous

    def remember_(self, agreement: Agreement) -> Agreement:
        """Write a verdict over the one before it, in place; the one that holds it now."""
        if self._previous is None:  # alone, no verdict looks at the one before it
            return agreement
        for mine, new in zip(self._previous, agreement, strict=True):
            mine.copy_(new)
        return self._previous

    def close_(
        self, captured: bool, found_inf: Tensor, scale: Tensor, next_scale: Tensor, norm: Tensor
    ) -> None:
        """An update is made.

        Args:
            captured: Whether it is one of a graph, and counted when it is replayed.
            found_inf: () float32, as are the others: the joint flag of the iteration.
            scale: Before the update.
            next_scale: After it.
            norm: Of the gradients; NaN if not computed.
        """
        if captured:
            self.num_updates.add_(1)
            self.num_skipped.add_((found_inf > 0).long())
        numbers = (found_inf, scale, next_scale, norm)
        self._report.copy_(torch.stack([number.to(scale.device) for number in numbers]))

    def forget_(self) -> None:
        """Begin anew, in the same tensors: a state was loaded."""
        if self._previous is not None:
            for mine in self._previous:
                mine.zero_()
        self.num_updates.zero_()
        self.num_skipped.zero_()
        self._report.fill_(torch.nan)

    def counts(self) -> tuple[int, int]:
        """Updates that replays have made, and how many of them skipped.

        Sync: two reads, none before a capture.
        """
        if not self.has_captured:
            return 0, 0
        return int(self.num_updates.item()), int(self.num_skipped.item())

    def report(self, num_updates: int) -> StepReport | None:
        """The newest iteration, after ``num_updates`` that Python has counted; None before one.

        Sync: one read.
        """
        skipped, scale, next_scale, norm = self._report.tolist()
        if skipped != skipped:  # NaN
            return None
        step = num_updates + self.counts()[0] - 1
        return StepReport(step, scale, next_scale, skipped > 0, norm, ())


def refuse_capture(sync: bool, is_warm: bool, has_begun_outside: bool) -> None:
    """Refuse to capture what a graph cannot hold.

    Args:
        sync: Whether the host reads every verdict.
        is_warm: Whether an iteration is over, so that what a graph goes on from is there.
        has_begun_outside: Whether this iteration has a verdict that is in no graph.

    Raises:
        StageError: says which it is.
    """
    if sync:
        reason = "with sync=True the host reads every verdict, and in a graph it cannot"
    elif not is_warm:
        reason = (
            "no iteration of it is over yet on this device, and what a graph goes on from must "
            "exist before it. Run one as usual first"
        )
    elif has_begun_outside:
        reason = (
            "a verdict of this iteration was made outside, where no replay looks for it. Capture "
            "unscale_, clip_grad_norm_, step and update together"
        )
    else:
        return
    raise StageError(f"this scaler cannot be captured into a graph now: {reason}.")
