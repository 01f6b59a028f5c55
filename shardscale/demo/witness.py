"""Counts the steps a rank really took, without asking its scaler."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from shardscale.demo.wrap import local

__all__ = ["StepWitness"]


class StepWitness:
    """Compares the bytes of this rank's parameters before and after every step.

    A scaler that thinks it stepped, or thinks it skipped, is the suspect here, so its own count is
    no evidence. Neither is the optimizer's ``state["step"]``: SGD keeps none. The parameters are
    what has to agree in the end: with gradients of real data every applied step changes some of
    their bits, and a skipped one changes none.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._digest = self.digest()
        self.applied = 0
        self.skipped = 0
        self.just_skipped = False

    def observe(self) -> None:
        """Count the step just made as applied or skipped."""
        digest = self.digest()
        self.just_skipped = digest == self._digest
        if self.just_skipped:
            self.skipped += 1
        else:
            self.applied += 1
        self._digest = digest

    def digest(self) -> str:
        """Return the first 12 hex digits of the SHA-256 of the parameter bytes this rank holds."""
        sha = hashlib.sha256()
        for parameter in self._model.parameters():
            piece = local(parameter).contiguous().cpu()
            sha.update(piece.view(torch.uint8).numpy().tobytes() if piece.numel() else b"")
        return sha.hexdigest()[:12]
