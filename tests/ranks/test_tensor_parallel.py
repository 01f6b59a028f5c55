"""What tensor parallelism alone has: Partial gradients, and losses that are DTensors."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    loss_parallel,
    parallelize_module,
)

import shardscale
from shardscale import ShardedGradScaler
from tests.ranks.counting import count_collectives
from tests.ranks.models.laid import equal, local
from tests.ranks.models.net import batch, make_net, reference_grads
from tests.ranks.models.tensor_parallel import LAYOUTS, lay_out_norms_apart
from tests.ranks.rank import outcome

INF, NAN = math.inf, math.nan
SCALE = 8.0
ROUNDING = 2.0**-22
"""Relative: a few roundings to float32, of 2^-24 each."""


def parameter(mesh, placement=None, dtype=torch.float32):
    """Six ones, the same along every axis of the mesh, or sharded over it."""
    placements = [placement or Replicate()] * mesh.ndim
    whole = DTensor.from_local(torch.ones(6, dtype=dtype), mesh, run_check=False)
    return nn.Parameter(whole.redistribute(placements=placements))


def give(p, value, placement=None):
    """A gradient full of this rank's value; unless told otherwise one that is still to be
    summed."""
    placements = [placement or Partial()] * p.device_mesh.ndim
    mine = torch.full((6,), value, dtype=p.dtype)
    p.grad = DTensor.from_local(mine, p.device_mesh, placements, run_check=False)


def make_scaler(model, **options):
    """One that knows that nobody holds copies of these beside what their meshes say."""
    scaler = ShardedGradScaler("cpu", init_scale=SCALE, **options)
    scaler.attach(model, copies=shardscale.distinct)
    scaler.scale(torch.ones(()))
    return scaler


# ---------------------------------------------------------------------------- the sum is judged

PARTS = {
    "whole": (8.0, 16.0),
    "huge, but not together": (3e38, -3e38),
    "finite, but not together": (3e38, 3e38),
    "NaN in one": (8.0, NAN),
    "Inf in one": (INF, 8.0),
}
"""What each of two ranks has of every element of the gradient, scaled."""
OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.5),
    "fused AdamW": lambda params: torch.optim.AdamW(params, lr=0.5, fused=True),
}
WAYS = list(itertools.product(PARTS, ("step", "unscale_", "clip_grad_norm_"), OPTIMIZERS))


def judge_partial(rank, size):
    """{way: (norm, placements, gradient, parameter, scale)}."""
    mesh = init_device_mesh("cpu", (size,))
    found = {}
    for parts, call, optimizer_name in WAYS:
        p = parameter(mesh)
        optimizer = OPTIMIZERS[optimizer_name]([p])
        scaler = make_scaler(nn.ParameterList([p]))
        give(p, PARTS[parts][rank])
        norm = None
        if call == "unscale_":
            scaler.unscale_(optimizer)
        if call == "clip_grad_norm_":
            norm = scaler.clip_grad_norm_(optimizer, INF).item()
        if call == "step":
            scaler.step(optimizer)
        placements, grad = p.grad.placements, local(p.grad).tolist()
        if call != "step":
            scaler.step(optimizer)
        scaler.update()
        found[parts, call, optimizer_name] = norm, placements, grad, local(p), scaler.get_scale()
    return found


def test_the_sum_of_partial_gradients_is_judged_unscaled_and_stepped(ranks):
    """Contract 47: two parts may be finite where their sum is not, and the other way round."""
    results = ranks.run(judge_partial, 2)
    for way in WAYS:
        parts, call, optimizer_name = way
        total = torch.tensor(PARTS[parts]).sum() / SCALE
        is_good = bool(total.isfinite())
        alone = nn.Parameter(torch.ones(6))
        if is_good:
            alone.grad = total.expand(6).clone()
            OPTIMIZERS[optimizer_name]([alone]).step()
        for found in results:
            norm, placements, grad, value, scale = found[way]
            assert torch.equal(value, alone), way
            assert scale == (SCALE if is_good else SCALE / 2), way
            assert placements == (Replicate(),), way
            if call != "step":  # a fused step leaves its gradients scaled
                assert grad == pytest.approx([total.item()] * 6, rel=0, abs=0, nan_ok=True), way
            if call == "clip_grad_norm_":
                expected = math.sqrt(6) * total.abs().item()
                assert norm == pytest.approx(expected, rel=ROUNDING, nan_ok=True), way


def accumulate(rank, size):
    """{what: whether it is as in one process}: two passes, a step, one more pass on top, a step."""
    laid = LAYOUTS["TP sequence"].lay(size, torch.float32)
    net = make_net()
    params, plain = list(laid.model.parameters()), list(net.parameters())
    optimizer, reference_optimizer = (torch.optim.SGD(some, lr=0.25) for some in (params, plain))
    scaler = ShardedGradScaler("cpu", init_scale=SCALE, model=laid.model)
    reference = torch.amp.GradScaler("cpu", init_scale=SCALE)
    held = {}
    for iteration, steps in enumerate([(0, 1), (2,)]):
        for step in steps:
            laid.backward(scaler, step)
            reference.scale(net(batch(0, step)).sum()).backward()
        norm = scaler.clip_grad_norm_(optimizer, INF).item()
        reference.unscale_(reference_optimizer)
        grads = [q.grad for q in plain]
        expected = torch.nn.utils.get_total_norm(grads).item()
        held[iteration, "norm"] = norm == pytest.approx(expected, rel=ROUNDING)
        held[iteration, "placed"] = all(p.grad.placements == p.placements for p in params)
        held[iteration, "gradients"] = all(
            torch.equal(p.grad.full_tensor(), g) for p, g in zip(params, grads, strict=True)
        )
        scaler.step(optimizer)
        scaler.update()
        reference.step(reference_optimizer)
        reference.update()
        expected = {name: p.detach() for name, p in net.named_parameters()}
        held[iteration, "parameters"] = equal(laid.whole(), expected)
    held["described"] = scaler.describe().count("Partial gradient summed") == 4
    return held


def test_accumulated_partial_gradients_equal_those_of_one_process_bit_for_bit(ranks):
    """Contract 47: with torch's own scaler in that process."""
    for held in ranks.run(accumulate, 2):
        assert held == dict.fromkeys(held, True)


