"""Gradients reach the kernels of their device, and torch's operators where there are none."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from shardscale import LayoutError, kernels
from shardscale.kernels import dispatch, foreach, native, reference, triton

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def forgotten():
    """What was chosen for a device is chosen once."""
    dispatch._backend_of.cache_clear()
    yield
    dispatch._backend_of.cache_clear()


@pytest.fixture
def without_c(monkeypatch):
    """As installed where there was no compiler."""
    monkeypatch.setattr(native, "why_not", lambda: "the extension was not built.")
    for name in ("unscale_", "check_", "scale_"):
        monkeypatch.setattr(native, name, lambda *_: False)


def make_grads(bad=1.0):
    """Four dtypes, an empty one, a permuted one, two with gaps; the last one may be bad."""
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    dense = [torch.arange(1.0, 12).to(dtype) for dtype in dtypes]
    wide = torch.arange(24.0).view(4, 6)
    wide[2, 4] = bad
    return [*dense, torch.empty(0), torch.ones(3, 4, 2).permute(2, 0, 1), wide[:, :3], wide[1:, 4:]]


def run(some, grads, factor=0.25):
    found, squares, checked = (torch.zeros((), dtype=d) for d in (None, torch.float64, None))
    some.check_(grads, torch.tensor(factor), checked, squares)
    some.unscale_(grads, torch.tensor(factor), found, squares)
    some.scale_(grads, torch.tensor(3.0))
    return found.item(), checked.item(), squares.item()


@pytest.mark.parametrize("bad", [1.0, math.inf, math.nan])
def test_dense_and_other_gradients_in_one_call(bad):
    mine, theirs = make_grads(bad), make_grads(bad)
    found, checked, squares = run(kernels, mine)
    assert (found, checked) == run(reference, theirs)[:2] == (float(bad != 1),) * 2
    for one, other in zip(mine, theirs, strict=True):
        assert torch.equal(one.nan_to_num(nan=-7.0), other.nan_to_num(nan=-7.0))
    if bad == 1:
        assert squares == pytest.approx(run(reference, make_grads())[2], rel=1e-12)


@pytest.mark.filterwarnings("ignore:Gradients on cpu")
def test_without_the_extension_the_bits_are_the_same(without_c):
    mine, theirs = make_grads(), make_grads()
    found = run(kernels, mine)
    assert found == pytest.approx(run(reference, theirs), rel=1e-6)  # torch may square in float32
    assert all(map(torch.equal, mine, theirs))
    assert kernels.backend_name(torch.device("cpu")) == "foreach"
    assert torch.equal(kernels.count(mine), reference.count(mine))


def test_that_there_is_no_extension_is_said_once(without_c):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            run(kernels, make_grads())
    [warning] = caught
    assert "torch's own operators: the extension was not built" in str(warning.message)
    assert warning.filename == __file__


def test_a_device_is_given_its_own_kernels(monkeypatch):
    monkeypatch.setattr(triton, "why_not", lambda device: None)
    assert dispatch._backend_of(torch.device("cpu")) is native
    assert dispatch._backend_of(GPU) is triton
    assert dispatch._backend_of(torch.device("xpu", 0)) is foreach
    assert kernels.backend_name(torch.device("cpu")) == "native"


def test_a_gpu_without_triton_warns_once_and_uses_torchs_operators(monkeypatch):
    asked = []
    monkeypatch.setattr(triton, "why_not", lambda device: asked.append(device) or "no compiler.")
    with pytest.warns(UserWarning, match="Gradients on cuda:0 .* no compiler"):
        assert dispatch._backend_of(GPU) is foreach
    assert dispatch._backend_of(GPU) is foreach
    assert kernels.backend_name(GPU) == "foreach"
    assert asked == [GPU]


def test_no_gradient_and_a_useless_factor_is_found_wherever_the_flag_is():
    for factor, want in ((0.5, 0.0), (math.inf, 1.0)):
        for kernel in (kernels.unscale_, kernels.check_):
            found = torch.zeros(())
            kernel([], torch.tensor(factor), found)
            assert found.item() == want


def test_counts_are_in_the_order_of_the_gradients():
    grads = make_grads(math.nan)
    counts = kernels.count(grads)
    assert torch.equal(counts.nan_to_num(nan=-1.0), reference.count(grads).nan_to_num(nan=-1.0))
    assert counts[-1, 1] == 1


def test_a_tensor_of_another_class_is_left_to_torch():
    """Its memory may not be all that it is."""

    class Marked(torch.Tensor):
        pass

    grads = [torch.ones(3), torch.ones(4).as_subclass(Marked), torch.nn.Parameter(torch.ones(2))]
    found = torch.zeros(())
    with torch.no_grad():
        kernels.unscale_(grads, torch.tensor(0.5), found)
        kernels.scale_(grads, torch.tensor(0.5))
    assert [g.tolist() for g in grads] == [[0.25] * 3, [0.25] * 4, [0.25] * 2]


def test_a_gradient_that_is_listed_twice_is_counted_twice():
    grad = torch.tensor([1.0, math.nan])
    assert kernels.count([grad, torch.ones(1), grad])[:, 1].tolist() == [1, 0, 1]


@pytest.mark.parametrize("kernel", ["unscale_", "check_", "scale_", "count"])
def test_a_gradient_without_memory_is_refused(kernel):
    freed = torch.ones(5)
    freed.untyped_storage().resize_(0)
    scalars = {"count": [], "scale_": [torch.tensor(0.5)]}.get(
        kernel, [torch.tensor(0.5), torch.zeros(())]
    )
    with pytest.raises(LayoutError, match=r"gradient 1, of shape \(5,\), has elements, but no"):
        getattr(kernels, kernel)([torch.ones(2), freed], *scalars)


def test_a_factor_of_one_writes_nothing_and_says_so():
    grad = torch.ones(3)
    kernels.scale_([grad], torch.tensor(1.0))
    assert grad._version == 0


@pytest.mark.parametrize("without", [False, True])
@pytest.mark.filterwarnings("ignore:Gradients on cpu")
def test_a_check_squares_the_product_and_not_the_gradient(without, request):
    """The square of the gradient, which is still scaled, is beyond float64; with gaps, too."""
    if without:
        request.getfixturevalue("without_c")
    wide = torch.full((3, 4), 1e155, dtype=torch.float64)
    for grad in (wide, wide[:, :2]):
        found, squares = torch.zeros(()), torch.zeros((), dtype=torch.float64)
        kernels.check_([grad], torch.tensor(2.0**-16), found, squares)
        want = (grad * 2.0**-16).square().sum().item()
        assert squares.item() == pytest.approx(want, rel=1e-12)
        assert found.item() == 0.0


@pytest.mark.parametrize("kernel", ["unscale_", "scale_"])
def test_torch_is_told_of_what_was_written(kernel):
    grads = make_grads()
    before = [g._version for g in grads]
    found = [torch.zeros(())] if kernel == "unscale_" else []
    getattr(kernels, kernel)(grads, torch.tensor(0.5), *found)
    assert all(g._version > v for g, v in zip(grads, before, strict=True))
    before = [g._version for g in grads]
    kernels.check_(grads, torch.tensor(0.5), torch.zeros(()))
    assert [g._version for g in grads] == before


@pytest.mark.parametrize(
    ("grad", "dense"),
    [
        (torch.ones(3, 4), True),
        (torch.ones(3, 4).t(), True),
        (torch.ones(2, 3, 4).permute(1, 2, 0), True),
        (torch.ones(3, 4)[:, :2], False),
        (torch.ones(8)[::2], False),
        (torch.ones(8)[::7], False),
        (torch.ones(()), True),
        (torch.ones(0, 3), True),
        (torch.ones(4, 6)[:0, ::2], True),
        (torch.ones(2, 5, 1).transpose(1, 2), True),
    ],
)
def test_dense_is_what_has_no_gaps(grad, dense):
    assert kernels.is_dense(grad) is dense
