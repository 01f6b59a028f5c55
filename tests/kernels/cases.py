"""What the Triton kernels promise, on the device of the fixture ``device``.

``grid.py`` runs these on the host, in Triton's interpreter; ``tests/gpu/test_triton.py`` compiles
them and runs them on a GPU. What is expected is worked out on the host in both.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from shardscale.errors import ConfigError, LayoutError
from shardscale.kernels import reference
from shardscale.kernels import triton as kernels
from shardscale.kernels.triton.table import BLOCKS

DTYPES = list(BLOCKS)
FULL = os.environ.get("KERNELS_FULL") == "1"
FACTORS = [0.5, 1.0, 2.0**-16, 1.7, 1 / 3, 0.0, 3e38, 1e-40, math.inf, math.nan]
INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}
BAD = [math.inf, -math.inf, math.nan]

# In float32 a square passes one rounding and at most eight additions, and a product that is not
# stored one rounding more, which its square has twice: 11 × 2^-24. All else is float64.
SQUARES_RTOL = 6.6e-7

num_checks = 0


class Place(NamedTuple):
    """Where a gradient lies in the arena, and how it is seen there."""

    start: int
    numel: int
    see: Callable[[Tensor], Tensor]

    def of(self, arena: Tensor) -> Tensor:
        return self.see(arena[self.start : self.start + self.numel])


class Arena(NamedTuple):
    """Memory with gradients at known places and elements between them that nobody may touch."""

    memory: Tensor
    places: list[Place]

    def grads(self) -> list[Tensor]:
        return [place.of(self.memory) for place in self.places]

    def copy(self, device="cpu") -> Arena:
        # A clone begins on a border of memory, as the arena itself does.
        return Arena(self.memory.to(device, copy=True), self.places)


def places(dtype: torch.dtype) -> tuple[list[Place], int]:
    """Sizes around all borders, from every phase of a vector, in several layouts; and the end."""
    vector, block = 16 // dtype.itemsize, BLOCKS[dtype]
    sizes = [0, 1, vector - 1, vector, vector + 1, 37, block, block + vector + 1]
    phases = [0, 1, vector - 1]
    if FULL:
        sizes += [2, 3 * vector, block - 1, block + 1, 2 * block + 1, 3 * block - vector]
        phases = list(range(vector))
    shapes: list[tuple[int, int, Callable[[Tensor], Tensor]]] = [
        (phase, size, lambda flat: flat)
        for phase in sorted(set(phases))
        for size in sorted(set(sizes))
    ]
    shapes += [
        (1, 1, lambda flat: flat.view(())),
        (0, 0, lambda flat: flat.view(0, 3)),
        (1, 30, lambda flat: flat.view(5, 6).t()),
        (vector - 1, 120, lambda flat: flat.view(4, 5, 6).permute(2, 0, 1)),
        (0, 120, lambda flat: flat.view(2, 5, 4, 3).permute(0, 3, 1, 2)),
    ]
    found, start = [], 0
    for phase, size, see in shapes:
        start = -(-(start + 3) // vector) * vector + phase
        found.append(Place(start, size, see))
        start += size
    return found, start + 3


def make_arena(dtype: torch.dtype, planted: Sequence[float] = (1.0,)) -> Arena:
    """Several magnitudes, and planted values at the beginning, the middle and the end of each."""
    found, numel = places(dtype)
    generator = torch.Generator().manual_seed(0)
    memory = (torch.randn(numel, generator=generator, dtype=torch.float64) * 4).to(dtype)
    turn = 0
    for place in found:
        for i in sorted({0, place.numel // 2, place.numel - 1} & set(range(place.numel))):
            memory[place.start + i] = planted[turn % len(planted)]
            turn += 1
    return Arena(memory, found)


def finite_values(dtype: torch.dtype) -> list[float]:
    limits = torch.finfo(dtype)
    tiny = limits.smallest_normal
    return [1.0, -0.0, tiny / 4, -tiny * limits.eps, tiny, limits.max, -limits.max, 0.0]


def bits(tensor: Tensor) -> Tensor:
    return tensor.cpu().view(INTEGER[tensor.dtype.itemsize])


def assert_same(one: Tensor, other: Tensor, nan_payloads: bool = False) -> None:
    """Bit for bit; unless asked for, which NaN an operation gives is not looked at."""
    same = bits(one) == bits(other)
    if not nan_payloads:
        same |= one.cpu().isnan() & other.cpu().isnan()
    assert same.all(), f"{one.cpu()[~same]} differs from {other.cpu()[~same]}"


def nearly(value: float):
    return pytest.approx(value, rel=SQUARES_RTOL, abs=0)  # abs is 1e-12 unless told


def checked(num: int) -> None:
    global num_checks  # how much a run has looked at; pytest counts functions only
    num_checks += num


def flag(device, value: float = 0.0) -> Tensor:
    return torch.full((), value, dtype=torch.float32, device=device)


def zero(device) -> Tensor:
    return torch.zeros((), dtype=torch.float64, device=device)


def poisoned(dtype: torch.dtype) -> Tensor:
    """A NaN that no operation makes: its payload is 1, and its sign is set."""
    inf = torch.tensor(math.inf, dtype=dtype).view(INTEGER[dtype.itemsize])
    return (-torch.tensor(math.inf, dtype=dtype)).view(inf.dtype).add(1).view(dtype)


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unscale_gives_torchs_bits_and_the_references_flag(device, dtype, factor):
    """In place, and not one element beside the gradients is touched."""
    rounded = torch.tensor(factor)
    values = finite_values(dtype)
    sets = [[value] for value in values + BAD] if FULL else []
    for planted in [*sets, values, [*values, *BAD]]:
        arena = make_arena(dtype, planted)
        ours, theirs, plain = arena.copy(device), arena.copy(), arena.copy()
        found, their_found, plain_found = flag(device), flag("cpu"), flag("cpu")
        kernels.unscale_(ours.grads(), rounded.to(device), found)
        torch._amp_foreach_non_finite_check_and_unscale_(theirs.grads(), their_found, rounded)
        reference.unscale_(plain.grads(), rounded, plain_found)

        assert_same(ours.memory, theirs.memory)
        assert_same(ours.memory, plain.memory)
        assert found.item() == plain_found.item()
        checked(3 * len(arena.places) + 1)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1e-3, 0.0, 1.7, 3e38])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_gives_the_references_bits(device, dtype, factor):
    arena = make_arena(dtype, [*finite_values(dtype), *BAD])
    ours, theirs = arena.copy(device), arena.copy()
    kernels.scale_(ours.grads(), flag(device, factor))
    reference.scale_(theirs.grads(), flag("cpu", factor))

    assert_same(ours.memory, theirs.memory)
    checked(len(arena.places))


@pytest.mark.parametrize("factor", FACTORS if FULL else [0.5, 1.0, 1.7, 0.0, math.nan])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_check_finds_what_the_reference_finds_and_leaves_every_bit(device, dtype, factor):
    values = finite_values(dtype)
    for planted in (values, [*values, *BAD]):
        arena = make_arena(dtype, planted)
        ours = arena.copy(device)
        found, expected = flag(device), flag("cpu")
        kernels.check_(ours.grads(), flag(device, factor), found)
        reference.check_(arena.grads(), flag("cpu", factor), expected)

        assert_same(ours.memory, arena.memory, nan_payloads=True)
        assert found.item() == expected.item()
        checked(len(arena.places) + 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_times_anything_leaves_every_bit_of_a_nan(device, dtype):
    arena = make_arena(dtype)
    for place in arena.places:
        arena.memory[place.start : place.start + place.numel][::5] = poisoned(dtype)
    ours = arena.copy(device)
    found = flag(device)
    kernels.unscale_(ours.grads(), flag(device, 1.0), found, zero(device))
    kernels.scale_(ours.grads(), flag(device, 1.0))

    assert_same(ours.memory, arena.memory, nan_payloads=True)
    assert found.item() == 1.0
    checked(2 * len(arena.places))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_bad_element_is_found_wherever_it_is(device, dtype):
    """In head, body and rest of a gradient, at each border between them; and nothing is not."""
    vector, block = 16 // dtype.itemsize, BLOCKS[dtype]
    numel = block + 2 * vector
    spots = {0, 1, vector - 1, vector, block // 2, block, block + 1, numel - vector, numel - 1}
    memory = torch.ones(numel + vector, dtype=dtype, device=device)
    for phase in (0, 1, vector - 1):
        grad = memory[phase : phase + numel]
        for i, spot in enumerate(sorted(spots)):
            for bad in BAD if FULL else [BAD[i % 3]]:
                grad[spot] = bad
                calls = (kernels.unscale_, kernels.check_)
                for call in calls if FULL else [calls[i % 2]]:
                    found = flag(device)
                    call([grad], flag(device, 1.0), found)
                    assert found.item() == 1.0, (phase, spot, bad)
                grad[spot] = 1.0
                checked(2)
        found = flag(device)
        memory[:phase] = memory[phase + numel :] = math.nan  # of others
        kernels.unscale_([grad], flag(device, 1.0), found)
        assert found.item() == 0.0
        memory.fill_(1.0)
        checked(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_product_is_judged_as_it_is_stored(device, dtype):
    """The last value whose product is finite, and the next one."""
    factor = torch.tensor(1.7)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    integer = INTEGER[dtype.itemsize]
    value = torch.tensor([torch.finfo(dtype).max / factor.item()], dtype=torch.float64).to(dtype)
    near = (value.view(integer) + torch.arange(-3, 4, dtype=integer)).view(dtype)
    products = (near.to(wide) * factor).to(dtype)
    assert products.isfinite().any() and not products.isfinite().all()
    for x, product in zip(near, products, strict=True):
        for call in (kernels.unscale_, kernels.check_):
            for sign in (1, -1):
                found = flag(device)
                call([(sign * x).view(1).to(device)], factor.to(device), found)
                assert found.item() == float(not product.isfinite())
                checked(1)


def test_a_flag_is_stored_only_as_one(device):
    for call in (kernels.unscale_, kernels.check_):
        for grads in ([], [torch.empty(0, device=device)], [torch.ones(3, device=device)]):
            found = flag(device, 0.25)
            call(grads, flag(device, 0.5), found)
            assert found.item() == 0.25
            call([torch.tensor([math.inf], device=device)], flag(device, 0.5), found)
            assert found.item() == 1.0
            call(grads, flag(device, 0.5), found)
            assert found.item() == 1.0
            checked(3)


@pytest.mark.parametrize("factor", [0.0, -1.0, math.inf, -math.inf, math.nan])
def test_a_useless_factor_is_found_with_no_gradient_too(device, factor):
    for call in (kernels.unscale_, kernels.check_):
        for grads in ([], [torch.empty(0, device=device)], [torch.ones(3, device=device)]):
            found = flag(device)
            call(grads, flag(device, factor), found, zero(device))
            assert found.item() == 1.0
            checked(1)


MAGNITUDES = {
    torch.float32: [1.0, 1e-45, 1e-38, 1e-30, 1e-20, 3e-15, 4e-15, 1e-10, 1e10, 1e18, 2e18, 3e38],
    torch.bfloat16: [1.0, 1e-40, 1e-30, 1e-14, 1e18, 1e30, 3e38],
    torch.float16: [1.0, 6e-8, 1e-4, 60000.0],
    torch.float64: [1.0, 1e-150, 1e150],
}
NORM_CASES = [(dtype, magnitude) for dtype in DTYPES for magnitude in MAGNITUDES[dtype]]


def formula(grads: Sequence[Tensor], factor: float = 1.0) -> float:
    return sum((g.cpu().double() * factor).square().sum().item() for g in grads)


@pytest.mark.parametrize(("dtype", "magnitude"), NORM_CASES, ids=str)
def test_the_sum_of_squares_is_the_float64_formulas(device, dtype, magnitude):
    """Finite for everything float32 can hold. Tolerance: see SQUARES_RTOL."""
    block = BLOCKS[dtype]
    generator = torch.Generator().manual_seed(1)
    for numel in (1, block + 5, *([3, 9 * block + 3] if FULL else [])):
        rand = torch.rand(numel + 1, generator=generator, dtype=torch.float64)
        memory = ((rand * 0.5 + 0.5) * magnitude).to(dtype).to(device)
        for grad in (memory[:-1], memory[1:]):
            before, squares, found = grad.clone(), zero(device), flag(device)
            kernels.unscale_([grad], flag(device, 1.0), found, squares)
            assert squares.item() == nearly(formula([before]))

            kernels.unscale_([grad], flag(device, 0.37), found, squares.zero_())
            assert squares.item() == nearly(formula([grad]))

            factor = torch.tensor(0.37).item()
            kernels.check_([before], flag(device, factor), found, squares.zero_())
            assert squares.item() == nearly(formula([before], factor))
            assert found.item() == 0.0
            checked(3)


def test_equal_values_are_summed_as_well_as_random_ones(device):
    """Roundings of equal sums all go one way; a long float32 sum of 1/3s would be off by 1e-5."""
    for dtype in DTYPES:
        grad = torch.full((2**16 + 5,), 1 / 3, dtype=dtype, device=device)
        squares = zero(device)
        kernels.unscale_([grad], flag(device, 1.0), flag(device), squares)
        assert squares.item() == nearly(formula([grad]))
        checked(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_and_tiny_values_together(device, dtype):
    """In one vector, in one block, in one program and in several."""
    block = BLOCKS[dtype]
    mixed = torch.tensor(
        [1e30, 1e-30, 3.0, torch.finfo(dtype).smallest_normal / 8, 3e38], dtype=dtype
    )
    for grads in (
        [mixed],
        [mixed[:4], mixed[4:]],
        [mixed[3:4], mixed[1:3], torch.full((block,), 1e-30, dtype=dtype)],
        [torch.full((10 * block,), 1e-30, dtype=dtype), mixed[:1], mixed[4:]],
        [torch.full((2 * block,), 1e-25, dtype=dtype)],
        [torch.zeros(block, dtype=dtype), mixed[3:4]],
    ):
        for call in (kernels.unscale_, kernels.check_):
            squares = zero(device)
            mine = [g.to(device, copy=True) for g in grads]
            call(mine, flag(device, 1.0), flag(device), squares)
            want = formula(grads)
            assert 0 < want < math.inf
            assert squares.item() == nearly(want)
            checked(1)


def test_a_check_squares_products_that_the_gradients_dtype_could_not_hold(device):
    """Unrounded: 3 × 1e-40 × 1e-5 in bfloat16 would be zero."""
    for dtype, value, factor in (
        (torch.float16, 1e-4, 2.0**-16),
        (torch.bfloat16, 1e-38, 1e-5),
        (torch.float32, 1e-40, 1e-10),
        (torch.bfloat16, 1 / 3, 1 / 3),
    ):
        grad = torch.full((77,), value, dtype=dtype, device=device)
        squares = zero(device)
        kernels.check_([grad], flag(device, factor), flag(device), squares)
        want = formula([grad], torch.tensor(factor).item())
        assert squares.item() == nearly(want)
        checked(1)


def test_sums_are_added_over_all_dtypes(device):
    grads = [make_arena(dtype).copy(device).grads() for dtype in DTYPES]
    every = [g for group in zip(*grads, strict=False) for g in group]
    squares = zero(device) + 1000.0
    kernels.unscale_(every, flag(device, 0.5), flag(device), squares)
    # Also of the float16 values that are rounded: the formula's are those as stored.
    assert squares.item() == nearly(1000.0 + formula(every))
    checked(1)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sum_of_squares_of_what_is_not_finite_is_not_finite(device, dtype, bad):
    for numel in (1, 100, 5000):
        grad = torch.ones(numel, dtype=dtype, device=device)
        grad[-1] = bad
        squares = zero(device)
        kernels.unscale_([grad], flag(device, 1.0), flag(device), squares)
        assert squares.isnan() if math.isnan(bad) else squares.item() == math.inf
        checked(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_the_same_bits_each_time(device, dtype):
    """At other addresses too, if they lie alike within 16 bytes."""
    arena = make_arena(dtype, [1e-3, 7.0])
    sums = set()
    for _ in range(3):
        squares = zero(device)
        copy = arena.copy(device)
        kernels.unscale_(copy.grads(), flag(device, 0.3), flag(device), squares)
        sums.add(squares.item())
    assert len(sums) == 1
    checked(3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_count_counts_what_torch_counts(device, dtype):
    arena = make_arena(dtype, [*finite_values(dtype), *BAD, 1.0])
    grads = arena.copy(device).grads()
    counted = kernels.count(grads)
    assert counted.dtype == torch.float64 and counted.shape == (len(grads), 3)
    for grad, row in zip(arena.grads(), counted.cpu(), strict=True):
        amax = grad.double().abs().amax() if grad.numel() else zero("cpu")
        assert row[0] == grad.isinf().sum() and row[1] == grad.isnan().sum()
        assert row[2] == amax or (row[2].isnan() and amax.isnan())
        checked(3)


def test_count_tells_gradients_of_several_dtypes_apart(device):
    grads = [torch.full((5000,), i + 1.0, dtype=d, device=device) for i, d in enumerate(DTYPES)]
    grads.insert(2, torch.empty(0, device=device))
    grads[0][4999] = math.nan
    grads[4][:3] = -math.inf
    want = [[0, 1, math.nan], [0, 0, 2], [0, 0, 0], [0, 0, 3], [3, 0, math.inf]]
    torch.testing.assert_close(
        kernels.count(grads).cpu(), torch.tensor(want).double(), rtol=0, atol=0, equal_nan=True
    )
    assert kernels.count([]).shape == (0, 3)
    checked(6)


@pytest.mark.parametrize("factor", [0.5, 1 / 3, 1.7, 2.0**-16, 1e-40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_value_is_rounded_to_nearest_even(device, dtype, factor):
    """Triton's interpreter truncates to bfloat16; there the kernels round by hand."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    ours, factor = every.to(device, copy=True), torch.tensor(factor)
    kernels.unscale_([ours], factor.to(device), flag(device))
    assert_same(ours, (every.float() * factor).to(dtype))
    checked(1)


