"""Statements 1 to 5: how a scaler comes to be, and what it does not touch on the way."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from shardscale import ConfigError, ConstantScale, ShardedGradScaler, StageError
from shardscale.comm import Solo
from tests.conformance.side_by_side import (
    BOTH,
    assert_same_optimizers,
    assert_same_scale,
    full,
    grad_of,
    raised,
    sgd,
)


@pytest.fixture
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def rank_0_of_2() -> Iterator[None]:
    """A group whose other rank is pretended; nothing is sent anywhere."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@BOTH
def test_defaults_are_torchs(make):
    """Contract 1: the five defaults."""
    scaler = make("cpu")
    assert scaler.get_scale() == 65536.0
    assert scaler.get_growth_factor() == 2.0
    assert scaler.get_backoff_factor() == 0.5
    assert scaler.get_growth_interval() == 2000
    assert scaler.is_enabled() is True


def test_a_scaler_is_one_of_torchs():
    """Contract 1: frameworks ask with isinstance."""
    assert isinstance(ShardedGradScaler("cpu"), torch.amp.GradScaler)


def test_positional_factors_are_refused_because_torchs_two_classes_swap_them():
    """Contract 1: everything after init_scale is passed by name."""
    with pytest.raises(TypeError):
        ShardedGradScaler("cpu", 8.0, 2.0, 0.5)


@pytest.mark.parametrize(
    ("numbers", "allowed"),
    [
        ({"growth_factor": 1.0}, "greater than 1"),
        ({"growth_factor": 0.5}, "greater than 1"),
        ({"growth_factor": math.nan}, "greater than 1"),
        ({"growth_factor": math.inf}, "greater than 1"),
        ({"backoff_factor": 1.0}, "between 0 and 1"),
        ({"backoff_factor": 0.0}, "between 0 and 1"),
        ({"backoff_factor": -0.5}, "between 0 and 1"),
        ({"backoff_factor": math.nan}, "between 0 and 1"),
        ({"growth_interval": 0}, "from 1 to 2147483647"),
        ({"growth_interval": -3}, "from 1 to 2147483647"),
        ({"init_scale": 0.0}, "must be a finite number in"),
        ({"init_scale": -2.0}, "must be a finite number in"),
        ({"init_scale": math.nan}, "must be a finite number in"),
        ({"init_scale": math.inf}, "must be a finite number in"),
        ({"init_scale": 1e39}, "must be a finite number in"),
        ({"timeout_s": 0.0}, "must be a number of seconds"),
        ({"timeout_s": math.inf}, "must be a number of seconds"),
    ],
    ids=str,
)
def test_a_number_out_of_range_is_named_with_what_is_allowed(numbers, allowed):
    """Contract 2: the message quotes the value and the range; old except clauses still match."""
    error = raised(lambda: ShardedGradScaler("cpu", **numbers))
    assert isinstance(error, ConfigError)
    assert isinstance(error, AssertionError) and isinstance(error, ValueError)
    [(name, value)] = numbers.items()
    assert repr(value) in str(error)
    assert allowed in str(error)
    assert name in str(error) or name == "init_scale"


@pytest.mark.parametrize("numbers", [{"growth_factor": 1.0}, {"backoff_factor": 1.0}], ids=str)
def test_what_torch_refuses_is_refused_with_its_type(numbers):
    """Contract 2: an AssertionError in torch is one here."""
    with pytest.raises(AssertionError):
        torch.amp.GradScaler("cpu", **numbers)
    with pytest.raises(AssertionError):
        ShardedGradScaler("cpu", **numbers)


@pytest.mark.parametrize(
    "numbers",
    [
        {"growth_factor": math.nan},
        {"backoff_factor": -1.0},
        {"growth_interval": 0},
        {"init_scale": 0.0},
        {"init_scale": math.nan},
    ],
    ids=str,
)
def test_torch_still_takes_what_we_refuse(numbers):
    """Contract 2: the day this fails, torch has changed, and the statement's last words with it."""
    torch.amp.GradScaler("cpu", **numbers)
    with pytest.raises(ConfigError):
        ShardedGradScaler("cpu", **numbers)


