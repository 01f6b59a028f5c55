"""Kernels: the same bits as the reference and as torch, nothing touched beside, nothing copied."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shardscale import kernels
from shardscale.kernels import foreach, inverse_scale, reference

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
FACTORS = [0.5, 1.0, 2.0**-16, 1.7, 3.0, 0.0, 3e38, 1e-40, math.inf, math.nan, 1 / 3]
INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}

# Torch's own operators, which serve wherever no other kernel does, and what the CPU is given here.
some = pytest.mark.parametrize("some", [foreach, kernels], ids=["foreach", "chosen"])

# A view of a flat tensor of 400 elements, whose other elements nobody may touch.
VIEWS = {
    "flat": lambda flat: flat[:37],
    "misaligned": lambda flat: flat[3:40],
    "0-dim": lambda flat: flat[5],
    "empty": lambda flat: flat[7:7],
    "empty 2-dim": lambda flat: flat[7:7].view(0, 3),
    "matrix": lambda flat: flat[1:31].view(5, 6),
    "transposed": lambda flat: flat[1:31].view(5, 6).t(),
    "permuted": lambda flat: flat[2:122].view(4, 5, 6).permute(2, 0, 1),
    "gaps": lambda flat: flat[2:122].view(4, 5, 6)[:, 1:4, ::2],
    "every third": lambda flat: flat[1:120:3],
    "channels last": lambda flat: flat[:120].view(2, 5, 4, 3).permute(0, 3, 1, 2),
}


def plants(dtype: torch.dtype) -> dict[str, float]:
    limits = torch.finfo(dtype)
    return {
        "nothing": 1.0,
        "inf": math.inf,
        "-inf": -math.inf,
        "nan": math.nan,
        "-0.0": -0.0,
        "denormal": limits.smallest_normal / 4,
        "smallest": limits.smallest_normal * limits.eps,
        "max": limits.max,
        "-max": -limits.max,
    }


# Every value with several views, every view with several values.
CASES = [
    (value, view)
    for i, value in enumerate(plants(torch.float32))
    for j, view in enumerate(VIEWS)
    if (i + j) % 3 == 0
]
VALUES = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4


def flat_values(dtype: torch.dtype, planted: float = 1.0) -> Tensor:
    """400 values of several magnitudes; the planted one lies in all views that have elements."""
    flat = VALUES.to(dtype, copy=True)
    flat[5:10] = planted
    return flat


def assert_same(one: Tensor, other: Tensor) -> None:
    """Bit for bit; a NaN equals any other, because which one an operation gives is not defined."""
    integer = INTEGER[one.dtype.itemsize]
    same = (one.view(integer) == other.view(integer)) | (one.isnan() & other.isnan())
    assert same.all(), f"{one[~same]} differs from {other[~same]}"


def flag(value: float = 0.0) -> Tensor:
    return torch.tensor(value)


def zero() -> Tensor:
    return torch.zeros((), dtype=torch.float64)


@some
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unscale_gives_the_bits_and_the_flag_of_the_reference_and_touches_nothing_else(
    some, dtype, factor
):
    for name, view_name in CASES:
        planted, view = plants(dtype)[name], VIEWS[view_name]
        flats = [flat_values(dtype, planted) for _ in range(2)]
        flags = [flag(), flag()]
        for kernel, flat, found in zip((some, reference), flats, flags, strict=True):
            kernel.unscale_([view(flat)], torch.tensor(factor), found)
        assert flags[0].item() == flags[1].item(), (name, view_name)
        assert_same(*flats)

        untouched = torch.ones(400, dtype=torch.bool)
        view(untouched).fill_(False)
        assert_same(flats[0][untouched], flat_values(dtype, planted)[untouched])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reference_says_what_the_formula_says(dtype):
    """The oracle, too, has one: judged before, and after where the factor exceeds one."""
    for factor in FACTORS:
        for planted in plants(dtype).values():
            grad = flat_values(dtype, planted)
            rounded = torch.tensor(factor)
            if dtype == torch.float64:
                want = grad * rounded.double()
            else:
                want = (grad.float() * rounded).to(dtype)
            bad = not math.isfinite(rounded) or rounded <= 0 or not grad.isfinite().all()
            bad = bad or (rounded > 1 and not want.isfinite().all())
            found = flag()
            reference.unscale_([grad], rounded, found)
            assert found.item() == float(bad)
            assert_same(grad, want)


@some
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unscale_gives_the_bits_of_torchs_operator(some, dtype, factor):
    """Independent of the reference; torch's flag misses products and useless factors."""
    for name, view_name in CASES:
        planted, view = plants(dtype)[name], VIEWS[view_name]
        ours, theirs = flat_values(dtype, planted), flat_values(dtype, planted)
        our_flag, their_flag = flag(), flag()
        some.unscale_([view(ours)], torch.tensor(factor), our_flag)
        torch._amp_foreach_non_finite_check_and_unscale_(
            [view(theirs)], their_flag, torch.tensor(factor)
        )
        assert_same(ours, theirs)
        if 0 < torch.tensor(factor).item() <= 1:
            assert our_flag.item() == their_flag.item()
        else:
            assert our_flag.item() >= their_flag.item()


