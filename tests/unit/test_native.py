"""The kernels in C: torch's bits, one sum for all instruction sets and threads, or nothing done."""

from __future__ import annotations

import ctypes
import math
import mmap
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from shardscale.kernels import reference
from shardscale.kernels.native import _native as native
from shardscale.kernels.native import why_not
from tests.unit.native_oracle import (
    NUM_LANES,
    UNIT_BYTES,
    Guarded,
    any_two_overlap,
    product_of,
    random_bits,
    sum_of_squares,
    usual_values,
)
from tests.unit.test_kernels import (
    CASES,
    DTYPES,
    FACTORS,
    VIEWS,
    assert_same,
    flag,
    flat_values,
    plants,
    zero,
)

IS_BUILT = why_not() is None
pytestmark = pytest.mark.skipif(not IS_BUILT, reason="the extension in C was not built")
SETS = native.instruction_sets() if IS_BUILT else []

GAPS = {"gaps", "every third"}
DENSE = {name: view for name, view in VIEWS.items() if name not in GAPS}
# Around the widths of vectors and blocks; those around a unit depend on the dtype.
SIZES = [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 257]


def unit(dtype: torch.dtype) -> int:
    return UNIT_BYTES // dtype.itemsize


@pytest.fixture(params=SETS)
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.instruction_set()
    native.use_instruction_set(request.param)
    yield request.param
    native.use_instruction_set(before)


@pytest.fixture
def each_set() -> Iterator[Iterator[str]]:
    """To be looped over: each instruction set in turn is in use."""

    def turns() -> Iterator[str]:
        for name in SETS:
            native.use_instruction_set(name)
            yield name

    before = native.instruction_set()
    yield turns()
    native.use_instruction_set(before)


def by_reference(
    grads: list[Tensor], factor: float, writes: bool = True
) -> tuple[list[Tensor], float, float]:
    """The gradients, the flag and the sum that must come out."""
    after, found = [g.clone() for g in grads], flag()
    reference.unscale_(after, torch.tensor(factor), found)
    squared = after if writes else [product_of(g, torch.tensor(factor)) for g in grads]
    squares = sum_of_squares(squared, [g.itemsize for g in grads])
    return after if writes else grads, found.item(), squares


def same_number(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))


