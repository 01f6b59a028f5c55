"""The model of the demo: three linear layers of sizes that no rank count divides."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["DigitsNet", "parameter_names", "plain_name"]


class DigitsNet(nn.Module):
    """Classifies 8x8 images of digits.

    The widths are odd on purpose: under FSDP the last ranks own smaller shards than the others,
    or none at all, as it happens in real jobs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 257)
        self.second = nn.Linear(257, 53)
        self.head = nn.Linear(53, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, (batch, 10), of images, (batch, 64) float32 in 0..1."""
        hidden = torch.relu(self.first(images))
        hidden = torch.relu(self.second(hidden))
        logits: Tensor = self.head(hidden)
        return logits


def parameter_names() -> tuple[str, ...]:
    """Return the names of the parameters, as `--inject` takes them."""
    with torch.device("meta"):
        return tuple(name for name, _ in DigitsNet().named_parameters())


def plain_name(name: str) -> str:
    """Return a wrapped module's parameter name without what DDP and FSDP1 put into it."""
    return name.removeprefix("module.").replace("_fsdp_wrapped_module.", "")