def test_numbers_beside_a_policy_are_refused():
    """Contract 2: one place says how the scale moves."""
    with pytest.raises(ConfigError, match="beside policy="):
        ShardedGradScaler("cpu", growth_interval=7, policy=ConstantScale())


def test_process_group_beside_comm_is_refused(rank_0_of_2):
    """Contract 2: a scaler agrees in one group."""
    with pytest.raises(ConfigError, match="process_group and comm are both given"):
        ShardedGradScaler("cpu", process_group=dist.group.WORLD, comm=Solo())


def test_a_group_without_this_rank_is_refused(rank_0_of_2):
    """Contract 2: torch's collectives silently do nothing in such a group."""
    others = dist.new_group([1])
    with pytest.raises(ConfigError, match="rank 0 is not a member"):
        ShardedGradScaler("cpu", process_group=others)


@BOTH
def test_cuda_without_cuda_warns_and_disables(make, monkeypatch):
    """Contract 3: the same warning, and the answers of a disabled scaler."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: True)
    with pytest.warns(UserWarning, match="CUDA is not available.  Disabling") as caught:
        scaler = make("cuda")
    assert caught[0].filename == __file__
    assert scaler.is_enabled() is False
    assert scaler.get_scale() == 1.0
    assert scaler.state_dict() == {}


def test_cuda_is_the_default_device(monkeypatch):
    """Contract 3: torch's code with no argument means the same here."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: True)
    for make in (torch.amp.GradScaler, ShardedGradScaler):
        with pytest.warns(UserWarning, match="Disabling"):
            make()


def test_a_disabled_scaler_passes_through():
    """Contract 3: the optimizer steps on what is there, closure included, whatever it is."""
    for make in (torch.amp.GradScaler, ShardedGradScaler):
        scaler = make("cpu", enabled=False)
        optimizer = sgd(full(math.inf))
        scaler.unscale_(optimizer)
        scaler.unscale_(optimizer)
        assert scaler.step(optimizer, lambda: 7.0) == 7.0
        scaler.update()
        scaler.load_state_dict({})
        assert optimizer.param_groups[0]["params"][0].isinf().all()


def train(make, during=lambda i: None):
    """Six iterations, the fourth of them bad."""
    scaler = make("cpu", init_scale=48.0, growth_interval=2)
    optimizer = sgd(full(0.0), full(0.0), lr=0.1, momentum=0.9)
    for i in range(6):
        during(i)
        for j, param in enumerate(optimizer.param_groups[0]["params"]):
            param.grad = full(math.inf if i == 3 and j == 1 else 1.7 * i - j)
        scaler.scale(torch.ones(()))
        if i % 2:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    return scaler, optimizer


def counted(monkeypatch) -> list[str]:
    """Names of the collectives that are started from now on."""
    started: list[str] = []
    for name in ("all_reduce", "all_gather", "all_gather_object", "broadcast", "barrier"):
        monkeypatch.setattr(dist, name, lambda *a, name=name, **k: started.append(name))
    return started


def test_without_a_group_it_is_torch_bit_for_bit():
    """Contract 4: no process group."""
    (theirs, one), (ours, other) = train(torch.amp.GradScaler), train(ShardedGradScaler)
    assert_same_scale(theirs, ours)
    assert_same_optimizers(one, other)
    assert theirs.get_scale() == 96.0  # grew twice, and backed off once


def test_in_a_group_of_one_nothing_is_sent_and_it_is_torch_bit_for_bit(group_of_one, monkeypatch):
    """Contract 4: a group made before the scaler."""
    started = counted(monkeypatch)
    (theirs, one), (ours, other) = train(torch.amp.GradScaler), train(ShardedGradScaler)
    assert_same_scale(theirs, ours)
    assert_same_optimizers(one, other)
    assert started == []


