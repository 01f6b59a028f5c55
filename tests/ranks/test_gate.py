"""Optimizers that are gated skip together on the device, and the host waits for nothing."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from shardscale import ShardedGradScaler, skip_on_device
from tests.ranks import accelerator
from tests.ranks.accelerator import NAME, TRANSPORT
from tests.ranks.models import equal, make_net

SCALE = 8.0
MAKERS = {
    "RMSprop": lambda params, **how: torch.optim.RMSprop(params, lr=0.25, momentum=0.5, **how),
    "NAdam": lambda params, **how: torch.optim.NAdam(params, lr=0.25, **how),
    "SGD": lambda params, **how: torch.optim.SGD(params, lr=0.25, momentum=0.5),
}


def skip_on_the_device(rank, size):
    """{(optimizer, foreach): waits and moves of each iteration}; rank 1 overflows in the third."""
    accelerator.install()
    group = dist.new_group(backend=f"cpu:gloo,{NAME}:{TRANSPORT}")
    return {
        (name, foreach): skip_once(rank, group, name, foreach)
        for name in MAKERS
        for foreach in (False, True)
    }


def skip_once(rank, group, name, foreach):
    params = [torch.nn.Parameter(torch.ones(3, device=NAME)) for _ in range(2)]
    optimizer = skip_on_device(MAKERS[name](params, foreach=foreach, capturable=True))
    scaler = ShardedGradScaler(NAME, init_scale=SCALE, process_group=group)
    history = []
    for step in range(5):
        is_bad = step == 2 and rank == 1
        for p in params:
            p.grad = torch.full_like(p, math.inf if is_bad else SCALE if step < 3 else SCALE / 2)
        before = params[0].tolist()
        with accelerator.counted_waits() as counted:
            scaler.scale(torch.ones((), device=NAME))
            scaler.step(optimizer)
            scaler.update()
        history.append((counted[0], params[0].tolist() != before))
    return history, scaler.get_scale()


def test_the_host_waits_for_the_first_step_alone_and_all_ranks_skip(ranks):
    """On a stand-in for an accelerator; that of the first step is for state not made before."""
    for found in ranks.run(skip_on_the_device, 2):
        for how, (history, scale) in found.items():
            waits, moved = zip(*history, strict=True)
            assert moved == (True, True, False, True, True), how
            assert waits == (1, 0, 0, 0, 0), how
            assert scale == SCALE / 2, how


def counter_on_the_host(rank, size):
    accelerator.install()
    p = torch.nn.Parameter(torch.ones(3, device=NAME))
    optimizer = skip_on_device(torch.optim.RMSprop([p], lr=0.25))  # not capturable
    scaler = ShardedGradScaler(NAME, init_scale=SCALE)
    errors = []
    for _ in range(2):
        p.grad = torch.full_like(p, SCALE)
        try:
            scaler.step(optimizer)
            scaler.update()
        except ValueError as error:
            errors.append(str(error))
    return errors, p.tolist()


def test_a_step_counter_on_the_host_is_refused_with_the_cure(ranks):
    ((errors, _),) = ranks.run(counter_on_the_host, 1, backend=None)
    (error,) = errors
    assert "keeps 'step' of its state on cpu, but its parameter is on toy" in error
    assert "capturable=True" in error


def train_sharded(rank, size):
    """Whether a gated optimizer under FSDP2 ends as one that the host skips, for each optimizer."""
    found = {}
    for name, make in MAKERS.items():
        ends = []
        for gate in (skip_on_device, lambda optimizer: optimizer):
            net = make_net()
            for layer in (*net.children(), net):
                fully_shard(layer)
            optimizer = gate(make(net.parameters()))
            scaler = ShardedGradScaler("cpu", init_scale=SCALE)
            for step in range(4):
                optimizer.zero_grad()
                inputs = torch.full((2, 5), step + rank + 1.0)
                scaler.scale(net(inputs).square().mean()).backward()
                if step == 2 and rank == size - 1:
                    net[0].weight.grad._local_tensor.fill_(math.nan)
                scaler.step(optimizer)
                scaler.update()
            ends.append({n: p.full_tensor().detach() for n, p in net.named_parameters()})
            ends[-1]["scale"] = torch.tensor(scaler.get_scale())
        found[name] = equal(*ends)
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_sharded_parameters_end_where_the_host_would_have_left_them(ranks, size):
    """Three ranks leave one of them without a row of some parameter."""
    assert ranks.run(train_sharded, size) == [dict.fromkeys(MAKERS, True)] * size
