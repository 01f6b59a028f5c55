"""Statements 6 to 8: what ``scale`` takes and gives."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, namedtuple
from types import GeneratorType

import pytest
import torch

from shardscale import ShardedGradScaler
from tests.conformance.side_by_side import BOTH, assert_same_bits, raised

Losses = namedtuple("Losses", ["main", "extra"])


@BOTH
def test_a_tensor_is_multiplied_and_autograd_flows(make):
    """Contract 6: tensor in, tensor times scale out."""
    weight = torch.nn.Parameter(torch.tensor(3.0))
    loss = make("cpu", init_scale=8.0).scale(weight * 2)
    loss.backward()
    assert loss.item() == 48.0
    assert weight.grad.item() == 16.0


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
)
def test_a_loss_gives_the_dtype_and_the_bits_that_torchs_gives(dtype):
    """Contract 6: a scalar float16 or bfloat16 loss becomes float32."""
    loss = torch.tensor(1.5, dtype=dtype)
    theirs = torch.amp.GradScaler("cpu").scale(loss)
    ours = ShardedGradScaler("cpu").scale(loss)
    assert_same_bits(theirs, ours)
    assert ours.real.item() == 1.5 * 65536


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_losses_of_any_shape_give_float32(dtype):
    """Contract 6: where torch leaves a float16 vector as it is, 1.5 times 65536 is Inf."""
    losses = torch.full((3,), 1.5, dtype=dtype)
    assert torch.amp.GradScaler("cpu").scale(losses).dtype == dtype
    scaled = ShardedGradScaler("cpu").scale(losses)
    assert scaled.dtype == torch.float32
    assert scaled.tolist() == [98304.0] * 3


def test_a_float16_loss_sends_a_float16_gradient_back():
    """Contract 6: the cast to float32 is part of the graph."""
    weight = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float16))
    ShardedGradScaler("cpu", init_scale=1024.0).scale(weight * 1.5).backward()
    assert weight.grad.dtype == torch.float16
    assert weight.grad.item() == 1536.0


def test_the_result_stays_on_the_device_of_its_input():
    """Contract 6: the scale comes to the loss."""
    scaler = ShardedGradScaler("cpu")
    assert scaler.scale(torch.ones(2, device="meta")).device.type == "meta"


@BOTH
@pytest.mark.parametrize("kind", [list, tuple])
def test_lists_and_tuples_keep_their_type_at_every_depth(make, kind):
    """Contract 7: list to list, tuple to tuple."""
    one = torch.ones(2)
    scaled = make("cpu", init_scale=2.0).scale(kind([one, kind([one, [one]])]))
    assert type(scaled) is kind and type(scaled[1]) is kind and type(scaled[1][1]) is list
    assert_same_bits(scaled[1][1][0], one * 2)


def test_a_namedtuple_comes_back_as_the_same_namedtuple():
    """Contract 7: torch raises TypeError."""
    outputs = Losses(torch.ones(()), [torch.ones(2)])
    with pytest.raises(TypeError):
        torch.amp.GradScaler("cpu").scale(outputs)
    scaled = ShardedGradScaler("cpu", init_scale=2.0).scale(outputs)
    assert type(scaled) is Losses
    assert scaled.main.item() == 2.0 and scaled.extra[0].tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    "outputs",
    [
        {"a": torch.ones(1)},
        OrderedDict(a=torch.ones(1)),
        defaultdict(list, a=torch.ones(1)),
    ],
    ids=lambda outputs: type(outputs).__name__,
)
def test_a_dict_comes_back_with_scaled_values(outputs):
    """Contract 7: the type and the keys stay."""
    scaled = ShardedGradScaler("cpu", init_scale=2.0).scale(outputs)
    assert type(scaled) is type(outputs)
    assert scaled["a"].tolist() == [2.0]
    assert outputs["a"].tolist() == [1.0]


def test_torch_iterates_the_keys_of_a_dict():
    """Contract 7: the day this fails, torch has changed."""
    keys = torch.amp.GradScaler("cpu").scale({torch.ones(()): 1})
    assert [key.item() for key in keys] == [65536.0]


@BOTH
def test_other_iterables_are_mapped_when_they_are_iterated(make):
    """Contract 7: nothing is asked for before the caller asks."""
    asked = []

    def losses():
        for value in (1.0, 2.0):
            asked.append(value)
            yield torch.tensor(value)

    scaled = make("cpu", init_scale=4.0).scale(losses())
    assert asked == []
    assert isinstance(scaled, GeneratorType | map)
    assert next(scaled).item() == 4.0
    assert asked == [1.0]
    assert [t.item() for t in scaled] == [8.0]


@pytest.mark.parametrize("outputs", [3.0, None, object(), [torch.ones(()), 3]], ids=repr)
def test_anything_else_is_torchs_value_error(outputs):
    """Contract 7: the message begins with torch's."""
    theirs = raised(lambda: torch.amp.GradScaler("cpu").scale(outputs))
    ours = raised(lambda: ShardedGradScaler("cpu").scale(outputs))
    assert type(theirs) is ValueError and isinstance(ours, ValueError)
    assert str(ours).startswith(str(theirs))


@pytest.mark.parametrize("outputs", ["loss", "", b"loss", {"a": "loss"}], ids=repr)
def test_a_string_is_no_iterable_of_tensors(outputs):
    """Contract 7: torch gives a map that fails, or never ends, once it is read."""
    torch.amp.GradScaler("cpu").scale(outputs)
    with pytest.raises(ValueError, match="outputs must be a Tensor or an iterable of Tensors"):
        ShardedGradScaler("cpu").scale(outputs)


@BOTH
@pytest.mark.parametrize("outputs", [torch.ones(2), [1], "loss", None], ids=repr)
def test_disabled_returns_the_very_object(make, outputs):
    """Contract 8: whatever it is."""
    assert make("cpu", enabled=False).scale(outputs) is outputs


def test_a_wrapped_loss_keeps_its_value_and_scales_its_gradient():
    """Contract 6: for schedules that call ``backward`` themselves; same gradient as ``scale``."""
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    scaler = ShardedGradScaler("cpu", init_scale=8.0)
    loss = scaler.wrap_loss(lambda w, *, bias: (w * w).sum() + bias)(weight, bias=1.0)
    scaler.update(2.0)  # the scale of the moment the loss was made counts
    loss.backward()
    assert loss.item() == 6.0
    assert weight.grad.tolist() == [16.0, 32.0]
    disabled = ShardedGradScaler("cpu", enabled=False)
    weight.grad = None
    disabled.wrap_loss(torch.sum)(weight).backward()
    assert weight.grad.tolist() == [1.0, 1.0]


def test_a_wrapped_loss_function_may_return_several_losses():
    weight = torch.ones(2, requires_grad=True)
    scaler = ShardedGradScaler("cpu", init_scale=8.0)
    one, rest = scaler.wrap_loss(lambda w: (w.sum(), {"other": w.sum() * 2}))(weight)
    assert (one.item(), rest["other"].item()) == (2.0, 4.0)
    (one + rest["other"]).backward()
    assert weight.grad.tolist() == [24.0, 24.0]
    with pytest.raises(ValueError, match="a float was found"):
        scaler.wrap_loss(lambda: 1.0)()
