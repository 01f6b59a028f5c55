"""After `unscale_`, torch's own ways to clip find plain gradients and do what they always did."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from shardscale import ShardedGradScaler
from tests.ranks.models import (
    equal,
    lay_out,
    local,
    make_net,
    reference_grads,
    spoil,
    whole_bits,
)

SCALE = 8.0
MAX_NORM = 0.5
ROUNDING = 1e-6
"""Relative: torch adds squares in float32, in another order; ours in float64."""
OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.5, momentum=0.5),
    "fused AdamW": lambda params: torch.optim.AdamW(params, lr=0.5, fused=True),
}


def clip_by_function(foreach: bool | None) -> Callable[..., Tensor]:
    def clip(model, max_norm):
        params = list(model.parameters())
        return torch.nn.utils.clip_grad_norm_(params, max_norm, foreach=foreach)

    return clip


def clip_in_two_steps(foreach: bool | None) -> Callable[..., Tensor]:
    def clip(model, max_norm):
        params = [p for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in params], foreach=foreach)
        whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
        torch.nn.utils.clip_grads_with_norm_(params, max_norm, whole, foreach=foreach)
        return norm

    return clip


FUNCTIONS = {
    "clip_grad_norm_": clip_by_function(None),
    "clip_grad_norm_ foreach": clip_by_function(True),
    "clip_grad_norm_ one by one": clip_by_function(False),
    "get_total_norm": clip_in_two_steps(None),
    "get_total_norm foreach": clip_in_two_steps(True),
    "get_total_norm one by one": clip_in_two_steps(False),
}
METHOD = {"FSDP.clip_grad_norm_": lambda model, max_norm: model.clip_grad_norm_(max_norm)}
WAYS = {**FUNCTIONS, **METHOD}
LAYOUTS = {
    "DDP": (FUNCTIONS, 3),
    "FSDP1 NO_SHARD original": (WAYS, 2),
    # torch's function sees this rank's shards only: the method is made for them.
    "FSDP1 FULL_SHARD original": (METHOD, 3),
    "FSDP1 FULL_SHARD flat": (METHOD, 3),
    "FSDP1 SHARD_GRAD_OP flat": (METHOD, 2),
    "FSDP1 HYBRID_SHARD": (METHOD, 4),
    "FSDP2": (FUNCTIONS, 3),
    "HSDP": (FUNCTIONS, 4),
    "TP": (FUNCTIONS, 2),
    "FSDP2 and TP": (FUNCTIONS, 4),
}
"""How the network is laid out -> torch's ways to clip that are right there, and number of ranks."""


def clip(rank, size, name):
    """{(way, optimizer): (torch's norm, ours of the same, the verdict's flag, parameters)}."""
    laid = lay_out(name, size)
    first = [local(p).clone() for p in laid.model.parameters()]
    found = {}
    for way, clip_by_torch in LAYOUTS[name][0].items():
        for optimizer_name, make_optimizer in OPTIMIZERS.items():
            with torch.no_grad():
                for p, values in zip(laid.model.parameters(), first, strict=True):
                    local(p).copy_(values)
            optimizer = make_optimizer(laid.model.parameters())
            optimizer.zero_grad()
            scaler = ShardedGradScaler("cpu", init_scale=SCALE)
            scaler.attach(laid.model, copies=laid.copies)
            laid.backward(scaler, step=0)
            scaler.unscale_(optimizer)
            ours = scaler.clip_grad_norm_(optimizer, math.inf).item()
            norm = clip_by_torch(laid.model, MAX_NORM)
            norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
            scaler.step(optimizer)
            scaler.update()
            found[way, optimizer_name] = norm, ours, laid.whole()
    return found, laid.num_batches


def clipped_reference(num_batches, optimizer_name):
    net = make_net()
    reference_grads(net, num_batches, 0)
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), MAX_NORM).item()
    OPTIMIZERS[optimizer_name](net.parameters()).step()
    return norm, {name: p.detach() for name, p in net.named_parameters()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_torch_clips_what_is_unscaled(ranks, name):
    """Contract 45: the norm of one process, the same as ours, and its clipped step."""
    for found, num_batches in ranks.run(clip, LAYOUTS[name][1], name=name):
        for (way, optimizer_name), (norm, ours, whole) in found.items():
            expected, params = clipped_reference(num_batches, optimizer_name)
            assert expected > MAX_NORM
            assert norm == pytest.approx(expected, rel=ROUNDING), way
            assert ours == pytest.approx(expected, rel=ROUNDING), way
            for parameter, values in params.items():
                torch.testing.assert_close(
                    whole[parameter], values, rtol=ROUNDING, atol=ROUNDING, msg=f"{way} {parameter}"
                )


def clip_a_bad_one(rank, size, name):
    """{way: (unmoved, scale)}: what torch's clipping turned into NaN is still skipped."""
    laid = lay_out(name, size)
    found = {}
    for way, clip_by_torch in LAYOUTS[name][0].items():
        optimizer = OPTIMIZERS["SGD"](laid.model.parameters())
        optimizer.zero_grad()
        scaler = ShardedGradScaler("cpu", init_scale=SCALE)
        before = whole_bits(laid)
        laid.backward(scaler, step=0)
        spoil(laid.model, rank, size - 1, math.inf)
        scaler.unscale_(optimizer)
        clip_by_torch(laid.model, MAX_NORM)
        scaler.step(optimizer)
        scaler.update()
        found[way] = equal(before, whole_bits(laid)), scaler.get_scale()
    return found


@pytest.mark.parametrize("name", ["DDP", "FSDP1 FULL_SHARD original", "FSDP2"])
def test_a_bad_step_stays_one_whatever_torch_clips(ranks, name):
    """The verdict is that of `unscale_`: by a norm of Inf torch turns all gradients to 0 or NaN."""
    for found in ranks.run(clip_a_bad_one, 2, name=name):
        assert found == dict.fromkeys(found, (True, SCALE / 2))
