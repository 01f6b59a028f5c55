"""What tensor parallelism alone has: Partial gradients, and losses that are DTensors."""

from __future__ import annotations

import math

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


def make_scaler(params, **options):
    """One that knows that nobody holds copies of these beside what their meshes say."""
    scaler = ShardedGradScaler("cpu", init_scale=SCALE, **options)
    scaler.attach(nn.ParameterList(params), copies=lambda name, p: None)
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
WAYS = [(way, fused) for way in ("step", "unscale_", "clip_grad_norm_") for fused in (False, True)]


def judge_partial(rank, size):
    """{(parts, way, fused): (norm, placements, gradient, parameter, scale) afterwards}."""
    mesh = init_device_mesh("cpu", (size,))
    found = {}
    for name, parts in PARTS.items():
        for way, fused in WAYS:
            p = parameter(mesh)
            optimizer = torch.optim.SGD([p], lr=0.5, fused=fused)
            scaler = make_scaler([p])
            give(p, parts[rank])
            norm = None
            if way == "unscale_":
                scaler.unscale_(optimizer)
            if way == "clip_grad_norm_":
                norm = scaler.clip_grad_norm_(optimizer, INF).item()
            placements, grad = p.grad.placements, local(p.grad).tolist()
            scaler.step(optimizer)
            scaler.update()
            found[name, way, fused] = norm, placements, grad, local(p).tolist(), scaler.get_scale()
    return found


def test_the_sum_of_partial_gradients_is_judged_unscaled_and_stepped(ranks):
    """Contract 47: two parts may be finite where their sum is not, and the other way round."""
    for found in ranks.run(judge_partial, 2):
        for (name, way, fused), (norm, placements, grad, value, scale) in found.items():
            total = torch.tensor(PARTS[name]).sum().item() / SCALE
            is_good = math.isfinite(total)
            assert value == [1.0 - 0.5 * total if is_good else 1.0] * 6, (name, way, fused)
            assert scale == (SCALE if is_good else SCALE / 2)
            if way == "step":
                continue  # the gradient was looked at before
            assert placements == (Replicate(),)
            assert grad == pytest.approx([total] * 6, rel=0, abs=0, nan_ok=True)
            if norm is not None:
                expected = math.sqrt(6) * abs(total)
                assert norm == pytest.approx(expected, rel=ROUNDING, nan_ok=True)


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
    scaler = make_scaler(params)
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
    """Contract 47: on tp in float32 and bfloat16, on dp, and on the two axes of the whole mesh;
    then the one verdict."""
    assert ranks.run(sum_on_several_meshes, 4) == [([5 + 1, 1, 0], [True] * 5)] * 4


# --------------------------------------------------------------------------------------- faults


def fault(what, rank, params):
    """Give gradients; those of rank 1 are wrong, or those of ranks 0 and 1 do not go together."""
    replicated, other, sharded, plain = params
    for p in (replicated, other):
        give(p, SCALE)
    sharded.grad = sharded.detach() * SCALE
    plain.grad = torch.full((2, 3), SCALE)
    if rank > 1:
        return
    if what == "Partial here, complete there":
        give((replicated, other)[rank], SCALE, Replicate())
    if rank == 1 and what == "elements share memory":
        plain.grad = torch.full((3,), SCALE).expand(2, 3)
    if rank == 1 and what == "Partial of a sharded one":
        give(sharded, SCALE)
    if rank == 1 and what == "Partial(max)":
        give(sharded, SCALE, Partial("max"))
    if rank == 1 and what == "no gradient":
        replicated.grad = other.grad = None


def meet_a_fault(rank, size, what):
    """Error and message on this rank, and whether its parameters were left alone."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))["tp"]
    params = [parameter(mesh), parameter(mesh), parameter(mesh, Shard(0))]
    params.append(nn.Parameter(torch.ones(2, 3)))
    fault(what, rank, params)
    scaler = make_scaler(params, timeout_s=1.0)
    found = outcome(lambda: scaler.step(torch.optim.SGD(params, lr=0.5)))
    unmoved = all(torch.equal(local(p), torch.ones_like(local(p))) for p in params)
    return found.error, found.message, unmoved
