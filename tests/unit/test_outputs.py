"""Nests of outputs, and the loss whose gradient alone is scaled."""

from __future__ import annotations

from collections import OrderedDict, namedtuple

import pytest
import torch

from shardscale.outputs import map_tensors, scale_gradient, times_scale

Pair = namedtuple("Pair", ["a", "b"])


def test_every_leaf_is_mapped_once_and_every_container_is_new():
    leaf = torch.ones(1)
    given = {"x": [leaf, (leaf, Pair(leaf, [leaf]))], "y": OrderedDict(z=leaf)}
    seen = []
    mapped = map_tensors(lambda t: seen.append(t) or len(seen), given)
    assert mapped == {"x": [1, (2, Pair(3, [4]))], "y": OrderedDict(z=5)}
    assert type(mapped["x"][1][1]) is Pair and type(mapped["y"]) is OrderedDict
    assert all(t is leaf for t in seen)
    assert given["x"][0] is leaf


def test_empty_containers_stay_what_they_are():
    for empty in ([], (), {}, OrderedDict()):
        mapped = map_tensors(lambda t: t, empty)
        assert mapped == empty and type(mapped) is type(empty)


def test_what_is_found_is_named():
    with pytest.raises(ValueError, match="but a int was found"):
        map_tensors(lambda t: t, [torch.ones(1), 3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_sixteen_bit_loss_is_multiplied_in_float32(dtype):
    scaled = times_scale(torch.tensor([3.0, 0.1], dtype=dtype), torch.tensor(65536.0))
    want = torch.tensor([3.0, 0.1], dtype=dtype).double() * 65536
    assert scaled.dtype == torch.float32
    assert torch.equal(scaled.double(), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scale_gradient_leaves_the_value_and_scales_the_gradient(dtype):
    leaf = torch.tensor([1.5, -2.0], dtype=dtype, requires_grad=True)
    loss = scale_gradient(leaf * 2, torch.tensor(8.0))
    assert loss.tolist() == [3.0, -4.0]
    loss.sum().backward()
    assert leaf.grad.dtype == dtype
    assert leaf.grad.tolist() == [16.0, 16.0]


def test_scale_gradient_keeps_the_scale_of_its_moment():
    """``update`` writes into the scale before a pipeline's backward comes by."""
    leaf, scale = torch.ones(2, requires_grad=True), torch.tensor(8.0)
    loss = scale_gradient(leaf, scale)
    scale.fill_(1000.0)
    loss.sum().backward()
    assert leaf.grad.tolist() == [8.0, 8.0]


def test_scale_gradient_returns_a_tensor_of_its_own():
    """A view of the same storage, not the same object: autograd tells them apart."""
    leaf = torch.ones((), requires_grad=True)
    loss = scale_gradient(leaf, torch.tensor(2.0))
    assert loss is not leaf and loss.requires_grad
