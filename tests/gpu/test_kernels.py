"""On a GPU both the kernels chosen there and torch's operators give the reference's bits."""

from __future__ import annotations

import math

import pytest
import torch

from shardscale import kernels
from shardscale.kernels import foreach, reference

pytestmark = pytest.mark.gpu

some = pytest.mark.parametrize("some", [foreach, kernels], ids=["foreach", "chosen"])

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SHAPES = [(0,), (1,), (), (3, 5), (2**16 + 1,)]
BAD = [math.inf, -math.inf, math.nan]


def make_grads(dtype, device="cuda"):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator).to(device, dtype) * 8 for shape in SHAPES]


def run(backend, grads, factor, squares=False, device="cuda"):
    """The gradients afterwards, the flag, and the sum of squares."""
    grads = [g.clone() for g in grads]
    found_inf = torch.zeros((), device=device)
    total = torch.zeros((), dtype=torch.float64, device=device) if squares else None
    backend.unscale_(grads, torch.tensor(factor, device=device), found_inf, total)
    return grads, found_inf.item(), None if total is None else total.item()


def assert_same_bits(some, others):
    for one, other in zip(some, others, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


@some
@pytest.mark.parametrize("factor", [2.0**-16, 1 / 3, 1.0, 3.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unscaled_gradients_have_the_references_bits(some, dtype, factor):
    mine, found, _ = run(some, make_grads(dtype), factor)
    expected, expected_found, _ = run(reference, make_grads(dtype), factor)

    assert_same_bits(mine, expected)
    assert found == expected_found == 0.0


@some
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum_of_squares_is_the_references(some, dtype):
    _, _, total = run(some, make_grads(dtype), 0.25, squares=True)
    _, _, expected = run(reference, make_grads(dtype), 0.25, squares=True)

    # Torch's operators add in float64, the Triton kernel adds a few squares in float32 first.
    assert total == pytest.approx(expected, rel=1e-6)


@some
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("where", range(1, len(SHAPES)))
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_bad_element_is_found_wherever_it_is(some, dtype, where, bad):
    grads = make_grads(dtype)
    grads[where].view(-1)[-1] = bad

    assert run(some, grads, 0.5)[1] == 1.0


@some
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", DTYPES)
def test_checked_gradients_are_judged_and_left_scaled(some, dtype, bad):
    for value, expected in ((1.0, 0.0), (bad, 1.0)):
        grads = make_grads(dtype)
        grads[-1][7] = value
        before = [g.clone() for g in grads]
        found_inf = torch.zeros((), device="cuda")
        some.check_(grads, torch.tensor(0.5, device="cuda"), found_inf)

        assert found_inf.item() == expected
        assert_same_bits(grads, before)


@some
@pytest.mark.parametrize("kernel", ["unscale_", "check_"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_that_overflows_is_found(some, dtype, kernel):
    grads = [torch.full((3,), torch.finfo(dtype).max / 2, dtype=dtype, device="cuda")]
    found_inf = torch.zeros((), device="cuda")
    getattr(some, kernel)(grads, torch.tensor(4.0, device="cuda"), found_inf)

    assert found_inf.item() == 1.0


@some
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_factor_of_one_leaves_every_bit_alone(some, dtype):
    tiny = torch.finfo(dtype).smallest_normal / 4
    grads = [torch.tensor([tiny, -0.0, 0.0, 1.0], dtype=dtype, device="cuda")]
    before = [g.clone() for g in grads]
    some.unscale_(grads, torch.ones((), device="cuda"), torch.zeros((), device="cuda"))
    some.scale_(grads, torch.ones((), device="cuda"))

    assert_same_bits(grads, before)


@some
@pytest.mark.parametrize("dtype", DTYPES)
def test_clipping_multiplies_as_the_reference(some, dtype):
    factor = torch.tensor(0.3, device="cuda")
    mine, expected = make_grads(dtype), make_grads(dtype)
    some.scale_(mine, factor)
    reference.scale_(expected, factor)

    assert_same_bits(mine, expected)


@pytest.mark.parametrize("flag_on", ["cpu", "cuda"])
@pytest.mark.parametrize("bad_on", [None, "cpu", "cuda"])
def test_gradients_on_two_devices_share_one_flag(flag_on, bad_on):
    grads = {device: make_grads(torch.float32, device) for device in ("cpu", "cuda")}
    if bad_on is not None:
        grads[bad_on][-1][0] = math.inf
    together = grads["cpu"] + grads["cuda"]
    _, found, total = run(kernels, together, 0.5, squares=True, device=flag_on)

    assert found == (0.0 if bad_on is None else 1.0)
    if bad_on is None:
        expected = 2 * run(reference, grads["cpu"], 0.5, squares=True, device="cpu")[2]
        # The kernel for the CPU squares in float32.
        assert total == pytest.approx(expected, rel=1e-6)


@some
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_gradients_have_a_finite_sum_of_squares(some, dtype):
    _, found, total = run(some, [torch.full((4,), 1e30, dtype=dtype)], 1.0, True, "cpu")
    grads = [torch.full((4,), 1e30, dtype=dtype, device="cuda")]
    _, found_there, total_there = run(some, grads, 1.0, squares=True)

    assert (found, found_there) == (0.0, 0.0)
    assert total_there == pytest.approx(total, rel=1e-6)  # of few additions in float32
    assert math.isfinite(total_there)