@pytest.mark.parametrize("num", [1, 9, 100])
def test_many_small_gradients(device, num):
    """More than there are programs, and fewer; each is multiplied once."""
    grads = [torch.full((1 + i % 5,), float(i), device=device) for i in range(num)]
    squares = zero(device)
    kernels.unscale_(grads, flag(device, 0.5), flag(device), squares)
    for i, grad in enumerate(grads):
        assert (grad == i / 2).all()
    assert squares.item() == sum((1 + i % 5) * (i / 2) ** 2 for i in range(num))
    checked(num + 1)


SHARDS = st.lists(
    st.tuples(st.sampled_from(DTYPES), st.integers(0, 6000), st.integers(0, 8)), max_size=6
)


@settings(
    max_examples=150 if FULL else 30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(shards=SHARDS, factor=st.sampled_from(FACTORS), bad=st.sampled_from([1.0, *BAD]))
def test_any_list_of_shards(device, shards, factor, bad):
    memory = [torch.linspace(-3, 5, numel + 8, dtype=d) for d, numel, _ in shards]
    if memory:
        memory[-1][-1] = bad  # within a gradient only if it begins late
    results = []
    for kernel, where in ((kernels, device), (reference, "cpu")):
        mine = [m.to(where, copy=True) for m in memory]
        grads = [m[s : s + n] for m, (_, n, s) in zip(mine, shards, strict=True)]
        found, squares = flag(where), zero(where)
        kernel.unscale_(grads, flag(where, factor), found, squares)
        results.append((mine, found.item(), squares.item()))
    (ours, found, squares), (theirs, their_found, their_squares) = results
    for one, other in zip(ours, theirs, strict=True):
        assert_same(one, other)
    assert found == their_found
    if found == 0:
        assert squares == nearly(their_squares)
    checked(len(shards) + 2)


def test_moved_gradients_are_found_again(device):
    """Addresses are compared at every call, also where sizes and dtypes are the same."""
    first, second = (torch.full((5000,), 8.0, device=device) for _ in range(2))
    for grad in (first, second, first, second[:], first):
        kernels.unscale_([grad], flag(device, 0.5), flag(device))
    assert (first == 1.0).all() and (second == 2.0).all()
    parameter = torch.nn.Parameter(torch.ones(5, device=device))
    for value in (2.0, 4.0):
        parameter.grad = torch.full((5,), value, device=device)
        kernels.scale_([parameter.grad], flag(device, 0.5))
        assert (parameter.grad == value / 2).all()
    checked(4)


def test_gradients_elsewhere_are_refused(device):
    here, elsewhere = torch.ones(3, device=device), torch.ones(3, device="meta")
    with pytest.raises(ConfigError, match="Gradient 1 is on meta, but found_inf on"):
        kernels.unscale_([here, elsewhere], flag(device, 0.5), flag(device))
    with pytest.raises(ConfigError, match="inv_scale is on meta, but found_inf on"):
        kernels.check_([here], flag("meta"), flag(device))
    with pytest.raises(ConfigError, match="sum_squares is on meta, but found_inf on"):
        kernels.unscale_([here], flag(device), flag(device), zero("meta"))
    assert (here == 1).all()
    checked(3)


def test_memory_shared_by_two_gradients_is_refused(device):
    memory = torch.ones(100, device=device)
    for grads, who in (
        ([memory, memory[99:]], "0 and 1"),
        ([memory[50:], torch.ones(3, device=device), memory[:51]], "0 and 2"),
        ([memory[:10], memory[10:], memory[:10]], "0 and 2"),
        ([memory, memory.view(torch.int32).view(torch.bfloat16)[5:7]], "0 and 1"),
    ):
        for call in (kernels.unscale_, kernels.check_):
            with pytest.raises(LayoutError, match=f"Gradients {who} share memory"):
                call(grads, flag(device, 0.5), flag(device))
            checked(1)
    assert (memory == 1).all()
    kernels.unscale_([memory[:50], memory[50:], memory[3:3]], flag(device, 0.5), flag(device))
    assert (memory == 0.5).all()


def test_the_kernels_say_that_they_work_here(device):
    assert kernels.why_not(torch.device(device)) is None
    checked(1)
