"""Whether what is launched now runs, or is recorded into a graph."""

from __future__ import annotations

import torch

__all__ = ["is_capturing"]


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched on the device now is recorded into a graph, and not run."""
    if device.type == "cpu":
        return False
    asks = getattr(getattr(torch, device.type, None), "is_current_stream_capturing", None)
    return asks is not None and bool(asks())
