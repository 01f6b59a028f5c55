"""Statements 9 to 17: what ``unscale_`` does to gradients, and what it finds in them."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardscale import LayoutError, ShardedGradScaler, StageError
from tests.conformance.side_by_side import (
    BOTH,
    assert_fails_alike,
    assert_same_bits,
    full,
    grad_of,
    parameter,
    params_of,
    sgd,
)

DENSE = [torch.bfloat16, torch.float32, torch.float64]


def unscaled(make, grad, scale, **attach):
    """The gradient after ``unscale_`` and whether it was found bad."""
    optimizer = sgd(grad)
    scaler = make("cpu", init_scale=scale)
    scaler.scale(torch.ones(()))
    scaler.unscale_(optimizer)
    [flag] = scaler._found_inf_per_device(optimizer).values()
    return grad_of(optimizer), flag.item()


def sparse(indices, values, size=4, dtype=torch.float32):
    return torch.sparse_coo_tensor(
        torch.tensor([indices]), torch.tensor(values, dtype=dtype), (size,), check_invariants=True
    )


@settings(deadline=None, max_examples=60)
@given(
    scale=st.floats(2.0**-100, 2.0**100, width=32),
    values=st.lists(st.floats(width=32), min_size=1, max_size=6),
    dtype=st.sampled_from(DENSE),
)
def test_every_scale_and_every_value_gives_torchs_bits(scale, values, dtype):
    """Contract 9: Inf, NaN, denormals and zeros among them."""
    grad = torch.tensor(values).to(dtype)
    theirs, their_flag = unscaled(torch.amp.GradScaler, grad.clone(), scale)
    ours, our_flag = unscaled(ShardedGradScaler, grad.clone(), scale)
    assert_same_bits(theirs, ours)
    if scale >= 1:
        assert their_flag == our_flag
    else:  # torch does not see what overflows by the multiplication
        assert our_flag == max(their_flag, float(not ours.isfinite().all()))


@BOTH
@pytest.mark.parametrize("scale", [3.0, 65536.0, 1e-30, 7e29, 1.1])
def test_the_factor_is_the_float64_reciprocal_rounded_once(make, scale):
    """Contract 9: against the formula in float64."""
    grad, _ = unscaled(make, full(1.0), scale)
    rounded = torch.tensor(scale, dtype=torch.float32).double()
    assert grad[0].item() == (1 / rounded).float().item()


@BOTH
@pytest.mark.parametrize("dtype", DENSE)
def test_dense_gradients_keep_their_identity_and_storage(make, dtype):
    """Contract 9: buckets and flat views stay in step."""
    flat = torch.full((12,), 4.0, dtype=dtype)
    grad = flat[2:8].view(2, 3)
    optimizer = sgd(grad)
    scaler = make("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    scaler.unscale_(optimizer)
    assert grad_of(optimizer) is grad
    assert flat.tolist() == [4.0] * 2 + [1.0] * 6 + [4.0] * 4


@pytest.mark.parametrize(
    "grad",
    [
        torch.arange(12.0).view(3, 4).t(),
        torch.arange(12.0)[::3],
        torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1)[1:3],
        torch.tensor(5.0),
        torch.empty(0),
        torch.empty(0, 3).t(),
        torch.ones(1, 1, 1),
        torch.arange(2.0 * 3 * 2 * 2).view(2, 3, 2, 2).to(memory_format=torch.channels_last),
    ],
    ids=[
        "transposed",
        "strided",
        "permuted slice",
        "0-dim",
        "empty",
        "empty 2-dim",
        "ones",
        "nhwc",
    ],
)
def test_every_shape_and_stride_is_unscaled_in_place(grad):
    """Contract 9: with the gaps between a view's elements untouched."""
    theirs, ours = grad.clone(), grad
    want, _ = unscaled(torch.amp.GradScaler, theirs, 3.0)
    got, flag = unscaled(ShardedGradScaler, ours, 3.0)
    assert got is grad
    assert_same_bits(want, got)
    assert flag == 0.0


