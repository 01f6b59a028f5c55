"""`clip_grad_norm_`: the norm counts every value once, and clips as one process would."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import shardscale
from shardscale import ShardedGradScaler
from tests.ranks.models import (
    batch,
    equal,
    lay_out,
    local_grads,
    spoil,
    whole_bits,
)
from tests.ranks.rank import outcome

INF, NAN = math.inf, math.nan
SCALE = 8.0
ROUNDING = 2.0**-22
"""Relative: a norm passes a few roundings to float32, of 2^-24 each."""


def sgd(params):
    return torch.optim.SGD(params, lr=0.5, momentum=0.5)


def clip_with_experts(rank, size):
    """A first layer that DDP replicates, and an expert of this rank's own behind it."""
    shared = DistributedDataParallel(torch.nn.Linear(5, 7))
    expert = torch.nn.Linear(7, 3)
    for p in [*shared.parameters(), *expert.parameters()]:
        torch.nn.init.ones_(p)
    model = torch.nn.ModuleList([shared, expert])
    optimizer = sgd(model.parameters())
    scaler = ShardedGradScaler("cpu", init_scale=SCALE)
    scaler.attach(model, copies=shardscale.distinct)
    scaler.scale(expert(shared(batch(rank, 0))).sum() * (rank + 1)).backward()
    norm = scaler.clip_grad_norm_(optimizer, INF).item()
    shared_squares, own_squares = (
        sum((p.grad.double() ** 2).sum().item() for p in part.parameters())
        for part in (shared, expert)
    )
    return norm, shared_squares, own_squares


def test_the_norm_counts_what_is_shared_once_and_each_expert(ranks):
    """Contract 45: see the name."""
    found = ranks.run(clip_with_experts, 4)
    expected = math.sqrt(found[0][1] + sum(own for _, _, own in found))
    assert len({own for _, _, own in found}) == 4
    for norm, _, _ in found:
        assert norm == pytest.approx(expected, rel=ROUNDING)


def clip_declared_copies(rank, size, declare):
    """Plain tensors, by hand: ranks 0 and 2 hold one shard, 1 and 3 another, rank 3 one more."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    model = torch.nn.ParameterDict({"shard": torch.nn.Parameter(torch.ones(4))})
    if rank == 3:
        model["alone"] = torch.nn.Parameter(torch.ones(7))
    for p in model.values():
        p.grad = torch.full_like(p, SCALE * (rank % 2 + 1))
    where = {"ranks": [rank % 2, rank % 2 + 2], "group": groups[rank % 2]}[declare]
    scaler = ShardedGradScaler("cpu", init_scale=SCALE)
    scaler.attach(model, copies=lambda name, p: where if name == "shard" else None)
    return scaler.clip_grad_norm_(torch.optim.SGD(model.values()), INF).item()


@pytest.mark.parametrize("declare", ["ranks", "group"])
def test_the_norm_counts_declared_copies_once(ranks, declare):
    """Contract 45: 4 ones, 4 twos, and 7 twos: each once."""
    norm = math.sqrt(4 + 16 + 28)
    for found in ranks.run(clip_declared_copies, 4, declare=declare):
        assert found == pytest.approx(norm, rel=ROUNDING)


def clip_a_bad_one(rank, size, name, value):
    laid = lay_out(name, size)
    scaler = ShardedGradScaler("cpu", init_scale=SCALE)
    scaler.attach(laid.model, copies=laid.copies)
    optimizer = sgd(laid.model.parameters())
    laid.backward(scaler, step=0)
    before = whole_bits(laid)
    # DDP has reduced its gradients: all replicas hold the same bad value.
    spoil(laid.model, rank, rank if name == "DDP" else size // 2, value)
    norm = scaler.clip_grad_norm_(optimizer, 0.5)
    largest = max(g.abs().nan_to_num(posinf=0.0).max().item() for g in local_grads(laid.model))
    scaler.step(optimizer)
    scaler.update()
    return norm.item(), largest, equal(before, whole_bits(laid)), scaler.get_scale()


@pytest.mark.parametrize("name", ["DDP", "FSDP1 FULL_SHARD original", "FSDP2", "hand-sharded"])
@pytest.mark.parametrize("value", [INF, NAN])
def test_a_norm_that_is_not_finite_is_returned_and_clips_nothing(ranks, name, value):
    for norm, largest, unmoved, scale in ranks.run(clip_a_bad_one, 3, name=name, value=value):
        assert math.isnan(norm) if math.isnan(value) else norm == INF
        assert largest != 0.0
        assert (unmoved, scale) == (True, SCALE / 2)


def clip_without_attach(rank, size, name):
    laid = lay_out(name, size)
    scaler = ShardedGradScaler("cpu", init_scale=SCALE)
    optimizer = sgd(laid.model.parameters())
    laid.backward(scaler, step=0)
    before = whole_bits(laid)
    clipped = outcome(lambda: scaler.clip_grad_norm_(optimizer, 0.5))
    return clipped.error, clipped.message, equal(before, whole_bits(laid))


def test_the_norm_of_plain_tensors_is_refused_until_their_owner_is_known(ranks):
    """Copies or other parameters: nothing tells which, and either guess is wrong half of the
    time."""
    for error, message, unmoved in ranks.run(clip_without_attach, 2, name="hand-sharded"):
        assert error == "LayoutError"
        assert "attach" in message
        assert unmoved
