"""Optimizers made to skip on the device: a bad step changes no bit, a good one gives its own."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from torch import optim

from shardscale import ConfigError, ShardedGradScaler, skip_on_device

SCALE = 8.0
# Every optimizer of torch that has no step counter on the host, in each of its implementations.
ELEMENTWISE = {
    "SGD": functools.partial(optim.SGD, lr=0.25),
    "SGD momentum": functools.partial(optim.SGD, lr=0.25, momentum=0.9),
    "SGD nesterov": functools.partial(
        optim.SGD, lr=0.25, momentum=0.9, nesterov=True, weight_decay=0.1
    ),
    "SGD maximize": functools.partial(optim.SGD, lr=0.25, maximize=True),
    "Adam": functools.partial(optim.Adam, lr=0.25),
    "Adam amsgrad": functools.partial(optim.Adam, lr=0.25, amsgrad=True),
    "AdamW": functools.partial(optim.AdamW, lr=0.25),
    "NAdam": functools.partial(optim.NAdam, lr=0.25),
    "RAdam": functools.partial(optim.RAdam, lr=0.25),
    "Adamax": functools.partial(optim.Adamax, lr=0.25),
    "Adagrad": functools.partial(optim.Adagrad, lr=0.25),
    "Adadelta": functools.partial(optim.Adadelta, lr=0.25),
    "RMSprop": functools.partial(optim.RMSprop, lr=0.25, momentum=0.9, centered=True),
    "Rprop": functools.partial(optim.Rprop, lr=0.25),
    "ASGD": functools.partial(optim.ASGD, lr=0.25, t0=2),
}
MAKERS = {
    f"{name}, {'foreach' if foreach else 'loop'}": functools.partial(make, foreach=foreach)
    for name, make in ELEMENTWISE.items()
    for foreach in (False, True)
} | {
    "Muon": functools.partial(optim.Muon, lr=0.25),
    "Adafactor": functools.partial(optim.Adafactor, lr=0.25),
}
# Numbers that arithmetic would not give back: both zeros, a denormal, the largest, and a fraction.
ODD_NUMBERS = torch.tensor([[-0.0, 0.0, 1e-45], [3e38, 1 / 3, -2.0]])


def make_params():
    rest = torch.arange(6.0).reshape(2, 3)
    return [torch.nn.Parameter(t.clone()) for t in (ODD_NUMBERS, rest, rest)]


def bits(optimizer):
    """Everything that a step may change, to the bit, by parameter and name."""
    params = optimizer.param_groups[0]["params"]
    found = {(i, None): p.detach() for i, p in enumerate(params)}
    for i, p in enumerate(params):
        found |= {(i, key): value for key, value in optimizer.state.get(p, {}).items()}
    found = {at: value for at, value in found.items() if isinstance(value, torch.Tensor)}
    return {at: t.clone().view(torch.int32) for at, t in found.items()}


def assert_same(some, others):
    assert some.keys() == others.keys()
    for at in some:
        assert torch.equal(some[at], others[at]), at


def give_grads(optimizer, step, scale, bad=False):
    """The last parameter never has a gradient."""
    for i, p in enumerate(optimizer.param_groups[0]["params"][:-1]):
        generator = torch.Generator().manual_seed(10 * step + i)
        p.grad = torch.randn(p.shape, generator=generator) * scale
    if bad:
        p.grad[0, 0] = math.nan if step % 2 else math.inf


@pytest.fixture(params=["as on a device", "flag on the host"])
def flag(request, monkeypatch):
    """A flag on the host can be looked at for free; on a device the work is done blindly."""
    if request.param == "as on a device":
        monkeypatch.setattr("shardscale.gate._is_on_host", lambda found_inf: False)


def steps(optimizer, bad_steps, num_steps=5):
    """Step with a scaler; the bits before the first and after each step."""
    scaler = ShardedGradScaler("cpu", init_scale=SCALE)
    seen = [bits(optimizer)]
    for step in range(num_steps):
        give_grads(optimizer, step, scaler.get_scale(), step in bad_steps)
        scaler.step(optimizer)
        scaler.update()
        seen.append(bits(optimizer))
    return seen


@pytest.mark.parametrize("bad_steps", [{0}, {2}, {0, 1, 3}], ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_a_gated_optimizer_ends_where_one_ends_that_the_host_skips(flag, name, bad_steps):
    """Against the same optimizer whose ``step`` was not called at all."""
    gated = skip_on_device(MAKERS[name](make_params()))
    plain = MAKERS[name](make_params())
    ours, theirs = steps(gated, bad_steps), steps(plain, bad_steps)
    for step, (mine, expected) in enumerate(zip(ours, theirs, strict=True)):
        assert_same(mine, expected)
        if step - 1 in bad_steps:
            assert_same(mine, ours[step - 1])


def test_no_verdict_is_read_by_the_host(monkeypatch):
    """What it does on an accelerator is counted in ``tests/ranks/test_gate.py``."""
    optimizer = skip_on_device(optim.RMSprop(make_params()))
    scaler = ShardedGradScaler("cpu", init_scale=SCALE)
    for step in range(3):
        give_grads(optimizer, step, SCALE)
        if step:  # the first makes the state

            def refuse(*_):
                raise AssertionError("the host has read a verdict")

            monkeypatch.setattr(scaler._judge, "read", refuse)
        scaler.step(optimizer)
        scaler.update()


@pytest.mark.parametrize("how", ["unscale_", "clip_grad_norm_"])
def test_gradients_unscaled_before_the_step_are_unscaled_once(flag, how):
    optimizer = skip_on_device(optim.RMSprop(make_params()))
    plain = optim.RMSprop(make_params())
    for each in (optimizer, plain):
        scaler = ShardedGradScaler("cpu", init_scale=SCALE)
        for step in range(3):
            give_grads(each, step, scaler.get_scale(), step == 1)
            if how == "unscale_":
                scaler.unscale_(each)
            else:
                scaler.clip_grad_norm_(each, 0.5)
            scaler.step(each)
            scaler.update()
    assert_same(bits(optimizer), bits(plain))


def test_torchs_scaler_drives_a_gated_optimizer_too(flag):
    """It hands the scale over, as to any fused optimizer."""
    gated, plain = skip_on_device(optim.RMSprop(make_params())), optim.RMSprop(make_params())
    for each in (gated, plain):
        scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
        scaler.scale(torch.ones(()))
        for step in range(4):
            give_grads(each, step, scaler.get_scale(), step == 1)
            scaler.step(each)
            scaler.update()
    assert_same(bits(gated), bits(plain))


def test_an_own_grad_scale_is_divided_out():
    gated = skip_on_device(optim.SGD(make_params(), lr=0.5))
    scaler = ShardedGradScaler("cpu", init_scale=SCALE)
    give_grads(gated, 0, SCALE * 4.0)
    gated.grad_scale = torch.tensor(4.0)
    scaler.step(gated)
    plain = optim.SGD(make_params(), lr=0.5)
    give_grads(plain, 0, 1.0)
    plain.step()
    assert_same(bits(gated), bits(plain))


def test_without_a_scaler_it_steps_as_ever():
    gated, plain = skip_on_device(optim.Adam(make_params())), optim.Adam(make_params())
    for each in (gated, plain):
        give_grads(each, 0, 1.0)
        each.step()
    assert_same(bits(gated), bits(plain))


def test_a_scheduler_sees_an_optimizer_as_ever():
    gated = skip_on_device(optim.SGD(make_params(), lr=1.0))
    scheduler = optim.lr_scheduler.StepLR(gated, step_size=1, gamma=0.5)
    scaler = ShardedGradScaler("cpu", init_scale=SCALE)
    give_grads(gated, 0, SCALE)
    scaler.step(gated)
    scheduler.step()
    scaler.update()
    assert gated.param_groups[0]["lr"] == 0.5


def test_a_fused_optimizer_is_left_as_it_is():
    optimizer = optim.AdamW(make_params(), fused=True)
    assert skip_on_device(optimizer) is optimizer
    assert not optimizer._optimizer_step_pre_hooks


def test_gating_twice_gates_once():
    optimizer = skip_on_device(skip_on_device(optim.SGD(make_params())))
    assert len(optimizer._optimizer_step_pre_hooks) == 1


def test_its_state_dict_is_that_of_the_optimizer():
    gated, plain = skip_on_device(optim.Adam(make_params())), optim.Adam(make_params())
    steps(gated, {1})
    steps(plain, {1})
    plain.load_state_dict(copy.deepcopy(gated.state_dict()))
    assert_same(bits(gated), bits(plain))


class Container:
    def __init__(self):
        self.param_groups = []

    def step(self):
        """Does nothing."""


@pytest.mark.parametrize("wrong", [None, Container(), [torch.optim.SGD(make_params())]], ids=str)
def test_only_an_optimizer_can_be_gated(wrong):
    with pytest.raises(ConfigError, match=r"must be a torch\.optim\.Optimizer"):
        skip_on_device(wrong)


class CountsInPython(optim.Optimizer):
    """Adds its gradient, and counts its steps where no device can put them back."""

    def __init__(self, params, where):
        super().__init__(params, {"num_steps": 0, "rate": torch.ones(())})
        self.where = where

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p += p.grad
                    if self.where == "state":
                        self.state[p]["num_steps"] = self.state[p].get("num_steps", 0) + 1
        if self.where == "group":
            group["num_steps"] += 1
        elif self.where == "tensor of the group":
            group["rate"].mul_(0.5)
        elif self.where == "shape":
            self.state[p]["rows"] = torch.zeros(1 + len(self.state[p].get("rows", ())))
        elif self.where == "dropped":
            self.state[p] = {} if self.state[p] else {"rows": torch.zeros(1)}
        elif self.where == "beside":
            self.state["num_steps"] = 1


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("state", "keeps 'num_steps' of its state as a Python int"),
        ("group", "changes 'num_steps' of its param_groups"),
        ("tensor of the group", "changes 'rate' of its param_groups"),
        ("beside", "keeps 'num_steps' in its state, which belongs to no parameter"),
        ("shape", "changes the shape or dtype of 'rows' of its state, or drops it"),
        ("dropped", "changes the shape or dtype of 'rows' of its state, or drops it"),
    ],
)
def test_what_cannot_be_put_back_is_refused_before_anything_has_moved(flag, where, reason):
    optimizer = skip_on_device(CountsInPython(make_params(), where))
    scaler = ShardedGradScaler("cpu", init_scale=SCALE)
    seldom = where in ("shape", "dropped")  # only a state that was there can change
    if seldom:
        give_grads(optimizer, 0, SCALE)
        scaler.step(optimizer)
        scaler.update()
    before = bits(optimizer)
    give_grads(optimizer, 1, SCALE, bad=seldom)
    with pytest.raises(ConfigError, match=reason):
        scaler.step(optimizer)
    after = {at: value for at, value in bits(optimizer).items() if at in before}
    assert_same(after, before)


def test_an_optimizer_around_another_is_refused():
    class Wrapper(optim.Optimizer):
        def __init__(self, inner):
            super().__init__(inner.param_groups, {})
            self.optim = inner

    with pytest.raises(ConfigError, match="steps another optimizer, its 'optim'"):
        skip_on_device(Wrapper(optim.SGD(make_params())))


class Warmup(optim.AdamW):
    """Overrides a step and calls it; torch then runs the hooks of both."""

    def step(self, closure=None):
        return super().step(closure)


class Clipped(optim.SGD):
    """The same of another kind, two classes deep."""

    def step(self, closure=None):
        return super().step(closure)


class ClippedTwice(Clipped):
    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("bad_steps", [{0}, {2}, {1, 3}], ids=str)
@pytest.mark.parametrize("make", [Warmup, functools.partial(ClippedTwice, lr=0.1, momentum=0.9)])
def test_a_step_that_calls_the_one_it_overrides_is_gated_once(flag, make, bad_steps):
    for base in (optim.AdamW, optim.SGD, functools.partial(Clipped, lr=0.1)):
        base(make_params())  # torch hooks a class's step when its first instance is made
    ours, theirs = (steps(gate(make(make_params())), bad_steps) for gate in (skip_on_device, id_))
    for mine, expected in zip(ours, theirs, strict=True):
        assert_same(mine, expected)


def id_(optimizer):
    return optimizer


def test_parameters_without_a_gradient_are_put_back_too(flag):
    """An optimizer may decay what has none."""

    class Decays(optim.Optimizer):
        @torch.no_grad()
        def step(self):
            for p in self.param_groups[0]["params"]:
                p.mul_(0.9)

    ours, theirs = (steps(gate(Decays(make_params(), {})), {1}) for gate in (skip_on_device, id_))
    assert_same(ours[-1], theirs[-1])


def test_a_step_that_raises_leaves_the_next_one_right(flag):
    class Raises(optim.SGD):
        raises = False

        @torch.no_grad()
        def step(self):
            if self.raises:
                raise RuntimeError("out of luck")
            for p in self.param_groups[0]["params"]:
                if p.grad is not None:
                    p -= p.grad

    optimizer = skip_on_device(Raises(make_params()))
    scaler = ShardedGradScaler("cpu", init_scale=SCALE)
    give_grads(optimizer, 0, SCALE)
    optimizer.raises = True
    with pytest.raises(RuntimeError, match="out of luck"):
        scaler.step(optimizer)
    assert not hasattr(optimizer, "found_inf")
    optimizer.raises = False
    before = bits(optimizer)
    scaler.load_state_dict(scaler.state_dict())
    give_grads(optimizer, 1, SCALE, bad=True)
    scaler.step(optimizer)
    assert_same(bits(optimizer), before)


class Rebinds(optim.Optimizer):
    """Puts a new tensor into its state at every step."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                self.state[p]["sum"] = self.state[p].get("sum", torch.zeros_like(p)) + p.grad
                p -= self.state[p]["sum"]


def test_a_state_that_is_replaced_instead_of_written_to_is_put_back(flag):
    assert_same(
        steps(skip_on_device(Rebinds(make_params())), {1, 2})[-1],
        steps(Rebinds(make_params()), {1, 2})[-1],
    )