def test_unscaling_twice_is_torchs_error():
    """Contract 10: by ``unscale_`` and by ``clip_grad_norm_`` before it."""
    theirs, ours = torch.amp.GradScaler("cpu"), ShardedGradScaler("cpu")
    one, other = sgd(full(1.0)), sgd(full(1.0))
    theirs.scale(torch.ones(()))
    theirs.unscale_(one)
    ours.unscale_(other)
    text = "unscale_() has already been called on this optimizer since the last update()."
    assert_fails_alike(
        lambda: theirs.unscale_(one), lambda: ours.unscale_(other), text, RuntimeError
    )
    ours.update()
    ours.clip_grad_norm_(other, 1.0)
    with pytest.raises(StageError, match=r"^unscale_\(\) has already been called"):
        ours.unscale_(other)


def test_unscaling_after_step_is_torchs_error():
    """Contract 10: and so is clipping after it."""
    theirs, ours = torch.amp.GradScaler("cpu"), ShardedGradScaler("cpu")
    one, other = sgd(full(1.0)), sgd(full(1.0))
    theirs.scale(torch.ones(()))
    theirs.step(one)
    ours.step(other)
    text = "unscale_() is being called after step()."
    assert_fails_alike(
        lambda: theirs.unscale_(one), lambda: ours.unscale_(other), text, RuntimeError
    )
    with pytest.raises(StageError, match=r"^unscale_\(\) is being called after step\(\)"):
        ours.clip_grad_norm_(other, 1.0)


def test_a_wrong_call_leaves_the_verdict_before_it_standing():
    """Contract 10: after the error the iteration can be finished."""
    scaler, optimizer = ShardedGradScaler("cpu", init_scale=2.0), sgd(full(2.0))
    scaler.unscale_(optimizer)
    with pytest.raises(StageError):
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert params_of(optimizer)[0].tolist() == [0.0] * 4
    assert scaler._growth_tracker.item() == 1


def test_float16_gradients_are_unscaled():
    """Contract 11: torch's GradScaler refuses, its ShardedGradScaler does not."""
    grad = torch.tensor([1024.0, -3.0, 65504.0, 6e-8], dtype=torch.float16)
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        unscaled(torch.amp.GradScaler, grad.clone(), 8.0)
    got, flag = unscaled(ShardedGradScaler, grad.clone(), 8.0)
    assert_same_bits(got, (grad.float() / 8).half())
    assert flag == 0.0


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float16, *DENSE])
def test_one_bad_element_among_many_is_found_in_every_dtype(dtype, bad):
    """Contract 11: the last of many elements, behind what vector instructions take at once."""
    grad = torch.ones(1001, dtype=dtype)
    grad[-1] = bad
    assert unscaled(ShardedGradScaler, grad, 8.0)[1] == 1.0
    assert unscaled(ShardedGradScaler, torch.ones(1001, dtype=dtype), 8.0)[1] == 0.0


def test_a_float64_value_beyond_float32_is_finite():
    """Contract 11: judged as what it is, at scales above and below 1."""
    for scale in (8.0, 0.5):
        grad, flag = unscaled(ShardedGradScaler, full(1e300, dtype=torch.float64), scale)
        assert flag == 0.0
        assert grad.tolist() == [1e300 / scale] * 4


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("part", [None, "real", "imag"])
def test_complex_gradients_are_unscaled_and_judged_by_their_parts(dtype, part):
    """Contract 11: torch has no kernel for them."""
    grad = torch.tensor([8 + 16j, -24j], dtype=dtype)
    with pytest.raises(RuntimeError):
        unscaled(torch.amp.GradScaler, grad.clone(), 8.0)
    if part is not None:
        getattr(grad, part)[1] = math.nan
    got, flag = unscaled(ShardedGradScaler, grad, 8.0)
    assert got is grad
    assert got[0].item() == 1 + 2j
    assert flag == (part is not None)


def test_a_lazily_conjugated_gradient_is_unscaled_in_place():
    """Contract 11: autograd of complex numbers hands these out."""
    base = torch.tensor([8 + 16j, -24j])
    optimizer = sgd(base.clone())
    params_of(optimizer)[0].grad = base.conj()
    ShardedGradScaler("cpu", init_scale=8.0).unscale_(optimizer)
    assert base.tolist() == [1 + 2j, -3j]
    assert grad_of(optimizer).tolist() == [1 - 2j, 3j]


