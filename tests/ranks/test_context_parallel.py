"""A sequence split over ranks: the verdict and the norm of the whole of it."""

from __future__ import annotations

import math

import pytest
import torch

from shardscale import ShardedGradScaler
from tests.ranks.models.context_parallel import Attention, lay_out, reference_grads
from tests.ranks.models.laid import equal, spoil, whole_bits

INF = math.inf
SCALE = 8.0
TOLERANCE = 1e-5
"""Relative: softmax is not exact, and sums over 16 tokens are made in another order; each of some
30 operations rounds by 2^-24."""


def train(rank, size):
    """(norm, parameters) of a good step; of a bad one what it left and the scale."""
    laid = lay_out(size)
    optimizer = torch.optim.SGD(laid.model.parameters(), lr=0.5)
    scaler = ShardedGradScaler("cpu", init_scale=SCALE, model=laid.model)
    laid.backward(scaler, 0)
    norm = scaler.clip_grad_norm_(optimizer, 0.5)
    scaler.step(optimizer)
    scaler.update()
    params, before = laid.whole(), whole_bits(laid)
    optimizer.zero_grad()
    laid.backward(scaler, 1)
    spoil(laid.model, rank, size - 1, INF)
    scaler.step(optimizer)
    scaler.update()
    return norm, params, equal(before, whole_bits(laid)), scaler.get_scale()


@pytest.mark.parametrize("size", [2, 4])
def test_a_split_sequence_trains_as_in_one_process_and_skips_together(ranks, size):
    """Contracts 40, 45: see the name."""
    model = Attention()
    reference_grads(model, size // 2, 0)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    expected = {name: p.detach() for name, p in model.named_parameters()}
    results = ranks.run(train, size)
    for measured, params, unmoved, scale in results:
        assert norm > 0.5
        torch.testing.assert_close(measured, norm, rtol=TOLERANCE, atol=0.0)
        torch.testing.assert_close(params, expected, rtol=TOLERANCE, atol=TOLERANCE)
        assert measured == results[0][0]
        assert (unmoved, scale) == (True, SCALE / 2)
