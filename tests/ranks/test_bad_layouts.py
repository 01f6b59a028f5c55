"""Layouts that are wrong or unknown: an error within the timeout, on every rank, nothing moved."""

from __future__ import annotations

import math
import re
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

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
        assert re.search(r"Did not come: ranks 0 \(.+\), 1 \(.+\), ready but", message)
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


# ------------------------------------------------------------------- sums of Partial gradients


def partial_weights(mesh, *values):
    """Replicated weights of one shape, each with a Partial gradient of this value on every rank."""
    params = []
    for value in values:
        param = nn.Parameter(distribute_tensor(torch.zeros(3), mesh, [Replicate()] * mesh.ndim))
        part = torch.full((3,), value)
        param.grad = DTensor.from_local(part, mesh, [Partial()] * mesh.ndim, run_check=False)
        params.append(param)
    return params


def sum_in_another_order(rank, size):
    mesh = init_device_mesh("cpu", (size,))
    params = partial_weights(mesh, 1.0, 10.0, 100.0)
    model = nn.ParameterList(params)
    scaler = ShardedGradScaler("cpu", init_scale=SCALE, timeout_s=TIMEOUT_S)
    scaler.attach(model, copies=shardscale.distinct)
    optimizer = torch.optim.SGD(params if rank != 1 else params[::-1], lr=1.0)
    error, message = told(lambda: scaler.step(optimizer))
    return error, message, [p.full_tensor().tolist() for p in params]


def test_partial_gradients_in_another_order_are_never_added_to_each_other(ranks):
    """Contract 47: they have the same sizes, so nothing else would tell."""
    for error, message, values in ranks.run(sum_in_another_order, 3):
        assert error == "LayoutError"
        assert "the parameters to the optimizers in one order" in message
        assert values == [[0.0] * 3] * 3


def sum_beside_experts(rank, size):
    """The first tensor-parallel rank has two experts, the other one; a norm is Partial on both."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    [norm] = partial_weights(mesh["tp"], SCALE)
    experts = []
    for _ in range(2 - mesh.get_local_rank("tp")):
        expert = nn.Parameter(distribute_tensor(torch.zeros(2), mesh["dp"], [Shard(0)]))
        expert.grad = distribute_tensor(torch.full((2,), SCALE), mesh["dp"], [Shard(0)])
        experts.append(expert)
    scaler = ShardedGradScaler("cpu", init_scale=SCALE, timeout_s=TIMEOUT_S)
    scaler.step(torch.optim.SGD([*experts, norm], lr=1.0))
    return norm.full_tensor().tolist(), [e.full_tensor().tolist() for e in experts]


def test_a_sum_does_not_mind_what_else_a_rank_holds(ranks):
    """Contract 47: only the ranks of a mesh must have the same Partial gradients."""
    for rank, (norm, experts) in enumerate(ranks.run(sum_beside_experts, 4)):
        assert norm == [-2.0] * 3
        assert experts == [[-1.0] * 2] * (2 - rank % 2)


def lack_a_gradient_of_the_whole_job(rank, size):
    """The mesh is the agreeing group: the rank without it is at its verdict already."""
    params = partial_weights(init_device_mesh("cpu", (size,)), SCALE)
    if rank == 1:
        params[0].grad = None
    model = nn.ParameterList(params)
    scaler = ShardedGradScaler("cpu", init_scale=SCALE).attach(model, copies=shardscale.distinct)
    started = time.monotonic()
    error, message = told(lambda: scaler.step(torch.optim.SGD(params, lr=1.0)))
    return error, message, time.monotonic() - started


def test_a_rank_that_lacks_a_partial_gradient_hears_of_it_from_the_others(ranks):
    """Contract 47: by its cause, and long before the 60 s that a first verdict may take."""
    for rank, (error, message, seconds) in enumerate(
        ranks.run(lack_a_gradient_of_the_whole_job, 3, limit_s=60)
    ):
        assert error == ("DisagreementError" if rank == 1 else "LayoutError")
        assert "which the others do not all have" in message
        assert seconds < 30


def freeze_what_lies_outside(rank, size):
    """A frozen base on all ranks, and adapters that pairs of ranks train on their own."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mesh = init_device_mesh("cpu", (4,))
    base = nn.Parameter(distribute_tensor(torch.ones(8), mesh, [Shard(0)]), requires_grad=False)
    adapter = parameter()
    model = nn.ParameterList([base, adapter])
    scaler = ShardedGradScaler("cpu", init_scale=SCALE, process_group=pairs[rank // 2])
    scaler.attach(model, copies=shardscale.distinct)
    optimizer = torch.optim.SGD([base, adapter], lr=1.0)
    if rank == 3:
        adapter.grad[0] = math.inf
    scaler.step(optimizer)
    return adapter.tolist()


def test_frozen_parameters_may_lie_outside_of_the_group(ranks):
    """Contract 42: nothing of them is stepped, so nobody has to agree on them."""
    found = ranks.run(freeze_what_lies_outside, 4)
    assert found == [[0.0] * 4] * 2 + [[1.0] * 4] * 2
