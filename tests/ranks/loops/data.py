"""A rank's batches, and gradients that overflow with one of them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._comm_hooks import default_hooks
from torch.distributed.fsdp import FullyShardedDataParallel

from tests.ranks.models import batch, local

__all__ = ["Batches"]


class Batches:
    """Endless batches of whole numbers, others on each rank.

    Args:
        rank: Of this process.
        overflows_at: With which of them, counted from 0, a gradient overflows; None for none.
        bad_rank: The one rank on which it does.
    """

    def __init__(self, rank: int, overflows_at: int | None = None, bad_rank: int = 0) -> None:
        self._rank = rank
        self._overflows_at = overflows_at if rank == bad_rank else None
        self._num_given = 0

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Tensor:
        self._num_given += 1
        return batch(self._rank, self._num_given - 1)

    def spoil(self, model: nn.Module, params: Iterable[Tensor] | None = None) -> None:
        """Let the overflow happen in this model, as if arithmetic had brought it about.

        With DDP it comes before the gradients are averaged, with FSDP after they are scattered: an
        Inf in one rank's shard alone.

        Args:
            model: All of it is about to be trained.
            params: Where in it; the first of them of which this rank holds an element is hit.
        """
        if isinstance(model, FullyShardedDataParallel):
            state = default_hooks.DefaultState(model.process_group)
            model.register_comm_hook(state, self._scatter)
            return
        held = [p for p in params or model.parameters() if local(p).numel()]
        if held:
            held[0].register_post_accumulate_grad_hook(lambda p: self._hit(local(p.grad)))

    def _hit(self, grad: Tensor) -> None:
        if self._num_given - 1 == self._overflows_at:
            with torch.no_grad():
                grad.view(-1)[0] = math.inf

    def _scatter(self, state: default_hooks.DefaultState, grad: Tensor, shard: Tensor) -> None:
        default_hooks.reduce_scatter_hook(state, grad, shard)
        self._hit(shard)
