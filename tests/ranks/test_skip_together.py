"""Inf or NaN on any rank: all skip, and the next good step moves all."""

from __future__ import annotations

import copy
import itertools
import math
import warnings

import pytest
import torch

from shardscale import ShardedGradScaler

INF, NAN = math.inf, math.nan
FORMS = {
    "loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


class Sign(torch.optim.Optimizer):
    """An optimizer with a `step` of its own, and a counter that must stand still on a skip."""

    def __init__(self, params, lr=0.5):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["step"] = self.state[p].get("step", 0) + 1
                p -= group["lr"] * p.grad.sign()
        return "stepped"


class Legacy(torch.optim.Optimizer):
    """An optimizer of the old contract: it is given the scaler and asks it about Inf itself."""

    _step_supports_amp_scaling = True

    def __init__(self, params, lr=0.5):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, grad_scaler=None):
        if grad_scaler is None:
            found, scale = 0.0, 1.0
        else:
            flags = grad_scaler._check_inf_per_device(self)
            found = sum(flag.item() for flag in flags.values())
            scale = grad_scaler._get_scale_async().item()
        if found:
            return
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["step"] = self.state[p].get("step", 0) + 1
                p -= group["lr"] * p.grad / scale


def _forms(optimizer_class, **options):
    return {
        form: (lambda params, chosen=chosen: optimizer_class(params, **options, **chosen))
        for form, chosen in FORMS.items()
    }


OPTIMIZERS = {
    "SGD": _forms(torch.optim.SGD, lr=0.5, momentum=0.9),
    "Adam": _forms(torch.optim.Adam, lr=0.5),
    "AdamW": _forms(torch.optim.AdamW, lr=0.5),
    "Adagrad": _forms(torch.optim.Adagrad, lr=0.5),
    "own step": {"plain": Sign},
}


def make_params(rank):
    """What this rank owns: two shards of its own, one of them empty on rank 0."""
    values = torch.arange(7.0) + 10 * rank + 1
    return [torch.nn.Parameter(values.clone()), torch.nn.Parameter(values[: 3 * min(rank, 1)] / 4)]


def grads_at(step, rank, params):
    """Finite gradients, different on each rank and step; as they are without any scale."""
    return [torch.linspace(-1, 2, p.numel()) * (step + 1) + rank / 4 for p in params]


def snapshot(params, optimizer):
    """Bitwise copies of the parameters and of all that the optimizer remembers of them."""
    state = [optimizer.state.get(p, {}) for p in params]
    return [p.detach().clone() for p in params], copy.deepcopy(state)


