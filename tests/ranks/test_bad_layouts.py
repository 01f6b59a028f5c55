"""Layouts that are wrong or unknown: an error within the timeout, on every rank, nothing moved."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import shardscale
from shardscale import ShardedGradScaler
from tests.ranks.models import batch, local, make_net
from tests.ranks.rank import outcome

SCALE = 8.0
TIMEOUT_S = 3.0
CALLS = {
    "unscale_": lambda scaler, optimizers: scaler.unscale_(optimizers),
    "clip_grad_norm_": lambda scaler, optimizers: scaler.clip_grad_norm_(optimizers, 1.0),
    "step": lambda scaler, optimizers: scaler.step(optimizers),
}


def parameter(value=1.0):
    """(4,) ones with a gradient of the scale."""
    param = nn.Parameter(torch.full((4,), value))
    param.grad = torch.full((4,), SCALE)
    return param


def scaler_of(*params, copies=shardscale.distinct, **options):
    scaler = ShardedGradScaler("cpu", init_scale=SCALE, timeout_s=TIMEOUT_S, **options)
    return scaler.attach(nn.ParameterList(params), copies=copies)


def told(call):
    """The error's type and message."""
    found = outcome(call)
    return found.error, found.message


# ------------------------------------------------------------------------------- outside the group


def agree_with_half(rank, size):
    """A mesh of four ranks, a scaler for each half of them."""
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mesh = init_device_mesh("cpu", (4,))
    found = {}
    for call, is_attached in [(c, a) for c in CALLS for a in (False, True)]:
        param = nn.Parameter(distribute_tensor(torch.ones(8), mesh, [Shard(0)]))
        param.grad = distribute_tensor(torch.full((8,), SCALE), mesh, [Shard(0)])
        scaler = ShardedGradScaler(
            "cpu", init_scale=SCALE, timeout_s=TIMEOUT_S, process_group=halves[rank // 2]
        )
        if is_attached:
            scaler.attach(nn.ParameterList([param]), copies=shardscale.distinct)
        optimizer = torch.optim.SGD([param], lr=1.0)
        error, message = told(lambda: CALLS[call](scaler, optimizer))  # noqa: B023
        found[call, is_attached] = error, message, local(param).tolist()
    return found


def test_a_mesh_that_reaches_out_of_the_agreeing_group_is_refused(ranks):
    """The ranks outside would step or skip without the others, whatever the call."""
    for found in ranks.run(agree_with_half, 4):
        for key, (error, message, values) in found.items():
            assert error == "LayoutError", key
            assert "held by ranks 0-3, but this scaler agrees with ranks" in message
            assert "process_group=" in message
            assert values == [1.0, 1.0]


def leave_out_a_stage(rank, size, how):
    """Three pipeline stages; the scaler's group was made of the first two."""
    group = dist.new_group([0, 1])
    if rank < 2:
        params = [parameter()]
        scaler = scaler_of(*params, process_group=group)
        error, message = told(lambda: scaler.step(torch.optim.SGD(params, lr=1.0)))
        return error, message, params[0].tolist()
    if how == "names the group":
        error, message = told(lambda: ShardedGradScaler("cpu", process_group=group))
        return error, message, [1.0] * 4
    params = [parameter()]
    scaler = scaler_of(*params)
    error, message = told(lambda: scaler.step(torch.optim.SGD(params, lr=1.0)))
    return error, message, params[0].tolist()


@pytest.mark.parametrize("how", ["names the group", "takes the whole job"])
def test_a_stage_left_out_of_the_group_is_told_so(ranks, how):
    """The stages inside agree; the one outside cannot know of them, but it moves nothing."""
    *inside, (error, message, values) = ranks.run(leave_out_a_stage, 3, how=how)
    assert inside == [(None, "", [0.0] * 4)] * 2
    assert values == [1.0] * 4
    if how == "names the group":
        assert error == "ConfigError"
        assert "rank 2 is not a member of the process_group" in message
    else:
        assert error == "MissingRankError"
        assert "Did not come: ranks 0, 1" in message
        assert "process_group=" in message


# ------------------------------------------------------------------------- found on one rank alone


def make_a_mistake_alone(rank, size, mistake):
    """Rank 1 of three makes a mistake; every rank makes the call in which it is found."""
    params = [parameter(), parameter()]
    one, other = [torch.optim.SGD([p], lr=1.0) for p in params]
    copies = shardscale.distinct
    if rank == 1 and mistake == "copies without this rank":
        copies = lambda name, param: [0, 2]  # noqa: E731
    if rank == 1 and mistake == "copies outside the group":
        copies = lambda name, param: [1, 7]  # noqa: E731
    if rank == 1 and mistake == "a copies function that fails":
        copies = {}.__getitem__  # takes one argument
    scaler = scaler_of(*params, copies=copies, sync=True)
    scaler.scale(torch.ones(()))
    if rank == 1 and mistake == "a parameter in two optimizers":
        other.add_param_group({"params": params[:1]})
    if rank == 1 and mistake == "an undeclared parameter":
        other.add_param_group({"params": [parameter()]})
    if mistake == "one step more":
        scaler.step([one, other])
        if rank != 1:
            scaler.update()
    found = told(lambda: scaler.clip_grad_norm_([one, other], 1.0))
    return *found, [p.tolist() for p in params]


MISTAKES = {
    "copies without this rank": ("LayoutError", "leaves out this rank"),
    "copies outside the group": ("LayoutError", "agrees with ranks 0-2 only"),
    "a copies function that fails": ("TypeError", "exactly one argument"),
    "a parameter in two optimizers": ("LayoutError", "is in two optimizers"),
    "an undeclared parameter": ("LayoutError", "is not a parameter of an attached model"),
    "one step more": ("StageError", "after step()"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_one_rank_finds_is_raised_on_all(ranks, mistake):
    """Contract 46: see the name. The faulty rank raises its own error, the others name it."""
    kind, words = MISTAKES[mistake]
    moved = mistake == "one step more"  # by the step before it
    for rank, (error, message, values) in enumerate(
        ranks.run(make_a_mistake_alone, 3, mistake=mistake)
    ):
        if rank == 1:
            assert error == kind
            assert words in message
        else:
            assert error == "DisagreementError"
            assert f"rank 1 raised {kind}" in message
            assert words in message
        assert values == [[0.0 if moved else 1.0] * 4] * 2


# --------------------------------------------------------------------------------- stale optimizers


def wrap_too_late(rank, size, method):
    """The optimizer keeps the parameters that sharding has replaced."""
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    fully_shard(net, mesh=init_device_mesh("cpu", (size,)))
    scaler = ShardedGradScaler("cpu", init_scale=SCALE, timeout_s=TIMEOUT_S, model=net)
    scaler.scale(net(batch(rank, 0)).sum()).backward()
    before = [local(p).clone() for p in net.parameters()]
    error, message = told(lambda: CALLS[method](scaler, optimizer))
    return error, message, all(map(torch.equal, before, map(local, net.parameters())))


@pytest.mark.parametrize("method", CALLS)
def test_an_optimizer_of_replaced_parameters_is_refused(ranks, method):
    """It would train nothing, and the norm would be 0."""
    for error, message, unmoved in ranks.run(wrap_too_late, 2, method=method):
        assert error == "LayoutError"
        assert "build the optimizer, and attach the model, after wrapping" in message
        assert unmoved


def attach_too_early(rank, size):
    """The names belong to parameters that sharding has replaced; each mesh is half of the job."""
    net = make_net()
    scaler = ShardedGradScaler("cpu", init_scale=SCALE, timeout_s=TIMEOUT_S)
    scaler.attach(net, copies=shardscale.distinct)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "shard"))
    fully_shard(net, mesh=mesh["shard"])
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    scaler.scale(net(batch(rank, 0)).sum()).backward()
    clipped = told(lambda: scaler.clip_grad_norm_(optimizer, math.inf))
    again = scaler.attach(net, copies=shardscale.distinct)
    scaler.update(SCALE)
    return clipped, told(lambda: again.step(optimizer))


def test_a_model_attached_before_its_parameters_were_replaced_must_be_attached_again(ranks):
    for (error, message), (after, _) in ranks.run(attach_too_early, 4):
        assert error == "LayoutError"
        assert "is not a parameter of an attached model" in message
        assert "attach(model) with the model as it is wrapped for training" in message
        assert after is None
