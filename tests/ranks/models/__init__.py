"""A small network laid out over the ranks in every way that torch has."""

from __future__ import annotations

import torch

from tests.ranks.models import by_hand, data_parallel, pipeline, tensor_parallel
from tests.ranks.models.data_parallel import held_back
from tests.ranks.models.laid import Laid, equal, local, local_grads, spoil, whole_bits
from tests.ranks.models.net import batch, make_net, reference_grads

__all__ = [
    "EVERY_LAYOUT",
    "LAYOUTS",
    "Laid",
    "batch",
    "equal",
    "held_back",
    "lay_out",
    "local",
    "local_grads",
    "make_net",
    "reference_grads",
    "spoil",
    "whole_bits",
]

LAYOUTS = {
    **data_parallel.LAYOUTS,
    **by_hand.LAYOUTS,
    **tensor_parallel.LAYOUTS,
    **pipeline.LAYOUTS,
}
"""Name -> how to lay the network out, and on how many ranks to test that."""

EVERY_LAYOUT = [(name, size) for name, layout in LAYOUTS.items() for size in layout.sizes]
"""Pairs of name and number of ranks, for ``lay_out``."""


def lay_out(name: str, size: int, dtype: torch.dtype = torch.float32) -> Laid:
    """The network in one of ``LAYOUTS``; called on each of ``size`` ranks."""
    return LAYOUTS[name].lay(size, dtype)
