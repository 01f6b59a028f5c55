"""The kernels in compiled code: operators that the compiler calls as they are, on no copies."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

from shardscale import kernels
from shardscale.kernels import native
from tests.compile.step import operators

pytestmark = pytest.mark.filterwarnings("default")  # compilers warn of what they do themselves

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def make_grads(bad: float = 1.0):
    grads = [torch.arange(1.0, 8).to(dtype) for dtype in DTYPES]
    return [*grads, torch.empty(0), torch.tensor([[2.0, bad]]).t()]


def scalars(factor: float = 0.25):
    return torch.tensor(factor), torch.zeros(()), torch.zeros((), dtype=torch.float64)


@pytest.mark.parametrize("with_sum", [False, True])
@pytest.mark.parametrize("name", ["unscale_", "check_"])
def test_torch_finds_nothing_wrong_with_the_operators(name, with_sum):
    """Schema against what is really written, fake tensors, and functionalisation."""
    inv_scale, found_inf, sum_squares = scalars()
    arguments = (make_grads(math.inf), inv_scale, found_inf, sum_squares if with_sum else None)
    opcheck(getattr(torch.ops.shardscale, name).default, arguments)


def test_torch_finds_nothing_wrong_with_scaling():
    opcheck(torch.ops.shardscale.scale_.default, (make_grads(), torch.tensor(0.25)))


def unscale_and_clip(grads, inv_scale, found_inf, sum_squares):
    kernels.check_(grads, inv_scale, found_inf)
    kernels.unscale_(grads, inv_scale, found_inf, sum_squares)
    kernels.scale_(grads, 1 / sum_squares.sqrt().float())


@pytest.mark.parametrize("bad", [1.0, math.inf, math.nan])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_code_gives_the_bits_of_eager(inductor, backend, bad):
    eager, compiled = make_grads(bad), make_grads(bad)
    expected, found = scalars(), scalars()
    unscale_and_clip(eager, *expected)
    torch.compile(unscale_and_clip, backend=backend, fullgraph=True)(compiled, *found)
    for one, other in zip((*eager, *expected), (*compiled, *found), strict=True):
        assert torch.equal(one.nan_to_num(nan=-3.0), other.nan_to_num(nan=-3.0))
    assert found[1].item() == float(not math.isfinite(bad))


def test_the_compiler_sees_three_calls_and_nothing_of_what_they_do():
    counter = CompileCounterWithBackend("eager")
    torch.compile(unscale_and_clip, backend=counter, fullgraph=True)(make_grads(), *scalars())
    called = operators(counter.graphs)
    assert {name for name in called if "shardscale" in name} == {
        "shardscale.unscale_",
        "shardscale.check_",
        "shardscale.scale_",
    }


@pytest.mark.parametrize("made_inside", [False, True])
def test_gradients_are_written_where_they_are(inductor, monkeypatch, made_inside):
    """What the kernel is given is what the caller has in the end, and no code was made to copy."""
    seen = []
    real = native.unscale_

    def watched(grads, *rest):
        seen.extend(g.data_ptr() for g in grads)
        return real(grads, *rest)

    def unscale(grads, inv_scale, found_inf):
        grads = [g * 2 for g in grads] if made_inside else grads
        kernels.unscale_(grads, inv_scale, found_inf)
        return grads

    monkeypatch.setattr(native, "unscale_", watched)
    compiled = torch.compile(unscale, backend=inductor, fullgraph=True)
    inv_scale, found_inf, _ = scalars()
    given = [torch.full((5,), 4.0), torch.full((3,), 8.0)]
    returned, code = run_and_get_code(compiled, given, inv_scale, found_inf)
    assert seen == [g.data_ptr() for g in returned]
    assert returned[0][0].item() == (2.0 if made_inside else 1.0)
    [text] = code
    assert "shardscale.unscale_" in text
    assert not re.search(r"clone|copy_\(|as_strided_copy", text)


def test_a_mode_that_watches_operators_is_shown_ours():
    """As `make_fx`, whose graph would lack what is done behind torch's back."""

    def double_and_unscale(grad, inv_scale, found_inf):
        doubled = grad * 2
        kernels.unscale_([doubled], inv_scale, found_inf)
        return doubled + 1

    inv_scale, found_inf, _ = scalars()
    traced = make_fx(double_and_unscale)(torch.ones(3), inv_scale, found_inf)
    assert "shardscale.unscale_.default" in operators([traced])
    assert traced(torch.ones(3), inv_scale, found_inf).tolist() == [1.5] * 3

    with FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.ones(3))
        kernels.scale_([fake], mode.from_tensor(inv_scale))
        assert fake.shape == (3,)


def test_an_autograd_graph_notices_that_a_gradient_was_written():
    """As after any operation in place, also where the kernel writes past torch's own counter."""
    grad, weight = torch.ones(3), torch.ones(3, requires_grad=True)
    product = (weight * grad).sum()
    kernels.unscale_([grad], torch.tensor(0.5), torch.zeros(()))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