def test_a_group_may_come_after_the_scaler_and_after_its_first_steps():
    """Contract 4: a group of one made while training goes on changes nothing."""

    def make_group(i: int) -> None:
        if i == 2:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    try:
        ours, other = train(ShardedGradScaler, make_group)
    finally:
        dist.destroy_process_group()
    theirs, one = train(torch.amp.GradScaler)
    assert_same_scale(theirs, ours)
    assert_same_optimizers(one, other)


def test_a_larger_group_that_comes_after_the_scaler_is_joined():
    """Contract 4: the group is looked for when it is needed, not when the scaler is made."""
    scaler = ShardedGradScaler("cpu")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        comm = scaler._judge.bond.communicator()
        assert comm is not None and comm.size == 2
    finally:
        dist.destroy_process_group()
    with pytest.raises(StageError, match="destroyed"):
        scaler.unscale_(sgd(full(1.0)))


def test_a_comm_of_one_does_its_collective():
    """Contract 4: the short cut is the scaler's, for torch.distributed; a given comm is used."""

    class Counting(Solo):
        num_reduces = 0

        def all_reduce_sum_(self, buffer):
            self.num_reduces += 1

    comm = Counting()
    scaler = ShardedGradScaler("cpu", comm=comm)
    scaler.unscale_(sgd(full(1.0)))
    assert comm.num_reduces == 1


CALLS_WITHOUT_SCALE = {
    "unscale_": lambda scaler, optimizer: scaler.unscale_(optimizer),
    "step": lambda scaler, optimizer: scaler.step(optimizer),
    "update": lambda scaler, optimizer: scaler.update(4.0),
}


@pytest.mark.parametrize("call", CALLS_WITHOUT_SCALE.values(), ids=CALLS_WITHOUT_SCALE)
def test_no_scale_call_is_needed_first(call):
    """Contract 5: torch asserts."""
    error = raised(lambda: call(torch.amp.GradScaler("cpu"), sgd(full(1.0))))
    assert isinstance(error, AssertionError)
    call(ShardedGradScaler("cpu"), sgd(full(1.0)))


def test_a_resumed_scaler_steps_by_the_loaded_scale_before_any_scale_call():
    """Contract 5: the broken resume of several frameworks."""
    saved = ShardedGradScaler("cpu", init_scale=8.0).state_dict()
    scaler = ShardedGradScaler("cpu")
    scaler.load_state_dict(saved)
    optimizer = sgd(full(16.0))
    scaler.unscale_(optimizer)
    assert grad_of(optimizer).tolist() == [2.0] * 4
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.param_groups[0]["params"][0].tolist() == [-1.0] * 4


def test_until_its_first_use_no_device_is_touched():
    """Contract 5: this machine has no such device, and all of this works."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scaler = ShardedGradScaler("xpu", init_scale=4.0)
    assert scaler._scale is None and scaler._growth_tracker is None
    assert scaler.get_scale() == 4.0
    scaler.load_state_dict(ShardedGradScaler("cpu", init_scale=32.0).state_dict())
    assert scaler.state_dict()["scale"] == 32.0
    with pytest.raises((RuntimeError, AssertionError), match=r"(?i)xpu"):
        scaler.begin()


def test_a_type_of_device_that_torch_does_not_know_is_refused():
    """Contract 2: not at the first use, which may be far from the mistake."""
    with pytest.raises(ConfigError, match="'gpu'"):
        ShardedGradScaler("gpu")


def test_the_state_is_placed_at_first_use_and_stays():
    """Contract 5: on the device type given, not on that of the first loss."""
    scaler = ShardedGradScaler("meta")
    scaler.scale(torch.ones((), device="meta"))
    scale = scaler._scale
    assert scale.device.type == "meta"
    scaler.scale(torch.ones((), device="meta"))
    assert scaler._scale is scale
