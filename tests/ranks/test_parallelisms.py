"""Optimizers of different ranks, and groups that are not the whole job."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import shardscale
from shardscale import ShardedGradScaler
from tests.ranks.rank import outcome, scratch

INF, NAN = math.inf, math.nan
SCALE = 8.0


def sgd(params):
    return torch.optim.SGD(params, lr=0.5, momentum=0.5)


# ---------------------------------------------------------------------- ownership, groups, backends


def own_different_numbers(rank, size, bad_rank, fused):
    """Rank r owns r optimizers of r + 1 elements each, all stepped by one call."""
    params = [torch.nn.Parameter(torch.ones(rank + 1)) for _ in range(rank)]
    optimizers = [torch.optim.AdamW([p], lr=0.5, weight_decay=0.0, fused=fused) for p in params]
    scaler = ShardedGradScaler("cpu", init_scale=SCALE)
    scaler.attach(torch.nn.ParameterList(params), copies=shardscale.distinct)
    scaler.scale(torch.ones(()))
    for p in params:
        p.grad = torch.full_like(p, SCALE)
    if rank == bad_rank:
        params[-1].grad[-1] = NAN
    norm = scaler.clip_grad_norm_(optimizers, INF)
    scaler.step(optimizers)
    scaler.update()
    stepped = [not torch.equal(p.detach(), torch.ones_like(p)) for p in params]
    return norm.item(), stepped, scaler.get_scale()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bad_rank", [None, 1, 3])
def test_ranks_that_own_different_numbers_of_optimizers_take_one_decision(ranks, bad_rank, fused):
    found = ranks.run(own_different_numbers, 4, bad_rank=bad_rank, fused=fused)
    good = bad_rank is None
    # Rank r holds r * (r + 1) gradients of 1.0: 0 + 2 + 6 + 12 of them.
    assert [stepped for _, stepped, _ in found] == [[good] * rank for rank in range(4)]
    assert {scale for _, _, scale in found} == {SCALE if good else SCALE / 2}
    for norm, _, _ in found:
        assert norm == pytest.approx(math.sqrt(20), rel=2.0**-22) if good else math.isnan(norm)


def train_three_of_four(rank, size, named):
    """Ranks 0 to 2 train; rank 3 serves something else and never calls a scaler."""
    group = dist.new_group([0, 1, 2])
    if rank == 3:
        return None
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.full((3,), INF if rank == 2 else SCALE)
    optimizer = torch.optim.SGD([p], lr=0.5)
    options = {"process_group": group} if named else {"timeout_s": 1.0}
    scaler = ShardedGradScaler("cpu", init_scale=SCALE, **options)
    scaler.scale(torch.ones(()))
    stepped = outcome(lambda: scaler.step(optimizer))
    if stepped.error is None:
        scaler.update()
    return stepped.error, p.tolist(), scaler.get_scale()


def test_a_named_group_agrees_without_the_ranks_outside(ranks):
    """Contract 42: see the name."""
    found = ranks.run(train_three_of_four, 4, named=True)
    assert found == [(None, [1.0] * 3, SCALE / 2)] * 3 + [None]


def test_an_unnamed_group_waits_for_them_and_says_so(ranks):
    found = ranks.run(train_three_of_four, 4, named=False)
    assert found == [("MissingRankError", [1.0] * 3, SCALE)] * 3 + [None]


def step_on_a_mesh(rank, size):
    mesh = init_device_mesh("cpu", (size,))
    p = torch.nn.Parameter(distribute_tensor(torch.ones(5), mesh, [Shard(0)]))
    p.grad = distribute_tensor(torch.full((5,), SCALE), mesh, [Shard(0)])
    scaler = ShardedGradScaler("cpu", init_scale=SCALE)
    optimizer = torch.optim.SGD([p], lr=1.0)
    if rank == 1:
        p.grad.to_local().fill_(NAN)
    scaler.step(optimizer)
    scaler.update()
    skipped = p.full_tensor().tolist(), scaler.get_scale()
    p.grad = distribute_tensor(torch.full((5,), SCALE / 2), mesh, [Shard(0)])
    norm = scaler.clip_grad_norm_(optimizer, INF).item()
    scaler.step(optimizer)
    scaler.update()
    return skipped, norm, p.full_tensor().tolist()


@pytest.mark.parametrize("backend", ["cpu:gloo,cuda:gloo", "cpu:gloo"])
def test_a_group_with_a_backend_per_device_agrees(ranks, backend):
    for skipped, norm, stepped in ranks.run(step_on_a_mesh, 2, backend=backend):
        assert skipped == ([1.0] * 5, SCALE / 2)
        assert norm == pytest.approx(math.sqrt(5), rel=2.0**-22)
        assert stepped == [0.0] * 5


def make_scaler_first(rank, size):
    """The scaler is made before the group: it must find the group at its first verdict."""
    scaler = ShardedGradScaler("cpu", init_scale=SCALE)
    store = dist.FileStore(str(scratch() / "late"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.full((3,), INF if rank == 1 else SCALE)
    scaler.scale(torch.ones(()))
    scaler.step(torch.optim.SGD([p], lr=0.5))
    scaler.update()
    return p.tolist(), scaler.get_scale()


def test_a_group_made_after_the_scaler_is_found(ranks):
    found = ranks.run(make_scaler_first, 3, backend=None)
    assert found == [([1.0] * 3, SCALE / 2)] * 3