# --- one tensor ---------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unscale_gives_the_bits_of_the_reference_and_of_torch(dtype, factor, instructions):
    """Of every dense view; what lies beside it stays."""
    for name, view_name in CASES:
        if view_name in GAPS:
            continue
        planted, view = plants(dtype)[name], VIEWS[view_name]
        flats = [flat_values(dtype, planted) for _ in range(3)]
        flags = [flag(), flag(), flag()]
        inv_scale = torch.tensor(factor)
        assert native.unscale_([view(flats[0])], inv_scale, flags[0], None, 1)
        reference.unscale_([view(flats[1])], inv_scale, flags[1])
        torch._amp_foreach_non_finite_check_and_unscale_([view(flats[2])], flags[2], inv_scale)
        assert flags[0].item() == flags[1].item(), (name, view_name)
        assert_same(flats[0], flats[1])
        assert_same(flats[0], flats[2])


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_pattern_is_multiplied_as_torch_does(dtype, factor, instructions):
    """All there are of 16 bit, many of the others."""
    if dtype.itemsize == 2:
        values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    else:
        values = random_bits(dtype, 2**14)
    ours, theirs = values.clone(), values.clone()
    found = flag()
    assert native.unscale_([ours], torch.tensor(factor), found, None, 1)
    torch._amp_foreach_non_finite_check_and_unscale_([theirs], flag(), torch.tensor(factor))
    assert found.item() == 1.0
    assert_same(ours, theirs)
    if factor == 1:
        assert torch.equal(ours.view(torch.uint8), values.view(torch.uint8))


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.7, 1 / 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_size_and_alignment_gives_the_reference_and_the_sum(dtype, factor, instructions):
    """With sound values, and with a bad one at the very end; the guards on both sides stay."""
    borders = [unit(dtype) + more for more in (-1, 0, 1)] + [2 * unit(dtype) + 33]
    for numel in [*SIZES, *borders]:
        values = usual_values(dtype, numel, numel)
        spoiled = values.clone()
        spoiled[-1] = math.nan
        for offset in (0, 1, 3, 21) if numel < 1000 else (1,):
            for given_ in (values, spoiled):
                after, bad, squares = by_reference([given_], factor)
                grad, found, sums = Guarded(given_, offset), flag(), zero()
                assert native.unscale_([grad.inside], torch.tensor(factor), found, sums, 1)
                grad.assert_holds(after[0])
                assert found.item() == bad, (numel, offset)
                assert same_number(sums.item(), squares), (numel, offset)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_bad_element_is_found_wherever_it_is(dtype, instructions):
    """Alone, in every lane: as input and, where the factor exceeds 1, as product."""
    limits = torch.finfo(dtype)
    for place in range(2 * NUM_LANES + 7):
        for value, factor, bad in (
            (math.inf, 0.5, 1.0),
            (-math.inf, 1.0, 1.0),
            (math.nan, 0.5, 1.0),
            (limits.max, 0.5, 0.0),
            (-limits.max, 1.0, 0.0),
            (limits.max, 1.7, 1.0),
        ):
            grad = torch.ones(2 * NUM_LANES + 7, dtype=dtype)
            grad[place] = value
            found = [flag(), flag()]
            assert native.check_([grad], torch.tensor(factor), found[0], None, 1)
            assert native.unscale_([grad], torch.tensor(factor), found[1], None, 1)
            assert found[0].item() == found[1].item() == bad, (place, value, factor)


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_check_finds_what_unscale_finds_and_writes_nothing(dtype, factor, instructions):
    for name, planted in plants(dtype).items():
        for view_name, view in DENSE.items():
            flat = flat_values(dtype, planted)
            found, expected = flag(), flag()
            assert native.check_([view(flat)], torch.tensor(factor), found, None, 1)
            reference.check_([view(flat)], torch.tensor(factor), expected)
            assert found.item() == expected.item(), (name, view_name)
            assert_same(flat, flat_values(dtype, planted))


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.7, 1 / 3, 1e-30, 3e38])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_check_sums_the_squares_of_products_that_are_not_rounded(dtype, factor, instructions):
    for numel in (5, 32, 333, unit(dtype) + 40):
        grad = usual_values(dtype, numel, 3)
        sums = zero() + 2.0
        assert native.check_([grad], torch.tensor(factor), flag(), sums, 1)
        _, _, squares = by_reference([grad], factor, writes=False)
        assert same_number(sums.item(), squares + 2.0)
    # The same in another way: 1/3 in bfloat16 would be 0.333984375.
    if factor == 1 / 3 and dtype == torch.bfloat16:
        sums = zero()
        assert native.check_([torch.ones(3, dtype=dtype)], torch.tensor(factor), flag(), sums, 1)
        assert sums.item() == 3 * torch.tensor(1 / 3).double().item() ** 2


