"""One call, one collective; and nothing in the store on good steps."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from shardscale import ShardedGradScaler
from tests.ranks.counting import count_collectives
from tests.ranks.models import LAYOUTS, lay_out, local_grads
from tests.ranks.rank import store

CALLS = {
    "step": [("step", 1)],
    "step a sequence": [("step_all", 1)],
    "unscale_, step": [("unscale_", 1), ("step", 0)],
    "unscale_, verdict, step": [("unscale_", 1), ("verdict", 0), ("step", 0)],
    "clip_grad_norm_, step": [("clip", 1), ("step", 0), ("verdict", 0)],
    "unscale_, clip_grad_norm_, step": [("unscale_", 1), ("clip", 1), ("step", 0)],
}
"""What an iteration calls, and how many collectives each of them may send; `update` none."""


def call(scaler, optimizer, what):
    return {
        "step": lambda: scaler.step(optimizer),
        "step_all": lambda: scaler.step([optimizer]),
        "unscale_": lambda: scaler.unscale_(optimizer),
        "clip": lambda: scaler.clip_grad_norm_(optimizer, 0.5),
        "verdict": lambda: scaler.verdict(optimizer),
    }[what]()


def count_iterations(rank, size, name):
    """{(fused, calls, goodness): [(what, collectives counted, requests to the store)]}."""
    found = {}
    for fused in (False, True):
        laid = lay_out(name, size)
        optimizer = torch.optim.AdamW(laid.model.parameters(), lr=0.5, fused=fused)
        for calls, sequence in CALLS.items():
            scaler = ShardedGradScaler("cpu", init_scale=8.0)
            scaler.attach(laid.model, copies=laid.copies)
            for goodness in ("first", "second", "bad"):
                optimizer.zero_grad()
                laid.backward(scaler, step=0)
                if goodness == "bad" and rank == 0:
                    local_grads(laid.model)[0].view(-1)[0] = math.nan
                counts = found[fused, calls, goodness] = []
                to_sum = 2 * laid.num_sums  # what will be sent, and then that; by the first call
                for what in [*(what for what, _ in sequence), "update"]:
                    store().requests.clear()
                    with count_collectives() as counted:
                        scaler.update() if what == "update" else call(scaler, optimizer, what)
                    counts.append((what, counted.num - to_sum, list(store().requests)))
                    to_sum = 0
    return found


@pytest.mark.parametrize(
    ("name", "size"), [(name, max(2, min(layout.sizes))) for name, layout in LAYOUTS.items()]
)
def test_one_collective_a_call_in_every_layout(ranks, name, size):
    """Contract 44: as the name says.

    Flag, norm and drift check together; sums of Partial gradients apart. Only at `update` may a
    skip gather culprits.
    """
    for found in ranks.run(count_iterations, size, name=name, store="counting"):
        for (fused, calls, goodness), counts in found.items():
            expected = [(what, num, []) for what, num in CALLS[calls]]
            assert counts[:-1] == expected, (fused, calls, goodness)
            if goodness != "bad":
                assert counts[-1] == ("update", 0, []), (fused, calls, goodness)


def count_for_a_mix(rank, size):
    """Two dtypes on a 2-D mesh, one axis replicated in between, and a plain tensor, in two
    optimizers."""
    mesh = init_device_mesh("cpu", (2, 2))
    params = [torch.nn.Parameter(torch.ones(3))]
    for dtype in (torch.float32, torch.bfloat16):
        for placements in ([Shard(0), Shard(0)], [Replicate(), Shard(0)]):
            local = torch.ones(2, dtype=dtype)
            params.append(torch.nn.Parameter(DTensor.from_local(local, mesh, placements)))
    for p in params:
        p.grad = torch.full_like(p, 8.0)
    optimizers = [torch.optim.SGD(some, lr=0.5, foreach=False) for some in (params[:2], params[2:])]
    scaler = ShardedGradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    with count_collectives() as counted:
        scaler.step(optimizers)
        scaler.update()
    return counted.num, [dist.get_world_size()]


def test_one_collective_for_several_optimizers_dtypes_meshes_and_plain_tensors(ranks):
    """Contract 44: see the name."""
    assert ranks.run(count_for_a_mix, 4) == [(1, [4])] * 4


def count_alone(rank, size, grouped):
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.full_like(p, 8.0)
    optimizer = torch.optim.SGD([p], lr=0.5)
    scaler = ShardedGradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    if not grouped:
        scaler.step(optimizer)
        return 0, p.tolist()
    with count_collectives() as counted:
        scaler.step(optimizer)
        scaler.update()
    return counted.num, p.tolist()


@pytest.mark.parametrize("backend", [None, "gloo"])
def test_a_job_of_one_rank_sends_nothing(ranks, backend):
    found = ranks.run(count_alone, 1, backend=backend, grouped=backend is not None)
    assert found == [(0, [0.5] * 3)]


def count_empty_calls(rank, size):
    """A rank that owns nothing sends as often as the others: `()` after a verdict of `()` is
    free."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([p], lr=0.5)
    mine = () if rank == 1 else optimizer
    scaler = ShardedGradScaler("cpu", init_scale=8.0)
    counts = []
    for unscales_first in (False, True):
        scaler.scale(torch.ones(()))
        p.grad = torch.full_like(p, 8.0)
        with count_collectives() as counted:
            if unscales_first:
                scaler.unscale_(mine)
            scaler.step(mine)
            scaler.update()
        counts.append(counted.num)
    return counts


def test_a_rank_without_optimizers_sends_as_often_as_the_others(ranks):
    assert ranks.run(count_empty_calls, 3) == [[1, 1]] * 3
