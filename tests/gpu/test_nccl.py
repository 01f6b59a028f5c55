"""A group of one rank over NCCL does its collective all the same, and all of it on the GPU."""

from __future__ import annotations

import math

import pytest
import torch

from shardscale import ShardedGradScaler, distinct
from tests.gpu.test_scaler import give_grads, host_reads_are, make_params

pytestmark = pytest.mark.gpu


def test_the_sum_over_one_rank_is_the_message_itself(comm):
    message = torch.tensor([2.0**52 + 1, 0.1], dtype=torch.float64, device="cuda")
    before = message.clone()
    comm.all_reduce_sum_(message)

    assert torch.equal(message.view(torch.int64), before.view(torch.int64))


@pytest.mark.parametrize("fused", [False, True])
def test_a_verdict_over_nccl_steps_and_skips(comm, fused):
    p = torch.nn.Parameter(torch.ones(3, device="cuda"))
    optimizer = torch.optim.SGD([p], lr=0.5, fused=fused)
    scaler = ShardedGradScaler("cuda", init_scale=4.0, comm=comm)
    values = []
    for grad in (4.0, math.nan, 2.0):
        scaler.scale(torch.ones((), device="cuda"))
        p.grad = torch.full_like(p, grad)
        scaler.step(optimizer)
        scaler.update()
        values.append((p[0].item(), scaler.get_scale()))

    assert values == [(0.5, 4.0), (0.5, 2.0), (0.0, 2.0)]
    assert comm.devices == ["cuda"] * 3


def test_flag_and_norm_are_one_collective(comm):
    params = make_params()
    for p in params:
        p.grad = torch.full_like(p, 8.0)
    expected = 2.0 * math.sqrt(sum(p.numel() for p in params))
    scaler = ShardedGradScaler("cuda", init_scale=4.0, comm=comm)
    scaler.attach(torch.nn.ParameterList(params), copies=distinct)
    optimizer = torch.optim.AdamW(params, fused=True)
    norm = scaler.clip_grad_norm_(optimizer, math.inf)
    scaler.step(optimizer)
    scaler.update()

    assert norm.item() == pytest.approx(expected, rel=1e-6)  # float32
    assert comm.devices == ["cuda"]


@pytest.mark.parametrize("how", ["step", "clip_grad_norm_"])
def test_agreeing_over_nccl_makes_the_host_wait_for_nothing(comm, how):
    params = make_params()
    optimizer = torch.optim.AdamW(params, fused=True)
    scaler = ShardedGradScaler("cuda", init_scale=1024.0, comm=comm)
    scaler.attach(torch.nn.ParameterList(params), copies=distinct)
    loss = torch.ones((), device="cuda")
    for iteration in range(3):
        give_grads(params, 1024.0, 0)
        with host_reads_are("default" if iteration == 0 else "error"):
            scaler.scale(loss)
            if how == "clip_grad_norm_":
                scaler.clip_grad_norm_(optimizer, 1.0)
            scaler.step(optimizer)
            scaler.update()
