"""What a loop did, step by step, in bits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tests.ranks.models import local

__all__ = ["Trace"]


@dataclass
class Trace:
    """A trajectory; two are equal if every loss, scale, skip and weight is, bit for bit."""

    losses: list[float] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    skipped: list[bool] = field(default_factory=list)
    """As the loop itself saw it, in loops that ask."""
    weights: list[list[int]] = field(default_factory=list)
    """The bits of all that this rank holds."""

    def note(self, loss: Tensor | None, scale: float, params: Iterable[Tensor]) -> None:
        """One step is over; ``loss`` is None on a rank that sees none."""
        self.losses.append(-1.0 if loss is None else loss.item())
        self.scales.append(scale)
        bits = [local(p).flatten().view(torch.int32) for p in params]
        self.weights.append(torch.cat(bits).tolist())

    def without_scaler(self) -> Trace:
        """Without what a loop learns from its scaler alone: what can be compared with an oracle."""
        return replace(self, scales=[], skipped=[])