@pytest.mark.parametrize("dtype", [torch.float16, *DENSE])
def test_a_scale_of_one_leaves_every_bit_alone(dtype):
    """Contract 12: denormals and signed zeros; torch sets the quiet bit of a 16-bit NaN."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    bits = torch.randint(
        torch.iinfo(integer).min, torch.iinfo(integer).max, (5000,), dtype=torch.int64
    ).to(integer)
    bits = torch.cat([bits, torch.arange(-500, 500).to(integer)])
    grad = bits.clone().view(dtype)
    got, _ = unscaled(ShardedGradScaler, grad, 1.0)
    same = got.view(integer) == bits
    quiet = got.isnan() & bits.view(dtype).isnan() if dtype.itemsize == 2 else False
    assert (same | quiet).all()


@BOTH
def test_all_gradients_are_multiplied_even_when_one_is_bad(make):
    """Contract 13: gradients after a plain ``unscale_`` have one scale."""
    optimizer = sgd(full(8.0), full(math.inf), full(16.0, dtype=torch.float64))
    scaler = make("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    scaler.unscale_(optimizer)
    assert grad_of(optimizer, 0).tolist() == [1.0] * 4
    assert grad_of(optimizer, 2).tolist() == [2.0] * 4


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (3e38, torch.float32),
        (-3e38, torch.bfloat16),
        (60000.0, torch.float16),
        (1.7e308, torch.float64),
    ],
)
@pytest.mark.parametrize("fused", [False, True])
def test_a_product_that_overflows_is_found(value, dtype, fused):
    """Contract 13: at a scale of 0.5, with the flag of torch staying 0."""
    if dtype != torch.float16:
        got, flag = unscaled(torch.amp.GradScaler, full(value, dtype=dtype), 0.5)
        assert got.isinf().all() and flag == 0.0
    got, flag = unscaled(ShardedGradScaler, full(value, dtype=dtype), 0.5)
    assert got.isinf().all() and flag == 1.0
    optimizer = sgd(full(value, dtype=dtype), fused=fused)
    ShardedGradScaler("cpu", init_scale=0.5).step(optimizer)
    assert params_of(optimizer)[0].tolist() == [1.0] * 4


def test_a_finite_product_at_a_scale_below_one_is_good():
    """Contract 13: the second look judges nothing else."""
    assert unscaled(ShardedGradScaler, full(1.5e38), 0.5)[1] == 0.0


def test_a_value_is_judged_before_it_is_made_smaller():
    """Contract 13: no factor makes a NaN or an Inf good."""
    for bad in (math.inf, math.nan):
        assert unscaled(ShardedGradScaler, full(bad), 2.0**100)[1] == 1.0


def test_clipping_does_not_clip_what_is_bad():
    """Contract 13: by a norm of Inf every gradient would become 0 or NaN."""
    optimizer = sgd(full(16.0), full(math.inf, 1))
    scaler = ShardedGradScaler("cpu", init_scale=2.0)
    norm = scaler.clip_grad_norm_(optimizer, 1.0)
    assert norm.item() == math.inf
    assert grad_of(optimizer).tolist() == [8.0] * 4
    scaler.step(optimizer)
    assert params_of(optimizer)[0].tolist() == [1.0] * 4


@BOTH
def test_none_gradients_are_passed_over_and_all_groups_visited(make):
    """Contract 14: the bad one sits in the last group."""
    params = [parameter(full(4.0)), parameter(None), parameter(full(math.nan))]
    optimizer = torch.optim.SGD([{"params": [p]} for p in params], lr=1.0)
    scaler = make("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    scaler.unscale_(optimizer)
    assert params[0].grad.tolist() == [1.0] * 4
    assert params[1].grad is None
    assert [f.item() for f in scaler._found_inf_per_device(optimizer).values()] == [1.0]


def test_a_parameter_listed_twice_is_unscaled_once():
    """Contract 14: torch divides it twice."""

    def listed_twice():
        param = parameter(full(64.0))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that this will become an error
            return torch.optim.SGD([param, parameter(full(8.0)), param], lr=1.0)

    theirs, ours = listed_twice(), listed_twice()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    scaler.unscale_(theirs)
    assert grad_of(theirs)[0].item() == 1.0
    ShardedGradScaler("cpu", init_scale=8.0).unscale_(ours)
    assert [grad_of(ours, i)[0].item() for i in range(3)] == [8.0, 1.0, 8.0]


def call_with(scaler, call, optimizers):
    arguments = (1.0,) if call == "clip_grad_norm_" else ()
    return getattr(scaler, call)(optimizers, *arguments)


@pytest.mark.parametrize("call", ["unscale_", "clip_grad_norm_", "step"])
@pytest.mark.parametrize("jointly", [False, True])
def test_a_gradient_of_two_optimizers_is_refused(call, jointly):
    """Contract 14: torch unscales it twice and steps with both."""
    param = parameter(full(8.0))
    pair = [torch.optim.SGD([param], lr=1.0), torch.optim.SGD([param], lr=1.0)]
    scaler = ShardedGradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    if not jointly:
        call_with(scaler, call, pair[0])
    before = param.tolist(), param.grad.tolist()
    with pytest.raises(LayoutError, match=r"shape \(4,\) is in two optimizers"):
        call_with(scaler, call, pair if jointly else pair[1])
    assert (param.tolist(), param.grad.tolist()) == before


@BOTH
def test_two_optimizers_may_share_a_parameter_that_gets_a_gradient_for_each(make):
    """Contract 14: a new loss was scaled in between."""
    param = parameter(full(0.0))
    scaler = make("cpu", init_scale=8.0)
    for optimizer in [torch.optim.SGD([param], lr=1.0) for _ in range(2)]:
        optimizer.zero_grad()
        scaler.scale(param.sum()).backward()
        scaler.unscale_(optimizer)
        assert param.grad.tolist() == [1.0] * 4
        scaler.step(optimizer)
    scaler.update()
    assert param.tolist() == [-1.0] * 4


@BOTH
def test_uncoalesced_float32_stays_uncoalesced(make):
    """Contract 15: the values are unscaled where they are."""
    grad = sparse([0, 2, 0], [4.0, 8.0, 12.0])
    got, flag = unscaled(make, grad, 4.0)
    assert got is grad and not got.is_coalesced()
    assert got._values().tolist() == [1.0, 2.0, 3.0]
    assert flag == 0.0


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_bad_value_of_a_sparse_gradient_is_found(dtype, bad):
    """Contract 15: coalesced or not."""
    for indices in ([0, 2, 1], [0, 2, 0]):
        grad = sparse(indices, [1.0, bad, 1.0], dtype=dtype)
        assert unscaled(ShardedGradScaler, grad, 4.0)[1] == 1.0


def test_float16_is_coalesced_in_float32_and_replaced():
    """Contract 15: 2048 + 1 - 2048 is 1; added in float16 it would be 0."""
    grad = sparse([0, 0, 0, 3], [2048.0, 1.0, -2048.0, 4.0], dtype=torch.float16)
    got, flag = unscaled(ShardedGradScaler, grad, 1.0)
    assert got is not grad and got.is_coalesced() and got.dtype == torch.float16
    assert got.to_dense().tolist() == [1.0, 0.0, 0.0, 4.0]
    assert flag == 0.0


def test_a_float16_sum_of_duplicates_that_overflows_is_found():
    """Contract 15: each value alone is finite."""
    grad = sparse([1, 1], [40000.0, 40000.0], dtype=torch.float16)
    assert unscaled(ShardedGradScaler, grad, 4.0)[1] == 1.0


def test_the_norm_of_uncoalesced_values_is_that_of_their_sum():
    """Contract 15: 3 and 1 on one element count as 4."""
    optimizer = sgd(sparse([0, 0, 1], [6.0, 2.0, 6.0]))
    norm = ShardedGradScaler("cpu", init_scale=2.0).clip_grad_norm_(optimizer, math.inf)
    assert norm.item() == 5.0
    assert grad_of(optimizer).to_dense().tolist() == [4.0, 3.0, 0.0, 0.0]


def test_an_empty_sparse_gradient_is_good():
    """Contract 15: an embedding that saw no index."""
    assert unscaled(ShardedGradScaler, sparse([], []), 4.0)[1] == 0.0


@pytest.mark.parametrize("scale", [math.inf, math.nan, 0.0, 1e-44], ids=str)
def test_a_scale_that_is_no_scale_any_more_counts_as_found(scale):
    """Contract 16: somebody wrote into ``_scale``."""
    optimizer = sgd(full(1.0))
    scaler = ShardedGradScaler("cpu")
    scaler.begin()
    scaler._scale.fill_(scale)
    scaler.unscale_(optimizer)
    assert scaler.verdict(optimizer).found_inf.item() == 1.0
    assert scaler.step(optimizer) is None
    assert params_of(optimizer)[0].tolist() == [1.0] * 4


@pytest.mark.parametrize("fused", [False, True])
def test_torch_takes_the_step_by_a_scale_of_inf(fused):
    """Contract 16: with gradients of zero; weight decay or momentum still move. We skip."""
    for make, moved in ((torch.amp.GradScaler, True), (ShardedGradScaler, False)):
        optimizer = sgd(full(1.0), weight_decay=0.5, fused=fused)
        scaler = make("cpu")
        scaler.scale(torch.ones(()))
        scaler._scale.fill_(math.inf)
        scaler.step(optimizer)
        assert params_of(optimizer)[0].tolist() == [0.5 if moved else 1.0] * 4


@pytest.mark.parametrize("bad", range(7))
def test_one_bad_gradient_of_any_dtype_decides_for_all(bad):
    """Contract 17: seven kinds of gradients in one optimizer, and one verdict."""
    grads = [
        full(8.0),
        full(8.0, dtype=torch.float16),
        full(8.0, dtype=torch.bfloat16),
        full(8.0, dtype=torch.float64),
        full(8.0, dtype=torch.complex64),
        sparse([1, 1], [8.0, 8.0]),
        torch.tensor(8.0),
    ]
    values = grads[bad]._values() if grads[bad].is_sparse else grads[bad]
    values.view(-1)[-1] = math.nan
    optimizer = sgd(*grads)
    scaler = ShardedGradScaler("cpu", init_scale=8.0)
    scaler.unscale_(optimizer)
    found_inf = scaler.verdict(optimizer).found_inf
    assert found_inf.dtype == torch.float32 and found_inf.shape == ()
    assert found_inf.item() == 1.0


def test_all_kinds_of_good_gradients_are_good_together():
    """Contract 17: and all are unscaled."""
    grads = [full(8.0, dtype=d) for d in (torch.float16, *DENSE, torch.complex64)]
    optimizer = sgd(*grads)
    scaler = ShardedGradScaler("cpu", init_scale=8.0)
    scaler.unscale_(optimizer)
    assert scaler.verdict(optimizer).found_inf.item() == 0.0
    assert all(g.tolist() == [1.0] * 4 for g in grads)


def compressed():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the layout beta
        return torch.eye(3).to_sparse_csr()


@pytest.mark.parametrize(
    "make_grad",
    [
        lambda: torch.ones(1).expand(4),
        lambda: torch.ones(5).as_strided((4, 2), (1, 1)),
        compressed,
        lambda: torch.ones(4).to(torch.float8_e4m3fn),
    ],
    ids=["expanded", "overlapping", "csr", "float8"],
)
def test_a_gradient_that_cannot_be_unscaled_is_named(make_grad):
    """Contract 17: LayoutError with the parameter's name, and nothing is changed."""
    grad = make_grad()
    model = torch.nn.Module()
    model.good = parameter(full(8.0))
    model.bad = torch.nn.Parameter(grad.clone())
    model.bad.grad = grad
    before = grad.to_dense().float().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = ShardedGradScaler("cpu", init_scale=8.0, model=model)
    with pytest.raises(LayoutError, match="gradient of bad "):
        scaler.unscale_(optimizer)
    assert model.good.grad.tolist() == [8.0] * 4
    assert torch.equal(model.bad.grad.to_dense().float(), before)