@pytest.mark.parametrize("factor", [1.0, 0.5, 0.0, math.inf, math.nan, 1e-40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_of_what_is_not_finite_are_those_of_the_formula(dtype, factor, instructions):
    for name, planted in plants(dtype).items():
        for numel in (7, 40, 101):
            grad = flat_values(dtype, planted)[4 : 4 + numel]
            for writes, call in ((True, native.unscale_), (False, native.check_)):
                sums, given_ = zero(), grad.clone()
                assert call([given_], torch.tensor(factor), flag(), sums, 1)
                _, _, squares = by_reference([grad], factor, writes)
                assert same_number(sums.item(), squares), (name, numel, writes)


def test_the_sum_holds_the_square_of_everything_float32_can_hold(instructions):
    """In float32 it would be Inf or 0."""
    for value in (3e38, 1e20, 1e-30, 1e-45):
        grad = torch.full((1000,), value)
        sums = zero()
        assert native.unscale_([grad], flag(1.0), flag(), sums, 1)
        want = math.fsum([grad[0].double().item() ** 2] * 1000)
        # A thousand additions in float64, each off by 1.1e-16 at most.
        assert sums.item() == pytest.approx(want, rel=1.2e-13)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1e-3, 0.0, 1.7, math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_gives_the_bits_of_the_reference(dtype, factor, instructions):
    for name, view_name in CASES:
        if view_name in GAPS:
            continue
        planted, view = plants(dtype)[name], VIEWS[view_name]
        one, other = flat_values(dtype, planted), flat_values(dtype, planted)
        assert native.scale_([view(one)], torch.tensor(factor), 1)
        reference.scale_([view(other)], torch.tensor(factor))
        assert_same(one, other)


# --- many tensors -------------------------------------------------------------------------------


def test_a_flag_that_is_set_stays_and_a_sum_is_added_to():
    for call in (native.unscale_, native.check_):
        found, sums = flag(5.0), zero() + 1.5
        assert call([torch.ones(3)], flag(0.5), found, sums, 1)
        assert found.item() == 5.0
        assert sums.item() == 1.5 + 0.75
        assert call([torch.tensor(math.inf)], flag(0.5), found, sums, 1)
        assert found.item() == 1.0


def test_no_gradient_at_all_is_good_unless_the_factor_is_useless():
    for call in (native.unscale_, native.check_):
        for factor in (0.5, 1e-40, 3e38, 0.0, -0.5, math.nan, math.inf, -math.inf):
            found, sums = flag(), zero() + 4.0
            assert call([], flag(factor), found, sums, 1)
            assert found.item() == float(not 0 < factor < math.inf)
            assert sums.item() == 4.0
    assert native.scale_([], flag(0.5), 1)


def mixture() -> list[Tensor]:
    """Large, small and empty ones of all dtypes, 9 MiB in all."""
    sizes = [2**18 + 5, 3, 0, 2**16, 40, 1, 2**19 + 77, 0, 999, 32]
    return [usual_values(DTYPES[i % 4], n, i) for i, n in enumerate(sizes * 2)]


@pytest.mark.parametrize("writes", [True, False])
def test_the_bits_are_the_same_for_any_number_of_threads_and_any_instruction_set(writes, each_set):
    call = native.unscale_ if writes else native.check_
    after, bad, squares = by_reference(mixture(), 1 / 3, writes)
    for name in each_set:
        for num_threads in (-1, 0, 1, 2, 3, 7, 2, 10**9):
            grads, found, sums = mixture(), flag(), zero()
            assert call(grads, flag(1 / 3), found, sums, num_threads)
            assert (found.item(), sums.item()) == (bad, squares), (name, num_threads)
            for grad, want in zip(grads, after, strict=True):
                assert_same(grad, want)


def test_what_is_bad_is_found_by_whichever_thread_meets_it():
    for bad in (0, 6, 16, 19):
        grads, found = mixture(), flag()
        grads[bad][-1] = math.nan
        assert native.unscale_(grads, flag(0.5), found, None, 3)
        assert found.item() == 1.0


PIECES = st.lists(
    st.tuples(st.sampled_from(DTYPES), st.integers(0, 200), st.integers(0, 40), st.booleans()),
    max_size=12,
)


@given(pieces=PIECES, factor=st.sampled_from(FACTORS), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_any_list_of_shards_comes_out_as_by_the_reference(pieces, factor, seed):
    """Of any bit pattern, or all finite; each between guards."""
    values = [
        (usual_values if is_usual else random_bits)(dtype, numel, seed)
        for dtype, numel, _, is_usual in pieces
    ]
    after, bad, squares = by_reference(values, factor)
    for name in SETS:
        native.use_instruction_set(name)
        grads = [Guarded(v, piece[2]) for v, piece in zip(values, pieces, strict=True)]
        found, sums = flag(), zero()
        inside = [g.inside for g in grads]
        assert native.unscale_(inside, torch.tensor(factor), found, sums, 2)
        assert found.item() == bad
        assert same_number(sums.item(), squares)
        for grad, want in zip(grads, after, strict=True):
            grad.assert_holds(want)
    native.use_instruction_set(SETS[0])


def test_a_tensor_may_have_more_elements_than_32_bits_can_count():
    """Memory that is only read costs none: all of it is one page of zeros, but for the ends."""
    numel = 2**31 + 77
    with mmap.mmap(-1, 2 * numel, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)  # ten times faster
        grad = torch.frombuffer(memory, dtype=torch.bfloat16)
        grad[0], grad[-40], grad[-1] = 3.0, 4.0, math.inf
        found, sums = flag(), zero()
        assert native.check_([grad[:-1]], flag(1.0), found, sums, 2)
        assert (found.item(), sums.item()) == (0.0, 25.0)
        assert native.count([grad], 2) == [(1, 0, math.inf)]
        assert native.survey([grad])[1] == struct.pack("q", numel)
        del grad


# --- counting -----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_count_tells_inf_from_nan_and_the_largest_magnitude(dtype, num_threads, instructions):
    limits = torch.finfo(dtype)
    usual = usual_values(dtype, 2 * unit(dtype) + 37)
    with_inf = usual.clone()
    with_inf[[0, 40, -1]] = -math.inf
    with_both = with_inf.clone()
    with_both[[5, 300, -2, -3]] = math.nan
    denormal = torch.full((70,), -limits.smallest_normal * limits.eps, dtype=dtype)
    grads = [usual, with_inf, with_both, denormal, torch.zeros(3, dtype=dtype), usual[:0]]
    grads += [usual[: 30 * 20].view(30, 20).t(), random_bits(dtype, 5000)]
    counted = native.count(grads, num_threads)
    assert counted is not None and len(counted) == len(grads)
    for grad, (num_inf, num_nan, amax) in zip(grads, counted, strict=True):
        assert num_inf == grad.isinf().sum().item()
        assert num_nan == grad.isnan().sum().item()
        want = grad.double().abs().max().item() if grad.numel() else 0.0
        assert same_number(amax, want)


# --- what is not ours ---------------------------------------------------------------------------


class Subclass(Tensor):
    pass


def without_memory() -> Tensor:
    grad = torch.ones(5)
    grad.untyped_storage().resize_(0)
    return grad


UNUSUAL = {
    "parameter": lambda: nn.Parameter(torch.ones(5)),
    "subclass": lambda: torch.ones(5).as_subclass(Subclass),
    "fake": lambda: FakeTensorMode().from_tensor(torch.ones(5)),
    "int": lambda: torch.ones(5, dtype=torch.int32),
    "bool": lambda: torch.ones(5, dtype=torch.bool),
    "complex": lambda: torch.ones(5, dtype=torch.complex64),
    "float8": lambda: torch.ones(5).to(torch.float8_e4m3fn),
    "meta": lambda: torch.ones(5, device="meta"),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "gaps": lambda: torch.ones(10)[::2],
    "rows with gaps": lambda: torch.ones(4, 6)[:, :5],
    "columns twice": lambda: torch.ones(4, 1).expand(4, 3),
    "diagonals": lambda: torch.ones(9).as_strided((3, 3), (1, 1)),
    "no memory": without_memory,
    "no tensor": lambda: 3.0,
    "None": lambda: None,
}


@pytest.mark.parametrize("make", UNUSUAL.values(), ids=UNUSUAL)
def test_what_is_not_ours_is_refused_and_nothing_is_touched(make):
    """Even the gradients before it; they would be multiplied twice by whoever does it instead."""
    for place in (0, 1, 2):
        grads = [torch.full((4,), math.inf), torch.full((4,), 2.0)]
        grads.insert(place, make())
        found, sums = flag(), zero()
        for call in (native.unscale_, native.check_):
            assert call(grads, flag(0.5), found, sums, 1) is False
        assert native.scale_(grads, flag(0.5), 1) is False
        assert native.count(grads, 1) is None
        assert (found.item(), sums.item()) == (0.0, 0.0)
        plain = grads[:place] + grads[place + 1 :]
        assert_same(torch.cat(plain), torch.tensor([math.inf] * 4 + [2.0] * 4))


def test_a_vector_inside_a_transform_is_refused():
    """Its type is torch.Tensor, but it stands for a whole batch."""
    answers = []

    def inside(x: Tensor) -> Tensor:
        answers.append(native.unscale_([x], flag(0.5), flag(), None, 1))
        return x * 2

    torch.vmap(inside)(torch.ones(3, 4))
    assert answers == [False]


def test_scalars_that_are_not_ours_are_refused():
    good = {"inv_scale": flag(0.5), "found_inf": flag(), "sum_squares": zero()}
    for name, bad in (
        ("inv_scale", torch.tensor([0.5, 0.5])),
        ("inv_scale", torch.empty(0)),
        ("inv_scale", torch.tensor(0.5, dtype=torch.float64)),
        ("inv_scale", torch.tensor(0.5, dtype=torch.float16)),
        ("inv_scale", 0.5),
        ("inv_scale", None),
        ("found_inf", torch.tensor(0.0, device="meta")),
        ("found_inf", torch.tensor(0, dtype=torch.int32)),
        ("found_inf", torch.zeros(2)),
        ("sum_squares", torch.tensor(0.0)),
        ("sum_squares", torch.zeros(2, dtype=torch.float64)),
    ):
        grad = torch.ones(3)
        assert native.unscale_([grad], *{**good, name: bad}.values(), 1) is False
        assert native.check_([grad], *{**good, name: bad}.values(), 1) is False
        if name == "inv_scale":
            assert native.scale_([grad], bad, 1) is False
        assert torch.equal(grad, torch.ones(3))


def test_a_function_is_asked_for_the_number_of_threads_where_there_is_enough_to_do():
    asked = []

    def num_threads() -> int:
        asked.append(True)
        return 2

    for numel, times in ((1000, 0), (2**18, 1)):
        grad = torch.full((numel,), 4.0)
        assert native.unscale_([grad], flag(0.5), flag(), None, num_threads)
        assert (grad == 2).all()
        assert len(asked) == times

    def breaks() -> int:
        raise LookupError("no number")

    with pytest.raises(LookupError, match="no number"):
        native.unscale_([torch.ones(2**18)], flag(0.5), flag(), None, breaks)


def test_wrong_calls_are_type_errors():
    for call in (
        lambda: native.unscale_([], flag(), flag()),
        lambda: native.unscale_(3, flag(), flag(), None, 1),
        lambda: native.unscale_([], flag(), flag(), None, "many"),
        lambda: native.scale_([]),
        lambda: native.count(None, 1),
        lambda: native.gather(),
        lambda: native.gather(3),
        lambda: native.survey(3),
    ):
        with pytest.raises(TypeError):
            call()


def test_an_instruction_set_that_is_not_there_is_named(each_set):
    assert SETS[-1] == "portable"
    assert [native.instruction_set() for _ in each_set] == SETS
    for name in ("mmx", 3):
        with pytest.raises(ValueError, match=f"is {name!r}, which this processor does not have"):
            native.use_instruction_set(name)


# --- threads and processes ----------------------------------------------------------------------


def test_several_threads_of_python_may_call_at_once():
    """One is served by the workers, the others work alone."""
    after, _, squares = by_reference(mixture(), 1 / 3)
    start, outcomes = threading.Barrier(4), []

    def call() -> None:
        for _ in range(3):
            grads, sums = mixture(), zero()
            start.wait(timeout=60)
            done = native.unscale_(grads, flag(1 / 3), flag(), sums, 3)
            same = all(map(torch.equal, grads, after))
            outcomes.append(done and same and sums.item() == squares)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert outcomes == [True] * 12


def run_program(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


FORK = """
import os, torch
from shardscale.kernels.native import _native as native, why_not

assert why_not() is None

def work():
    grads, sums = [torch.ones(2**20), torch.ones(2**20)], torch.zeros((), dtype=torch.float64)
    assert native.unscale_(grads, torch.tensor(0.5), torch.tensor(0.0), sums, 4)
    assert all((g == 0.5).all() for g in grads)
    return sums.item()

def num_threads():
    return len(os.listdir("/proc/self/task")) if os.path.exists("/proc/self/task") else None

torch.set_num_threads(1)
torch.ones(2)
before = num_threads()
assert work() == 2**19
if before is not None:
    assert num_threads() == before + 3, (before, num_threads())
for _ in range(3):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if before is not None:
                assert num_threads() == 1
            assert work() == work() == 2**19
            if before is not None:
                assert num_threads() == 4
            code = 0
        finally:
            os._exit(code)
    assert work() == 2**19
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print("done")
"""


def test_a_fork_starts_without_workers_and_gets_its_own():
    assert run_program(FORK) == "done\n"


@pytest.mark.parametrize("num_threads", [1, 3])
def test_denormals_are_flushed_if_and_only_if_the_caller_flushes_them(num_threads, instructions):
    """By the workers, too; many turns, so that they take part in some."""
    start = torch.full((2**20,), 1e-38)
    for flush in (True, False, True):
        if not torch.set_flush_denormal(flush):
            pytest.fail("this processor cannot flush denormals, so nothing is tested here")
        try:
            for dtype in (torch.float32, torch.bfloat16):
                ours, theirs = start.to(dtype, copy=True), start.to(dtype, copy=True)
                for _ in range(5):
                    assert native.unscale_([ours], flag(0.5), flag(), zero(), num_threads)
                    torch._amp_foreach_non_finite_check_and_unscale_([theirs], flag(), flag(0.5))
                    integers = [
                        t.view(torch.int16 if t.itemsize == 2 else torch.int32)
                        for t in (ours, theirs)
                    ]
                    assert torch.equal(*integers)
                    assert integers[0].any().item() != flush
        finally:
            torch.set_flush_denormal(False)


# --- gathering ----------------------------------------------------------------------------------


def param_with(grad: Tensor | None) -> nn.Parameter:
    shape, dtype = ((3,), torch.float32) if grad is None else (grad.shape, grad.dtype)
    param = nn.Parameter(torch.zeros(shape, dtype=dtype))
    param.grad = grad
    return param


def test_gather_leaves_out_parameters_without_a_gradient():
    grads = [torch.ones(3), None, torch.ones(2, 2, dtype=torch.bfloat16), torch.ones(0), None]
    params = [param_with(g) for g in grads]
    params.append(torch.zeros(2, requires_grad=True))
    params[-1].grad = torch.ones(2)
    for given_ in (params, tuple(params), iter(params)):
        gathered = native.gather(given_)
        assert gathered is not None
        taken, found, firsts = gathered
        assert firsts == []
        want = [p for p in params if p.grad is not None]
        assert len(taken) == len(found) == 4
        assert all(a is b for a, b in zip(taken, want, strict=True))
        assert all(a is b.grad for a, b in zip(found, want, strict=True))
    assert native.gather([]) == native.gather([param_with(None)]) == ([], [], [])


# What cannot be the gradient of a parameter, or has a parameter of its own in the next test.
NO_GRADIENTS = {"no tensor", "None", "parameter", "subclass", "fake"}


@pytest.mark.parametrize("name", [name for name in UNUSUAL if name not in NO_GRADIENTS])
def test_gather_takes_nothing_if_a_gradient_is_unusual(name):
    grad = UNUSUAL[name]()
    param = torch.zeros_like(grad) if grad.is_sparse else torch.zeros_like(grad).contiguous()
    if grad.is_floating_point() or grad.is_complex():
        param.requires_grad_()
    param.grad = grad
    assert native.gather([param_with(torch.ones(2)), param]) is None


def test_gather_takes_nothing_if_a_type_is_not_known():
    good = param_with(torch.ones(2))
    assert native.gather([good]) is not None
    odd = param_with(torch.ones(2))
    odd.grad = torch.ones(2).as_subclass(Subclass)
    assert native.gather([good, odd]) is None
    assert native.gather([good, nn.parameter.UninitializedParameter()]) is None
    assert native.gather([good, 3]) is None
    # Not contiguous: what is dense may be, but who gathers wants to look at it.
    turned = param_with(torch.ones(2, 3).t())
    assert native.gather([turned]) is None


@pytest.fixture
def mesh() -> Iterator[dist.device_mesh.DeviceMesh]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def test_gather_reads_the_local_part_of_a_distributed_gradient(mesh):
    def distributed(placement: Replicate | Shard) -> DTensor:
        return DTensor.from_local(torch.ones(4), mesh, [placement], run_check=False)

    param = nn.Parameter(distributed(Shard(0)))
    assert type(param) is DTensor
    local = torch.ones(4)
    param.grad = DTensor(local, param._spec, requires_grad=False)
    gathered = native.gather([param, param_with(torch.ones(2))])
    assert gathered is not None
    assert gathered[0][0] is param and gathered[1][0] is param.grad._local_tensor
    assert [p is param for p in gathered[2]] == [True]
    # Of another layout, or of an equal one that is another object: somebody has to look.
    for placement in (Shard(0), Replicate()):
        other = nn.Parameter(distributed(placement))
        other.grad = distributed(placement)
        assert other.grad._spec is not other._spec
        assert native.gather([other]) is None
    assert native.unscale_([param.grad], flag(0.5), flag(), None, 1) is False
    assert native.survey([param.grad]) is None


def test_gather_names_the_first_parameter_of_each_mesh(mesh):
    """Of those that are trained, whether they have a gradient or not; meshes by identity."""
    other = init_device_mesh("cpu", (2, 1))
    where = [mesh, other, mesh, other, mesh]
    params = [
        nn.Parameter(DTensor.from_local(torch.ones(4), m, [Shard(0)] * m.ndim, run_check=False))
        for m in where
    ]
    params[0].requires_grad_(False)
    params[3].grad = DTensor(torch.ones(4), params[3]._spec, requires_grad=False)
    gathered = native.gather([param_with(torch.ones(2)), *params])
    assert gathered is not None
    assert [[p is q for q in params].index(True) for p in gathered[2]] == [1, 2]


@given(
    pieces=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 12)), max_size=40),
    spread=st.sampled_from([1, 7, 1000]),
)
@settings(max_examples=150, deadline=None)
def test_gather_sees_gradients_that_overlap(pieces, spread):
    """Compared with a look at each pair; `spread` moves them apart, so that most do not."""
    memory = torch.empty(420 * spread)
    pieces = [(start * spread, numel) for start, numel in pieces]
    params = [param_with(memory[start : start + numel]) for start, numel in pieces]
    assert (native.gather(params) is None) == any_two_overlap(pieces)


@pytest.mark.parametrize("order", ["rising", "falling", "shuffled"])
def test_gather_sees_one_overlap_among_thousands(order):
    """Addresses that differ in many digits; the overlap is a single element."""
    memory = torch.empty(2**22, dtype=torch.float16)
    starts = [i * 1397 for i in range(3000)]
    if order == "falling":
        starts.reverse()
    elif order == "shuffled":
        starts = [starts[i] for i in torch.randperm(3000, generator=torch.Generator()).tolist()]
    params = [param_with(memory[s : s + 1397]) for s in starts]
    assert native.gather(params) is not None
    place = starts.index(1397 * 1500)
    params[place] = param_with(memory[1397 * 1500 - 1 : 1397 * 1501 - 1])
    assert native.gather(params) is None


def test_gather_keeps_nothing_alive():
    grad = torch.ones(3)
    param = param_with(grad)
    counts = [sys.getrefcount(x) for x in (grad, param)]
    for _ in range(5):
        native.gather([param])
        native.gather([param, param])
        native.unscale_([grad], flag(0.5), flag(), None, 1)
        native.unscale_([grad, 3], flag(0.5), flag(), None, 1)
        native.count([grad], 1)
        native.survey([grad])
        native.survey([grad, 3])
    assert [sys.getrefcount(x) for x in (grad, param)] == counts


def test_a_survey_tells_address_number_of_elements_and_dtype():
    dense = [torch.ones(5), torch.ones(10)[3:], torch.ones(2, 3).t(), torch.ones(0), flag()]
    grads = [g.to(dtype) for g, dtype in zip(dense, [*DTYPES, torch.float32], strict=True)]
    addresses, numels, dtypes = native.survey(grads)
    assert addresses == struct.pack("5q", *(g.data_ptr() for g in grads))
    assert numels == struct.pack("5q", 5, 7, 6, 0, 1)
    assert list(dtypes) == [0, 1, 2, 3, 2]
    assert native.survey([]) == (b"", b"", b"")


@pytest.mark.parametrize("name", UNUSUAL)
def test_a_survey_of_anything_unusual_tells_nothing(name):
    for grads in ([UNUSUAL[name]()], [torch.ones(2), UNUSUAL[name](), torch.ones(3)]):
        assert native.survey(grads) is None


# --- where it is missing ------------------------------------------------------------------------

MISSING = """
import sys
import torch
sys.modules["shardscale.kernels.native._native"] = None  # as if it had not been built
from shardscale.kernels import native
print(native.unscale_([], torch.tensor(0.5), torch.tensor(0.0)), native.gather([]))
print(native.why_not())
"""

NO_CAPSULE = """
import torch
del torch.Tensor.__dlpack_c_exchange_api__
from shardscale.kernels import native
assert not hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
print(native.unscale_([], torch.tensor(0.5), torch.tensor(0.0)), native.gather([]))
print(native.why_not())
"""


def test_a_missing_extension_is_not_an_error():
    assert run_program(MISSING).startswith("False None\nthe C extension is not there")


def test_a_torch_without_the_capsule_is_not_an_error():
    assert run_program(NO_CAPSULE).startswith("False None\nthe C extension cannot read")


def test_the_table_of_another_major_version_is_not_used_but_its_older_one_is():
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = (
        ctypes.py_object,
        [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p],
    )
    read = ctypes.pythonapi.PyCapsule_GetPointer
    read.restype, read.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    name = b"dlpack_exchange_api"
    real = torch.Tensor.__dlpack_c_exchange_api__
    types = (torch.Tensor, nn.Parameter, DTensor)
    for previous, is_good in ((None, False), (read(real, name), True)):
        table = ctypes.create_string_buffer(struct.pack("IIP5P", 2, 0, previous or 0, *[0] * 5))
        capsule = new(ctypes.addressof(table), name, None)
        if is_good:
            native.init(*types, capsule)
        else:
            with pytest.raises(ValueError, match="has no DLPack 1"):
                native.init(*types, capsule)
        assert native.unscale_([torch.ones(3)], flag(0.5), flag(), None, 1)
    with pytest.raises(ValueError, match="PyCapsule_GetPointer called with incorrect name"):
        native.init(*types, new(ctypes.addressof(table), b"another", None))