@some
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_check_finds_what_unscale_finds_and_leaves_every_bit(some, dtype, factor):
    for name, view_name in CASES:
        planted, view = plants(dtype)[name], VIEWS[view_name]
        checked, unscaled = flat_values(dtype, planted), flat_values(dtype, planted)
        flags = [flag(), flag(), flag()]
        some.check_([view(checked)], torch.tensor(factor), flags[0])
        reference.check_([view(checked)], torch.tensor(factor), flags[1])
        some.unscale_([view(unscaled)], torch.tensor(factor), flags[2])
        assert flags[0].item() == flags[1].item() == flags[2].item(), (name, view_name)
        assert_same(checked, flat_values(dtype, planted))


@some
@pytest.mark.parametrize("factor", [0.5, 1.0, 1e-3, 0.0, 1.7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_gives_the_bits_of_the_reference(some, dtype, factor):
    for name, view_name in CASES:
        planted, view = plants(dtype)[name], VIEWS[view_name]
        one, other = flat_values(dtype, planted), flat_values(dtype, planted)
        some.scale_([view(one)], torch.tensor(factor))
        reference.scale_([view(other)], torch.tensor(factor))
        assert_same(one, other)


@pytest.mark.parametrize("kernel", [kernels, foreach, reference])
def test_a_flag_that_is_set_stays_set(kernel):
    for call in (kernel.unscale_, kernel.check_):
        found = flag(1.0)
        call([torch.ones(3)], flag(0.5), found)
        assert found.item() == 1.0


@pytest.mark.parametrize("kernel", [kernels, foreach, reference])
def test_no_gradient_at_all_is_good_unless_the_factor_is_useless(kernel):
    for call in (kernel.unscale_, kernel.check_):
        for factor, want in ((0.5, 0.0), (0.0, 1.0), (math.nan, 1.0), (math.inf, 1.0)):
            found = flag()
            call([], flag(factor), found)
            assert found.item() == want
    kernel.scale_([], flag(0.5))


@some
@pytest.mark.parametrize("bad", range(6))
def test_all_dtypes_and_shapes_in_one_call(some, bad):
    """Whichever of them holds the NaN; the sum of squares is over all."""
    grads = [flat_values(d)[:20] for d in DTYPES] + [torch.tensor(2.0), torch.empty(0)]
    copies = [g.clone() for g in grads]
    if grads[bad].numel():
        grads[bad].view(-1)[-1] = copies[bad].view(-1)[-1] = math.nan
    results = []
    for kernel, mine in ((some, grads), (reference, copies)):
        found, squares = flag(), zero()
        kernel.unscale_(mine, flag(0.25), found, squares)
        results.append((found.item(), squares.item()))
    for mine, yours in zip(grads, copies, strict=True):
        assert_same(mine, yours)
    assert results[0][0] == results[1][0] == (0.0 if bad == 5 else 1.0)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-6, nan_ok=True)  # 81 additions


# Up to 2^10 float32 elements are squared in float32: of equal ones, the worst case, the square was
# off by 1.8e-6 (torch 2.13, one thread). All else is float64.
SQUARES_RTOL = 5e-6

MAGNITUDES = [
    (torch.float32, 1.0),
    (torch.float32, 1e20),
    (torch.float32, 1e30),
    (torch.float32, 3e38),
    (torch.float32, 1e-20),
    (torch.float32, 1e-40),
    (torch.float32, 1e-45),
    (torch.bfloat16, 1.0),
    (torch.bfloat16, 1e30),
    (torch.bfloat16, 1e-40),
    (torch.float16, 1.0),
    (torch.float16, 60000.0),
    (torch.float16, 6e-8),
    (torch.float64, 1.0),
    (torch.float64, 1e150),
    (torch.float64, 1e-150),
]
NORM_SHAPES = {
    "one": lambda d: torch.rand(1).to(d),
    "small": lambda d: torch.rand(1000).to(d),
    "beyond a chunk": lambda d: torch.rand(2**17 + 77).to(d),
    "permuted beyond a chunk": lambda d: torch.rand(40, 50, 60).to(d).permute(1, 2, 0),
    "gaps beyond a chunk": lambda d: torch.rand(700, 300).to(d)[:, ::2],
    "slice of a transpose": lambda d: torch.rand(500, 400).to(d).t()[10:390],
}


@some
@pytest.mark.parametrize("shape", NORM_SHAPES.values(), ids=NORM_SHAPES)
@pytest.mark.parametrize(("dtype", "magnitude"), MAGNITUDES, ids=str)
def test_the_sum_of_squares_is_the_float64_formulas(some, dtype, magnitude, shape):
    """Finite for everything float32 can hold; torch's norm of 1e20 is Inf.

    Tolerance: see SQUARES_RTOL.
    """
    torch.manual_seed(1)
    rand = shape(torch.float64)
    grad = torch.empty_like(rand, dtype=dtype).copy_((rand * 0.5 + 0.5) * magnitude)
    if grad.dim() > 1:  # keep the gaps, which empty_like does not
        grad = shape(dtype).mul_(0).add_(grad)
    squares, scaled = zero(), zero()
    some.unscale_([grad], flag(1.0), flag(), squares)
    factor = flag(0.5 if magnitude > 1e-44 else 1.0)  # half of the smallest number is none
    some.check_([grad], factor, flag(), scaled)
    assert squares.dtype == torch.float64
    want = grad.double().square().sum().item()
    assert want > 0
    assert squares.item() == pytest.approx(want, rel=SQUARES_RTOL, abs=0)
    reference.check_([grad], factor, flag(), want := zero())  # half of a denormal is rounded
    assert scaled.item() == pytest.approx(want.item(), rel=SQUARES_RTOL, abs=0)


@some
def test_the_sum_of_squares_is_added_and_is_that_of_the_products_as_stored(some):
    """Rounded to the gradient's dtype: 1/3 in bfloat16 is 0.333984375."""
    squares = zero() + 100.0
    some.unscale_([torch.ones(3, dtype=torch.bfloat16)], flag(1 / 3), flag(), squares)
    assert squares.item() == pytest.approx(100 + 3 * 0.333984375**2, rel=1e-12)


@some
def test_the_sum_of_squares_of_a_check_is_that_of_products_that_nothing_was_stored_of(some):
    squares = zero() + 100.0
    some.check_([torch.ones(3, dtype=torch.bfloat16)], flag(1 / 3), flag(), squares)
    assert squares.item() == pytest.approx(100 + 3 / 9, rel=1e-8)


@some
def test_large_and_tiny_values_together(some):
    """In one chunk, in two, and in two tensors of one batch."""
    for grads in (
        [torch.tensor([1e30, 1e-30, 3.0])],
        [torch.cat([torch.full((2**16,), 1e-30), torch.full((2**16,), 1e30)])],
        [torch.full((10,), 1e-30), torch.full((10,), 1e30), torch.tensor(1e-44)],
    ):
        squares = zero()
        some.unscale_(grads, flag(1.0), flag(), squares)
        want = sum(g.double().square().sum().item() for g in grads)
        assert squares.item() == pytest.approx(want, rel=SQUARES_RTOL, abs=0)


@some
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", [1, 100, 2**16 + 1])
def test_the_sum_of_squares_of_what_is_not_finite_is_not_finite(some, dtype, bad, numel):
    grad = torch.ones(numel, dtype=dtype)
    grad[-1] = bad
    squares = zero()
    some.unscale_([grad], flag(1.0), flag(), squares)
    assert squares.isnan() if math.isnan(bad) else squares.item() == math.inf


@some
def test_many_small_tensors_are_summed_over_several_batches(some):
    grads = [torch.full((1000,), float(i)) for i in range(200)]
    squares = zero()
    some.unscale_(grads, flag(0.5), flag(), squares)
    assert squares.item() == pytest.approx(
        sum(1000 * (i / 2) ** 2 for i in range(200)), rel=SQUARES_RTOL
    )


class LargestAllocation(TorchDispatchMode):
    """Sees every operator; notes the largest tensor whose memory none of its inputs had."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tensors_in((args, kwargs))}
        for t in tensors_in(out):
            if t.untyped_storage().data_ptr() not in given:
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


def tensors_in(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@some
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["flat", "permuted", "rows with gaps", "many"])
def test_no_gradient_is_copied(some, dtype, layout):
    """A million elements or four, and no new tensor beyond one chunk in float64."""
    grads = {
        "flat": lambda: [torch.ones(2**22, dtype=dtype)],
        "permuted": lambda: [torch.ones(2**6, 2**7, 2**7, dtype=dtype).permute(2, 0, 1)],
        "rows with gaps": lambda: [torch.ones(2**8, 2**12 + 1, dtype=dtype)[:, 1:]],
        "many": lambda: [torch.ones(2**12, dtype=dtype) for _ in range(2**8)],
    }[layout]()
    with LargestAllocation() as seen:
        some.unscale_(grads, flag(0.5), flag(), squares := zero())
        some.check_(grads, flag(0.5), flag(), zero())
        some.scale_(grads, flag(0.5))
    assert squares.item() == pytest.approx(
        sum(g.numel() for g in grads) / 4, rel=SQUARES_RTOL, abs=0
    )
    assert 0 < seen.bytes <= foreach._CHUNK * 8


def test_the_measure_of_copies_sees_one():
    with LargestAllocation() as seen:
        torch.ones(1000).mul_(2).view(10, 100)
    assert seen.bytes == 4000
    with LargestAllocation() as seen:
        reference.check_([torch.ones(2**16)], flag(0.5), flag())
    assert seen.bytes >= 4 * 2**16


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0**-16, 1.7, 3.0, 3e38, 1e-40, 1 / 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_accelerators_fall_back_on_judges_and_multiplies_as_the_reference(dtype, factor):
    """The functions for dtypes that torch's operator does not know on a device, called here."""
    for name, view_name in CASES:
        planted, view = plants(dtype)[name], VIEWS[view_name]
        one, other = flat_values(dtype, planted), flat_values(dtype, planted)
        flags = [flag(), flag()]
        foreach._judge_largest([view(one)], flags[0], torch.tensor(factor))
        assert_same(one, flat_values(dtype, planted))
        foreach._multiply_([view(one)], torch.tensor(factor))
        reference.unscale_([view(other)], torch.tensor(factor), flags[1])
        assert_same(one, other)
        assert flags[0].item() == flags[1].item(), (name, view_name)


def test_the_fallback_leaves_a_set_flag_and_knows_empty_groups():
    found = flag(1.0)
    foreach._judge_largest([torch.ones(3)], found, flag(0.5))
    assert found.item() == 1.0
    found = flag()
    foreach._judge_largest([torch.empty(0), torch.empty(0, 4)], found, flag(0.5))
    assert found.item() == 0.0
    foreach._judge_largest([torch.ones(3), torch.empty(0), torch.tensor([math.nan])], found, flag())
    assert found.item() == 1.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_whole_path_of_accelerators_gives_the_same_bits(dtype, monkeypatch):
    """As on a device whose operator knows no dtype at all."""
    monkeypatch.setattr(foreach, "_amp_op_knows", lambda grad: False)
    like_the_reference = (
        test_unscale_gives_the_bits_and_the_flag_of_the_reference_and_touches_nothing_else
    )
    like_the_reference(foreach, dtype, 1.7)
    like_the_reference(foreach, dtype, 0.25)
    test_scale_gives_the_bits_of_the_reference(foreach, dtype, 0.25)


def test_one_times_anything_leaves_every_bit_on_that_path_too(monkeypatch):
    monkeypatch.setattr(foreach, "_amp_op_knows", lambda grad: False)
    for dtype in DTYPES:
        for planted in plants(dtype).values():
            grad = flat_values(dtype, planted)
            foreach.unscale_([grad], flag(1.0), flag())
            assert_same(grad, flat_values(dtype, planted))


@pytest.mark.parametrize("scale", [1.0, 65536.0, 2.0**-126, 3e38, 2.0**127, 1.1, 3.0, 1e-38])
def test_the_inverse_is_the_float64_reciprocal_rounded_once(scale):
    as_float32 = torch.tensor(scale)
    want = torch.tensor(1 / as_float32.item(), dtype=torch.float64).float()
    assert_same(inverse_scale(as_float32).view(1), want.view(1))
    assert inverse_scale(as_float32).isfinite()


def test_the_inverse_of_every_power_of_two_needs_no_float64():
    scales = 2.0 ** torch.arange(-126, 128, dtype=torch.float64)
    assert_same(inverse_scale(scales.float()), scales.float().reciprocal())


@pytest.mark.parametrize(
    "view",
    [
        lambda flat: flat[::2],
        lambda flat: flat[: 2**17].view(-1, 4)[:, :3],
        lambda flat: flat[: 2**17].view(2, -1)[:, ::2],
        lambda flat: flat[: 2**17].view(4, 2, -1, 2)[..., 0],
        lambda flat: flat[: 3 * 2**15].view(3, 2**15).t(),
    ],
    ids=["stride 2", "rows of 3", "two long rows", "nested", "transposed"],
)
def test_large_gradients_with_gaps_are_summed_by_blocks(view):
    """Not element by element: a block is at most 2^15 of them, and few are much smaller."""
    grad = view(torch.randn(2**18, generator=torch.Generator().manual_seed(0)))
    pieces = list(foreach._pieces(grad))
    assert max(piece.numel() for piece in pieces) <= 2**15
    assert len(pieces) <= 2 * grad.numel() // 2**15 + 8
    assert sum(piece.numel() for piece in pieces) == grad.numel()
    found = foreach._sum_squares_on_host([grad]).item()
    assert found == pytest.approx(grad.double().square().sum().item(), rel=1e-12)


@some
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_counts_tell_inf_from_nan_and_the_largest_magnitude(some, dtype):
    largest = torch.finfo(dtype).max
    grads = [
        torch.tensor([1.0, -3.0, 2.0]),
        torch.tensor([[math.inf, 1.0], [-math.inf, math.inf]]).t(),
        torch.tensor([math.nan, math.inf, -math.nan, 5.0]),
        torch.empty(0, 2),
        torch.tensor(-largest, dtype=dtype),
        torch.arange(-8.0, 8.0)[::3],
    ]
    grads = [g.to(dtype) for g in grads]
    counts = some.count(grads)
    reference_counts = reference.count(grads)
    want = [[0, 0, 3], [3, 0, math.inf], [1, 2, math.nan], [0, 0, 0], [0, 0, largest], [0, 0, 8]]
    for found in (counts, reference_counts):
        assert (found.dtype, found.device.type) == (torch.float64, "cpu")
        assert_same(found, torch.tensor(want, dtype=torch.float64))
    assert some.count([]).shape == (0, 3)
