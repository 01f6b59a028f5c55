"""The names with an underscore that frameworks, optimizers and torch's own tests reach for."""

from __future__ import annotations

import math

import pytest
import torch
from torch.amp.grad_scaler import OptState

from shardscale import ShardedGradScaler
from shardscale.testing import run_ranks
from tests.conformance.side_by_side import BOTH, assert_same_bits, full, grad_of, params_of, sgd

READERS = {
    "_scale": lambda s: s._scale,
    "_growth_tracker": lambda s: s._growth_tracker,
    "_init_growth_tracker": lambda s: s._init_growth_tracker,
    "_growth_factor": lambda s: s._growth_factor,
    "_backoff_factor": lambda s: s._backoff_factor,
    "_growth_interval": lambda s: s._growth_interval,
    "_enabled": lambda s: s._enabled,
    "_get_scale_async": lambda s: s._get_scale_async(),
    "_get_growth_tracker": lambda s: s._get_growth_tracker(),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("used", [False, True])
def test_state_reads_as_torchs(read, used):
    scalers = []
    for make in (torch.amp.GradScaler, ShardedGradScaler):
        scaler = make("cpu", init_scale=8.0, growth_factor=3.0, growth_interval=7)
        if used:
            scaler.scale(torch.ones(()))
        scalers.append(scaler)
    assert_same_bits(*map(read, scalers))


@BOTH
def test_init_scale_reads_before_the_first_use_and_after_loading(make):
    scaler = make("cpu", init_scale=8.0)
    assert scaler._init_scale == 8.0
    scaler.load_state_dict(torch.amp.GradScaler("cpu", init_scale=4.0).state_dict())
    assert scaler._init_scale == 4.0


@BOTH
def test_a_tracker_set_before_the_first_use_is_overwritten_by_loading(make):
    """A test of torch's own sets it so."""
    scaler = make("cpu")
    scaler._init_growth_tracker = 7
    assert scaler._get_growth_tracker() == 7
    scaler.load_state_dict(torch.amp.GradScaler("cpu").state_dict())
    assert scaler._init_growth_tracker == 0


@BOTH
def test_a_disabled_scaler_has_no_tracker(make):
    assert make("cpu", enabled=False)._get_growth_tracker() == 0


@BOTH
def test_placing_the_state_by_hand(make):
    scaler = make("cpu", init_scale=8.0)
    scaler._lazy_init_scale_growth_tracker(torch.device("cpu"))
    assert scaler._get_scale_async() is scaler._scale
    assert scaler._scale.item() == 8.0


@BOTH
def test_stages_and_flags_of_an_optimizer(make):
    scaler, optimizer = make("cpu"), sgd(full(math.inf))
    scaler.scale(torch.ones(()))
    assert scaler._per_optimizer_states[id(optimizer)] == {
        "stage": OptState.READY,
        "found_inf_per_device": {},
    }
    scaler.unscale_(optimizer)
    state = scaler._per_optimizer_states[id(optimizer)]
    assert state["stage"] is OptState.UNSCALED
    assert state["found_inf_per_device"] == {torch.device("cpu"): torch.tensor(1.0)}
    scaler.step(optimizer)
    assert scaler._per_optimizer_states[id(optimizer)]["stage"] is OptState.STEPPED
    scaler.update()
    assert scaler._per_optimizer_states[id(optimizer)]["stage"] is OptState.READY


@BOTH
def test_found_inf_per_device_only_reads(make):
    scaler, optimizer = make("cpu", init_scale=8.0), sgd(full(8.0))
    scaler.scale(torch.ones(()))
    assert scaler._found_inf_per_device(optimizer) == {}
    assert grad_of(optimizer).tolist() == [8.0] * 4
    scaler.unscale_(optimizer)
    [flag] = scaler._found_inf_per_device(optimizer).values()
    assert (flag.item(), flag.shape, flag.dtype) == (0.0, (), torch.float32)


def test_reading_flags_sends_nothing():
    def rank(comm):
        scaler, optimizer = ShardedGradScaler("cpu", comm=comm), sgd(full(1.0))
        if comm.rank == 0:  # a rank may read alone
            scaler._found_inf_per_device(optimizer)
        scaler.unscale_(optimizer)
        if comm.rank == 0:
            scaler._found_inf_per_device(optimizer)
        return comm.num_reduces

    assert run_ranks(rank, 2) == [1, 1]


@BOTH
@pytest.mark.parametrize(("value", "flag"), [(8.0, 0.0), (math.nan, 1.0)])
@pytest.mark.parametrize("fused", [False, True])
def test_check_inf_per_device_judges_and_leaves_gradients_scaled(make, value, flag, fused):
    scaler, optimizer = make("cpu", init_scale=8.0), sgd(full(value), fused=fused)
    scaler.scale(torch.ones(()))
    found = scaler._check_inf_per_device(optimizer)
    assert found == {torch.device("cpu"): torch.tensor(flag)}
    assert scaler._found_inf_per_device(optimizer) == found
    if not flag:
        assert grad_of(optimizer).tolist() == [8.0] * 4
    scaler.step(optimizer)
    scaler.update()
    assert params_of(optimizer)[0].tolist() == [1.0 if flag else 0.0] * 4


def test_check_inf_per_device_is_the_collective_of_its_call_once():
    def rank(comm):
        scaler = ShardedGradScaler("cpu", comm=comm)
        optimizer = sgd(full(math.inf if comm.rank else 1.0))
        flags = [f.item() for f in scaler._check_inf_per_device(optimizer).values()]
        flags += [f.item() for f in scaler._check_inf_per_device(optimizer).values()]
        scaler.step(optimizer)
        scaler.update()
        return flags, comm.num_reduces, scaler.get_scale()

    assert run_ranks(rank, 2) == [([1.0, 1.0], 1, 32768.0)] * 2


def test_unscale_grads_is_local():
    def rank(comm):
        scaler = ShardedGradScaler("cpu", comm=comm)
        optimizer = sgd(full(math.inf if comm.rank else 8.0))
        flags = scaler._unscale_grads_(optimizer, torch.tensor(0.5), torch.tensor(0.0), True)
        return [f.item() for f in flags.values()], comm.num_reduces, grad_of(optimizer)[0].item()

    assert run_ranks(rank, 2) == [([0.0], 0, 4.0), ([1.0], 0, math.inf)]


@BOTH
def test_unscale_grads_takes_and_returns_flags_as_torchs(make):
    """Its arguments have one dimension in torch's own tests; the flag given is not written to."""
    scaler = make("cpu")
    given = torch.zeros(1)
    flags = scaler._unscale_grads_(sgd(full(8.0)), torch.full((1,), 0.25), given, False)
    assert list(flags) == [given.device]
    assert flags[given.device].item() == 0.0
    flags = scaler._unscale_grads_(sgd(full(math.nan)), torch.full((1,), 0.25), given, False)
    assert flags[given.device].item() == 1.0
    assert given.item() == 0.0
    assert scaler._unscale_grads_(sgd(None), torch.tensor(0.25), given, False) == {}


@BOTH
def test_unscale_grads_refuses_float16_if_told_so(make):
    optimizer = sgd(full(8.0, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"^Attempting to unscale FP16 gradients"):
        make("cpu")._unscale_grads_(optimizer, torch.tensor(0.25), torch.tensor(0.0), False)
    make("cpu")._unscale_grads_(optimizer, torch.tensor(0.25), torch.tensor(0.0), True)
    assert grad_of(optimizer).tolist() == [2.0] * 4


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("values", "flag"), [((16.0, 32.0, 64.0), 0.0), ((16.0, math.inf, 8.0), 1.0)]
)
def test_unscale_grads_of_sparse_gradients(make, dtype, values, flag):
    """As a test of torch's own does."""
    indices = torch.tensor([[0, 1, 1], [2, 0, 2]])
    grad = torch.sparse_coo_tensor(
        indices, torch.tensor(values), (2, 3), dtype=dtype, check_invariants=True
    )
    want = grad.to_dense() / 4
    optimizer = sgd(grad)
    flags = make("cpu")._unscale_grads_(optimizer, torch.full((1,), 0.25), torch.zeros(1), True)
    assert [f.item() for f in flags.values()] == [flag]
    assert_same_bits(grad_of(optimizer).to_dense(), want)


@BOTH
def test_unscale_grads_finds_a_sparse_sum_that_overflows(make):
    """As a test of torch's own does: each value alone is a float16."""
    overflowing = torch.sparse_coo_tensor(
        torch.tensor([[0, 1, 0], [2, 0, 2]]),
        torch.tensor([64000.0, 32.0, 64000.0]),
        (2, 3),
        dtype=torch.float16,
        check_invariants=True,
    )
    flags = make("cpu")._unscale_grads_(
        sgd(overflowing), torch.full((1,), 0.25), torch.zeros(1), True
    )
    assert [f.item() for f in flags.values()] == [1.0]


@BOTH
@pytest.mark.parametrize(("flags", "returned"), [((0.0, 0.0), "stepped"), ((0.0, 1.0), None)])
def test_maybe_opt_step_obeys_the_flags_it_is_given(make, flags, returned):
    class Optimizer:
        param_groups = ()

        def step(self, *args, **kwargs):
            assert (args, kwargs) == ((1,), {"lr": 2})
            return "stepped"

    state = {"found_inf_per_device": dict(enumerate(map(torch.tensor, flags)))}
    assert make("cpu")._maybe_opt_step(Optimizer(), state, 1, lr=2) == returned


@BOTH
def test_a_scale_written_from_outside_counts(make):
    """Some frameworks fill the tensor; it is the state, not a copy."""
    scaler, optimizer = make("cpu"), sgd(full(8.0))
    scaler.scale(torch.ones(()))
    scaler._scale.fill_(8.0)
    scaler._growth_tracker.fill_(5)
    scaler.step(optimizer)
    scaler.update()
    assert params_of(optimizer)[0].tolist() == [0.0] * 4
    assert (scaler.get_scale(), scaler._get_growth_tracker()) == (8.0, 6)