def same(a, b):
    """Equality to the bit, through lists and dicts; NaN equals NaN."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(bits(a), bits(b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def bits(tensor):
    return tensor.detach().reshape(-1).view(torch.uint8)


def steps_with_one_bad(rank, name, form, explicit, value, bad_ranks):
    """Three steps of this rank, the one in the middle bad; what happened, and what should have."""
    make = OPTIMIZERS[name][form]
    params, alone = make_params(rank), make_params(rank)
    optimizer, reference = make(params), make(alone)
    scaler = ShardedGradScaler("cpu", init_scale=1024.0)
    history = []
    for step in range(3):
        bad = step == 1
        scaler.scale(torch.ones(()))
        scale = scaler.get_scale()
        for p, grad in zip(params, grads_at(step, rank, params), strict=True):
            p.grad = grad * scale
        if bad and rank in bad_ranks:
            params[0].grad[-1] = value
        before = snapshot(params, optimizer)
        if explicit:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if not bad:
            for p, grad in zip(alone, grads_at(step, rank, alone), strict=True):
                p.grad = grad
            reference.step()
        untouched = same(before, snapshot(params, optimizer))
        agrees = same(snapshot(params, optimizer), snapshot(alone, reference))
        history.append((untouched, agrees, scaler.get_scale()))
    return history


def all_the_ways(rank, size, name):
    """Every form, with and without `unscale_`, Inf and NaN, on each place: {way: history}."""
    places = {(0,), (size // 2,), (size - 1,), tuple(range(size))}
    ways = itertools.product(OPTIMIZERS[name], (False, True), (INF, NAN), sorted(places))
    return {way: steps_with_one_bad(rank, name, *way) for way in ways}


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_all_ranks_skip_when_any_overflows(ranks, size, name):
    """Contract 40: as the name says.

    To the bit: nothing moves on the bad step, and all the good ones are as if it had never been.

    The scale is a power of two, so scaling and unscaling a float32 is exact.
    """
    expected = [(False, True, 1024.0), (True, True, 512.0), (False, True, 512.0)]
    for found in ranks.run(all_the_ways, size, name=name):
        assert {way: history for way, history in found.items() if history != expected} == {}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_first_step_leaves_nothing_behind(ranks, name):
    """Optimizers make their state at the first step; a fused SGD leaves its momentum unset there.

    With nothing to compare with, the state made early may differ in form; parameters may not.
    """
    for found in ranks.run(first_step_bad, 3, name=name):
        assert {way: history for way, history in found.items() if history != [True] * 3} == {}


def first_step_bad(rank, size, name):
    """{form and whether explicit: at each step, whether the parameters are the reference's}."""
    found = {}
    for form, explicit in itertools.product(OPTIMIZERS[name], (False, True)):
        params, alone = make_params(rank), make_params(rank)
        optimizer, reference = OPTIMIZERS[name][form](params), OPTIMIZERS[name][form](alone)
        scaler = ShardedGradScaler("cpu", init_scale=1024.0)
        found[form, explicit] = history = []
        for step in range(3):
            scaler.scale(torch.ones(()))
            for p, q, grad in zip(params, alone, grads_at(step, rank, params), strict=True):
                p.grad, q.grad = grad * scaler.get_scale(), grad
            if step == 0 and rank == 1:
                params[1].grad[0] = NAN
            if explicit:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            if step > 0:
                reference.step()
            history.append(same(params, alone))
    return found


def legacy_steps(rank, size):
    """Three steps of an optimizer that takes `grad_scaler=`, the second bad on the middle rank."""
    params, alone = make_params(rank), make_params(rank)
    optimizer, reference = Legacy(params), Legacy(alone)
    scaler = ShardedGradScaler("cpu", init_scale=1024.0)
    history = []
    for step in range(3):
        scaler.scale(torch.ones(()))
        for p, q, grad in zip(params, alone, grads_at(step, rank, params), strict=True):
            p.grad, q.grad = grad * scaler.get_scale(), grad
        if step == 1 and rank == size // 2:
            params[0].grad[0] = INF
        before = snapshot(params, optimizer)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scaler.step(optimizer)
        scaler.update()
        if step != 1:
            reference.step()
        warned = [w.category.__name__ for w in caught]
        untouched = same(before, snapshot(params, optimizer))
        agrees = same(snapshot(params, optimizer), snapshot(alone, reference))
        history.append((untouched, agrees, scaler.get_scale(), "FutureWarning" in warned))
    return history


@pytest.mark.parametrize("size", [2, 3, 4])
def test_optimizers_that_ask_the_scaler_themselves_skip_together(ranks, size):
    """Contract 40: see the name."""
    expected = [(False, True, 1024.0, True), (True, True, 512.0, True), (False, True, 512.0, True)]
    assert ranks.run(legacy_steps, size) == [expected] * size


def one_by_one_and_together(rank, size):
    """Two optimizers; NaN in the second one's gradient on the last rank, first one by one, then in
    one call."""
    found = []
    for together in (False, True):
        a, b = ([torch.nn.Parameter(torch.ones(2))] for _ in range(2))
        optimizers = [torch.optim.SGD(a, lr=0.5), torch.optim.Adam(b, lr=0.5, fused=together)]
        scaler = ShardedGradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.ones(()))
        a[0].grad, b[0].grad = torch.full((2,), 4.0), torch.full((2,), 4.0)
        if rank == size - 1:
            b[0].grad[0] = NAN
        if together:
            scaler.step(optimizers)
        else:
            for optimizer in optimizers:
                scaler.step(optimizer)
        scaler.update()
        found.append((a[0].tolist(), b[0].tolist(), scaler.get_scale()))
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_each_call_has_one_verdict_and_the_scale_backs_off_once(ranks, size):
    one_by_one = ([0.5, 0.5], [1.0, 1.0], 2.0)
    together = ([1.0, 1.0], [1.0, 1.0], 2.0)
    assert ranks.run(one_by_one_and_together, size) == [[one_by_one, together]] * size


def nobody_has_gradients(rank, size):
    p = torch.nn.Parameter(torch.ones(2))
    found = []
    for fused in (False, True):
        optimizer = torch.optim.Adam([p], fused=fused)
        scaler = ShardedGradScaler("cpu", init_scale=4.0, growth_interval=1)
        scaler.scale(torch.ones(()))
        scaler.step(optimizer)
        scaler.update()
        found.append((p.tolist(), scaler.get_scale()))
    return found


def test_no_gradient_on_any_rank_is_a_good_step(ranks):
    assert ranks.run(nobody_has_gradients, 3) == [[([1.0, 1.0], 8.0)] * 2] * 3


def some_have_none(rank, size, bad):
    """Rank 0: empty shard. Middle: no gradient, never calls `scale()`. Last: no optimizer at
    all."""
    shard = torch.nn.Parameter(torch.ones(0 if rank == 0 else 3))
    scaler = ShardedGradScaler("cpu", init_scale=4.0)
    optimizers = () if rank == size - 1 else torch.optim.SGD([shard], lr=0.5)
    history = []
    for step in range(3):
        if rank != size // 2:
            scaler.scale(torch.ones(()))
        if rank not in (size // 2, size - 1):
            shard.grad = torch.full_like(shard, scaler.get_scale())
            if bad and step == 1 and rank == 1:
                shard.grad[0] = INF
        before = shard.detach().clone()
        scaler.step(optimizers)
        scaler.update()
        history.append((torch.equal(before, shard.detach()), scaler.get_scale()))
    return history


@pytest.mark.parametrize("bad", [False, True])
def test_ranks_with_nothing_to_judge_join_and_agree(ranks, bad):
    """Contract 43: see the name."""
    scales = [4.0, 2.0, 2.0] if bad else [4.0] * 3
    idle = [(True, scale) for scale in scales]
    working = [(bad and step == 1, scale) for step, scale in enumerate(scales)]
    assert ranks.run(some_have_none, 4, bad=bad) == [idle, working, idle, idle]
