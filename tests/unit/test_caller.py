"""A warning points at the line of the user's program that it is about."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from shardscale import DynamicScale, ShardedGradScaler


class Legacy(torch.optim.SGD):
    """Of the kind that is handed the scaler."""

    _step_supports_amp_scaling = True

    def step(self, closure=None, *, grad_scaler=None):
        grad_scaler._check_inf_per_device(self)


def optimizer(make=torch.optim.SGD, **how):
    param = torch.nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    return make([param], lr=0.1, **how)


def skip_at_the_floor(fused):
    scaler = ShardedGradScaler("cpu", 8.0, policy=DynamicScale(min_scale=8.0))
    mine = optimizer(fused=fused)
    for _ in range(4):
        mine.param_groups[0]["params"][0].grad = torch.full((2,), math.inf)
        scaler.step(mine)
        scaler.update()


def add_up_over_two_scales():
    scaler = ShardedGradScaler("cpu", 8.0)
    mine = optimizer()
    for _ in range(3):
        scaler.scale(torch.ones(()))
        scaler.unscale_(mine)
        scaler.update()


def hand_over_the_scaler():
    ShardedGradScaler("cpu").step(optimizer(Legacy))


def load_a_scale_out_of_range():
    state = ShardedGradScaler("cpu", 32.0, policy=DynamicScale(min_scale=16.0)).state_dict()
    ShardedGradScaler("cpu").load_state_dict({**state, "scale": 8.0})


CAUSES = {
    "floor": lambda: skip_at_the_floor(fused=False),
    "floor, read late": lambda: skip_at_the_floor(fused=True),
    "two scales": add_up_over_two_scales,
    "legacy optimizer": hand_over_the_scaler,
    "clamped": load_a_scale_out_of_range,
}


@pytest.mark.parametrize("name", CAUSES)
def test_a_warning_names_the_line_of_its_caller(name):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        CAUSES[name]()
    assert [w.filename for w in caught] == [__file__]
