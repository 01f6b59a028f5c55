"""The data of the demo: scikit-learn's handwritten digits, which ship inside that package."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Digits", "share_digits", "test_set", "training_batches"]

_NUM_TEST = 360
_BATCH = 64


class Digits(NamedTuple):
    """Images, (1797, 64) float32 in 0..1, and their labels, (1797,) int64, shuffled."""

    images: Tensor
    labels: Tensor


def share_digits(device: torch.device) -> Digits:
    """Read the data on rank 0 from the installed package and hand them to every rank.

    Importing scikit-learn takes seconds, which one rank spends instead of all.

    Collective: every rank must call; broadcasts the data once.
    """
    sent: list[Digits | None] = [_read_digits() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(sent, src=0, device=device)
    digits = sent[0]
    assert digits is not None
    return Digits(digits.images.to(device), digits.labels.to(device))


def training_batches(digits: Digits, rank: int, ranks: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw batches forever from the images that belong to this rank.

    Returns:
        Pairs of images, (64, 64) float32, and labels, (64,) int64.
    """
    images, labels = (part[_NUM_TEST + rank :: ranks] for part in digits)
    generator = torch.Generator().manual_seed(rank)
    while True:
        chosen = torch.randint(len(labels), (_BATCH,), generator=generator).to(labels.device)
        yield images[chosen], labels[chosen]


def test_set(digits: Digits) -> tuple[Tensor, Tensor]:
    """Return the images, (360, 64) float32, and labels, (360,) int64, that no rank trains on."""
    return digits.images[:_NUM_TEST], digits.labels[:_NUM_TEST]


def _read_digits() -> Digits:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    grey_levels = torch.from_numpy(images).float()
    return Digits(grey_levels[order] / 16, torch.from_numpy(labels).long()[order])
