"""What the demo counts and where it puts its overflow, on a model that is not wrapped."""

from __future__ import annotations

import pytest
import torch

from shardscale.demo.model import DigitsNet, parameter_names, plain_name
from shardscale.demo.options import Injection
from shardscale.demo.overflow import overflow_
from shardscale.demo.witness import StepWitness


def test_only_a_change_of_parameters_counts_as_a_step():
    model = DigitsNet()
    witness = StepWitness(model)
    witness.observe()
    with torch.no_grad():
        model.head.bias[-1].add_(1e-3)
    witness.observe()
    witness.observe()
    assert (witness.applied, witness.skipped) == (1, 2)


def test_equal_parameters_have_equal_digests():
    torch.manual_seed(0)
    one = DigitsNet()
    torch.manual_seed(0)
    same = DigitsNet()
    assert StepWitness(one).digest() == StepWitness(same).digest()
    assert StepWitness(one).digest() != StepWitness(DigitsNet()).digest()
    assert len(StepWitness(one).digest()) == 12


def test_parameters_without_elements_have_a_digest():
    nothing = torch.nn.ParameterList([torch.empty(0), torch.empty(0, 3)])
    assert len(StepWitness(nothing).digest()) == 12


@pytest.fixture
def model() -> DigitsNet:
    """A model of which this rank holds no gradient of the first layer."""
    model = DigitsNet()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    model.first.weight.grad = None
    model.first.bias = torch.nn.Parameter(torch.empty(0))
    model.first.bias.grad = torch.empty(0)
    return model


def infinite(model: DigitsNet) -> dict[str, int]:
    return {
        name: count
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and (count := int(parameter.grad.isinf().sum()))
    }


def test_one_element_of_the_named_parameter_overflows(model: DigitsNet):
    assert overflow_(model, Injection(1, 5, "head.bias"), 1, 5) == "head.bias"
    assert infinite(model) == {"head.bias": 1}


@pytest.mark.parametrize("param", [None, "first.weight", "first.bias"])
def test_the_next_best_parameter_is_taken_where_a_shard_is_empty(
    model: DigitsNet, param: str | None
):
    assert overflow_(model, Injection(1, 5, param), 1, 5) == "second.weight"
    assert infinite(model) == {"second.weight": 1}


@pytest.mark.parametrize(("rank", "step"), [(0, 5), (1, 4)])
def test_other_ranks_and_steps_are_left_alone(model: DigitsNet, rank: int, step: int):
    assert overflow_(model, Injection(1, 5, None), rank, step) is None
    assert infinite(model) == {}


@pytest.mark.parametrize(
    "wrapped",
    [
        "second.weight",
        "module.second.weight",
        "second._fsdp_wrapped_module.weight",
        "_fsdp_wrapped_module.second._fsdp_wrapped_module.weight",
    ],
)
def test_wrapping_does_not_change_the_name_of_a_parameter(wrapped: str):
    assert plain_name(wrapped) == "second.weight"
    assert plain_name(wrapped) in parameter_names()
