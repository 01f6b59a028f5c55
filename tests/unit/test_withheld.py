"""What can hold gradients back is found where torch has it, in whatever version."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from shardscale.layouts import Layouts
from shardscale.withheld import units_of


@pytest.fixture
def one_of_two():
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def test_a_plain_module_holds_nothing_back():
    assert list(units_of("", nn.Linear(2, 2))) == []


def test_modules_that_are_sharded_together_are_one_unit(one_of_two):
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    fully_shard(list(net), mesh=one_of_two)
    found = dict(pair for module in net for pair in units_of("both", module))
    assert [unit.text for unit in found.values()] == ["both (FSDP2)"]


def test_a_scaler_keeps_no_wrapper_alive(one_of_two):
    layouts = Layouts()
    layouts.attach(nn.parallel.DistributedDataParallel(nn.Linear(2, 2)), None)
    (unit,) = layouts._units.values()
    gc.collect()
    assert unit.ref() is None
    layouts.attach(nn.Linear(2, 2), None)
    assert not layouts._units


@pytest.mark.parametrize("has_group", [True, False])
def test_an_older_torch_has_one_group_of_parameters_or_none(one_of_two, monkeypatch, has_group):
    """The state is made up: one torch at a time can be installed."""
    module = fully_shard(nn.Linear(2, 2), mesh=one_of_two)
    group = module._get_fsdp_state()._fsdp_param_group
    state = SimpleNamespace(_fsdp_param_group=group if has_group else None)
    monkeypatch.setattr(type(module), "_get_fsdp_state", lambda self: state)
    assert [key for key, _ in units_of("", module)] == ([id(group)] if has_group else [])


def test_a_torch_that_names_its_flags_otherwise_is_not_asked(one_of_two):
    module = fully_shard(nn.Linear(2, 2), mesh=one_of_two)
    del module._get_fsdp_state()._fsdp_param_group.reduce_grads
    assert list(units_of("", module)) == []