def sum_on_several_meshes(rank, size):
    """Collectives of three calls, and whether every gradient is the sum over its mesh."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    # Two of a kind in different optimizers, another dtype, another mesh, both axes of a mesh.
    kinds = [("tp", torch.float32), ("tp", torch.bfloat16), ("dp", torch.float32)]
    params = [parameter(mesh[axis], dtype=dtype) for axis, dtype in [*kinds, kinds[0]]]
    params.append(parameter(mesh))
    optimizers = [torch.optim.SGD(some, lr=0.5) for some in (params[:3], params[3:])]
    scaler = make_scaler(nn.ParameterList(params))
    for p in params:
        give(p, SCALE * 2.0**rank)
    counts = []
    for call in (
        lambda: scaler.unscale_(optimizers),
        lambda: scaler.clip_grad_norm_(optimizers, INF),
        lambda: scaler.step(optimizers),
    ):
        with count_collectives() as counted:
            call()
        counts.append(counted.num)
    summed = [
        local(p.grad).tolist() == [sum(2.0**r for r in p.device_mesh.mesh.flatten().tolist())] * 6
        for p in params
    ]
    return counts, summed


def test_partial_gradients_are_summed_once_for_each_mesh_axis_and_dtype(ranks):
    """Contract 47: on tp in float32 and bfloat16, on dp, and on the two axes of the whole mesh.

    Before each sum the ranks say what they will send; after all of them comes the one verdict.
    """
    assert ranks.run(sum_on_several_meshes, 4) == [([2 * 5 + 1, 1, 0], [True] * 5)] * 4


# --------------------------------------------------------------------------------------- faults

FAULTS = {
    # who raises LayoutError, and the parameter that it names
    "Partial here, complete there": {0: "other norm", 1: "norm"},
    "Partial(max)": dict.fromkeys(range(4), "norm"),
    "Partial of a sharded one": {1: "shard"},
    "elements share memory": {1: "plain"},
}


def spoil_gradients(what, rank, params):
    """Good gradients, all but one of them; ranks 0 and 1 are a mesh, and 2 and 3 another."""
    for name in ("norm", "other norm"):
        give(params[name], SCALE)
    params["shard"].grad = params["shard"].detach() * SCALE
    params["plain"].grad = torch.full((2, 3), SCALE)
    if what == "Partial here, complete there" and rank < 2:
        give(params[("norm", "other norm")[rank]], SCALE, Replicate())
    if what == "Partial(max)":
        give(params["norm"], SCALE, Partial("max"))
    if what == "Partial of a sharded one" and rank == 1:
        give(params["shard"], SCALE)
    if what == "elements share memory" and rank == 1:
        params["plain"].grad = torch.full((3,), SCALE).expand(2, 3)
    if what == "no gradient" and rank == 1:
        params["norm"].grad = params["other norm"].grad = None


def meet_faults(rank, size, faults, shape):
    """{fault: (error, message, whether the parameters were left alone)}."""
    axes = ("dp", "tp")[-len(shape) :]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=axes)["tp"]
    return {what: meet_fault(what, rank, mesh) for what in faults}


def meet_fault(what, rank, mesh):
    params = {"norm": parameter(mesh), "other norm": parameter(mesh)}
    params["shard"] = parameter(mesh, Shard(0))
    params["plain"] = nn.Parameter(torch.ones(2, 3))
    spoil_gradients(what, rank, params)
    scaler = make_scaler(nn.ParameterDict(params), timeout_s=1.0)
    optimizer = torch.optim.SGD(params.values(), lr=0.5)
    stepped = outcome(lambda: scaler.step(optimizer))
    unmoved = all(bool((local(p) == 1).all()) for p in params.values())
    return stepped.error, stepped.message, unmoved


def test_a_gradient_that_cannot_be_summed_is_an_error_on_every_rank(ranks):
    """Contract 47: the ranks at fault name the parameter, and nobody waits for a sum in vain."""
    results = ranks.run(meet_faults, 4, faults=list(FAULTS), shape=(2, 2))
    for what, named in FAULTS.items():
        for rank, found in enumerate(results):
            error, message, unmoved = found[what]
            assert unmoved
            if rank in named:
                assert error == "LayoutError", (what, rank, message)
                assert re.search(rf"\b(of|for) {named[rank]}\b", message), (what, rank, message)
            else:
                assert error == "DisagreementError", (what, rank, message)
                assert f"rank {min(named)} raised LayoutError" in message


MISSED = {
    (2, 2): ["MissingRankError"] * 4,
    # Here it meets the others in the agreeing group itself.
    (4,): ["LayoutError", "DisagreementError", "LayoutError", "LayoutError"],
}


@pytest.mark.parametrize("shape", MISSED, ids=str)
def test_a_rank_without_gradients_that_others_sum_stops_all_within_the_timeout(ranks, shape):
    """Contract 47: which of them is wrong nobody can tell; nothing moves anywhere."""
    results = ranks.run(meet_faults, 4, faults=["no gradient"], shape=shape)
    found = [result["no gradient"] for result in results]
    assert [error for error, _, _ in found] == MISSED[shape], found
    assert all(unmoved for _, _, unmoved in found)


# -------------------------------------------------------------------- losses that are DTensors


def make_classifier():
    """Seven classes, which no number of ranks divides, as a linear head."""
    generator = torch.Generator().manual_seed(3)
    head = nn.Linear(5, 7)
    with torch.no_grad():
        for p in head.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return head


TARGETS = torch.tensor([0, 6, 3, 3])


def learn_with_a_parallel_loss(rank, size, wraps):
    """Two iterations, Inf on the last rank in the second; what is to be as in one process."""
    head = make_classifier()
    parallelize_module(
        head, init_device_mesh("cpu", (size,)), ColwiseParallel(use_local_output=False)
    )
    optimizer = torch.optim.SGD(head.parameters(), lr=0.5)
    scaler = ShardedGradScaler("cpu", init_scale=SCALE)
    loss_fn = nn.functional.cross_entropy
    found = []
    for step in range(2):
        optimizer.zero_grad()
        with loss_parallel():
            if wraps:
                loss = scaler.wrap_loss(loss_fn)(head(batch(0, step)), TARGETS)
                loss.backward()
            else:
                loss = loss_fn(head(batch(0, step)), TARGETS)
                scaler.scale(loss).backward()
        if step == 1 and rank == size - 1:
            local(head.weight.grad)[-1, -1] = INF
        norm = scaler.clip_grad_norm_(optimizer, 0.5)
        scaler.step(optimizer)
        scaler.update()
        weight, bias = (p.full_tensor().detach() for p in (head.weight, head.bias))
        found.append((loss.full_tensor().detach(), norm, weight, bias, scaler.get_scale()))
    return found


@pytest.mark.parametrize("wraps", [False, True])
def test_a_parallel_loss_is_scaled_and_trains_as_in_one_process(ranks, wraps):
    """Within rounding: exponentials are not whole numbers, and are added in another order."""
    head = make_classifier()
    loss = nn.functional.cross_entropy(head(batch(0, 0)), TARGETS)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(head.parameters(), 0.5)
    torch.optim.SGD(head.parameters(), lr=0.5).step()
    expected = [t.detach() for t in (loss, norm, head.weight, head.bias)]
    loss_of_second = nn.functional.cross_entropy(head(batch(0, 1)), TARGETS).detach()
    for good, bad in ranks.run(learn_with_a_parallel_loss, 3, wraps=wraps):
        for mine, one_process in zip(good, [*expected, SCALE], strict=True):
            torch.testing.assert_close(mine, one_process, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(bad[0], loss_of_second, rtol=1e-6, atol=1e-6)
        assert (bad[1], bad[4]) == (INF, SCALE / 2)
        assert all(map(torch.equal, bad[2:4], good[2:4]))


def scale_a_partial_loss(rank, size):
    """The gradients of a loss that is itself still to be summed, both ways of scaling it."""
    mesh = init_device_mesh("cpu", (size,))
    scaler = ShardedGradScaler("cpu", init_scale=SCALE)
    grads = []
    for wraps in (False, True):
        rows = DTensor.from_local(torch.full((2, 3), rank + 1.0), mesh, [Shard(0)])
        p = parameter(mesh)
        loss_fn = (lambda x: scaler.wrap_loss(torch.sum)(x)) if wraps else torch.sum
        loss = loss_fn(rows * p[:3] + p[3:])
        (loss if wraps else scaler.scale(loss)).backward()
        grads.append((loss.full_tensor().item(), p.grad.full_tensor().tolist()))
    return grads


def test_a_loss_still_to_be_summed_is_scaled(ranks):
    """Two rows of ones on the first rank, two of twos on the second; a one is added to each."""
    expected = (3 * 2 * (1 + 2) + 12.0, [SCALE * 6] * 3 + [SCALE * 4] * 3)
    assert ranks.run(scale_a_partial_loss, 2) == [[expected] * 2] * 2


# ------------------------------------------------------------- what the plan does not speak of


def train_with_norms_apart(rank, size):
    """Norm, whether two steps are those of one process, and the scale; the second step is bad."""
    laid = lay_out_norms_apart(size, torch.float32)
    scaler = ShardedGradScaler("cpu", init_scale=SCALE)
    scaler.attach(laid.model, copies=laid.copies)
    net = make_net()
    optimizer, reference = (
        torch.optim.SGD(model.parameters(), lr=0.5) for model in (laid.model, net)
    )
    found = []
    for step in range(2):
        optimizer.zero_grad()
        laid.backward(scaler, step)
        if step == 1 and rank == 0:
            laid.model[4].bias.grad[-1] = NAN
        norm = scaler.clip_grad_norm_(optimizer, INF).item()
        scaler.step(optimizer)
        scaler.update()
        if step == 0:
            grads = reference_grads(net, 1, 0)
            expected = torch.nn.utils.get_total_norm(grads.values()).item()
            found.append(norm == pytest.approx(expected, rel=ROUNDING))
            reference.step()
        params = {name: p.detach() for name, p in net.named_parameters()}
        found.append(equal(laid.whole(), params))
    return [*found, scaler.get_scale()]


@pytest.mark.parametrize("size", [2, 4])
def test_plain_tensors_beside_sharded_ones_are_copies_if_declared(ranks, size):
    """Contract 45: as where a plan names the linear layers only."""
    assert ranks.run(train_with_norms_apart, size) == [[True, True, True, SCALE / 2]] * size
