"""Faults that only show on several ranks, found by attack; each rank is a thread."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

import shardscale
from shardscale import DisagreementError, DynamicScale, LayoutError, ShardedGradScaler, StageError
from shardscale.testing import run_ranks


def loop_sgd(grad):
    param = torch.nn.Parameter(torch.zeros(grad.shape))
    param.grad = grad
    return torch.optim.SGD([param], lr=1.0), param


def fused_sgd(grad):
    param = torch.nn.Parameter(torch.zeros(grad.shape))
    param.grad = grad
    return torch.optim.SGD([param], lr=1.0, fused=True), param


def module_of(*optimizers):
    return torch.nn.ParameterList([p for o in optimizers for p in o.param_groups[0]["params"]])


def outcome(fn, *args):
    try:
        fn(*args)
    except Exception as error:
        return type(error)
    return None


@pytest.mark.parametrize("make", [loop_sgd, fused_sgd])
@pytest.mark.parametrize("mistake", ["layout", "wrong optimizer"])
def test_trouble_in_one_call_stops_the_optimizer_of_another(make, mistake):
    """Contract 46: nothing moves from the first such call on, earlier good verdicts or not."""

    def job(comm):
        scaler = ShardedGradScaler("cpu", init_scale=1.0, comm=comm, timeout_s=5)
        (a, p), (b, q) = make(torch.ones(3)), make(torch.ones(3))
        if mistake == "layout" and comm.rank == 0:
            q.grad = torch.ones(1).expand(3)
        scaler.unscale_(a)
        first = outcome(scaler.unscale_, a if mistake != "layout" and comm.rank == 0 else b)
        stepped = outcome(scaler.step, a)
        return first, stepped, p.tolist()

    (first, *_), *_ = results = run_ranks(job, 2)

    assert first is (LayoutError if mistake == "layout" else StageError)
    assert all(p == [0.0, 0.0, 0.0] for _, _, p in results)
    if make is loop_sgd:
        assert [stepped for _, stepped, _ in results] == [DisagreementError] * 2


def test_a_mistake_that_all_ranks_share_leaves_their_earlier_verdicts_standing():
    def job(comm):
        scaler = ShardedGradScaler("cpu", init_scale=1.0, comm=comm)
        a, p = loop_sgd(torch.ones(3))
        scaler.unscale_(a)
        again = outcome(scaler.unscale_, a)
        scaler.step(a)
        scaler.update()
        return again, p.tolist(), scaler.get_scale()

    assert run_ranks(job, 2) == [(StageError, [-1.0, -1.0, -1.0], 1.0)] * 2


def test_a_disabled_scaler_that_clips_raises_where_the_ranks_disagree():
    def job(comm):
        scaler = ShardedGradScaler("cpu", enabled=False, comm=comm)
        a, _ = loop_sgd(torch.ones(3))
        scaler.attach(module_of(a), copies=shardscale.distinct)
        return outcome(scaler.clip_grad_norm_, a, 1.0 + comm.rank)

    assert run_ranks(job, 2) == [DisagreementError] * 2


@pytest.mark.parametrize("which", ["first", "second"])
def test_the_late_error_names_the_verdict_that_drifted_whichever_it_was(which):
    def job(comm):
        a, b = fused_sgd(torch.ones(3))[0], fused_sgd(torch.ones(3))[0]
        scaler = ShardedGradScaler("cpu", comm=comm)
        scaler.attach(module_of(a, b), copies=shardscale.distinct)
        odd = 1.0 + comm.rank
        scaler.clip_grad_norm_(a, odd if which == "first" else 1.0)
        scaler.clip_grad_norm_(b, odd if which == "second" else 1.0)
        scaler.step(a)
        scaler.step(b)
        scaler.update()
        with pytest.raises(DisagreementError) as told:
            scaler.update()
        return str(told.value)

    for message in run_ranks(job, 2):
        assert "max_norm: 1.0 on rank 0, 2.0 on rank 1" in message


def test_a_copy_in_the_same_process_agrees_in_the_same_group():
    def job(comm):
        scaler = copy.deepcopy(ShardedGradScaler("cpu", init_scale=1.0, comm=comm))
        a, p = loop_sgd(torch.full((2,), math.inf if comm.rank == 0 else 1.0))
        scaler.step(a)
        scaler.update()
        return p.tolist(), scaler.get_scale()

    assert run_ranks(job, 2) == [([0.0, 0.0], 0.5)] * 2


class Rank:
    """A communicator that pickles."""

    rank, size = 0, 2

    def all_reduce_sum_(self, buffer):
        raise AssertionError

    def all_gather_object(self, obj):
        raise AssertionError


def test_a_pickle_that_lost_its_group_does_not_decide_alone():
    lost = pickle.loads(pickle.dumps(ShardedGradScaler("cpu", init_scale=4.0, comm=Rank())))

    assert lost.get_scale() == 4.0
    with pytest.raises(StageError, match="no pickle can carry"):
        lost.step(loop_sgd(torch.ones(2))[0])


class Named(ShardedGradScaler):
    def __init__(self, name):
        super().__init__("cpu", policy=DynamicScale(max_scale=2.0**20))
        self.name = name


def test_a_subclass_is_copied_with_what_it_adds():
    for copied in (copy.deepcopy(Named("mine")), pickle.loads(pickle.dumps(Named("mine")))):
        assert type(copied) is Named
        assert copied.name == "mine"
        assert copied.state_dict() == Named("other").state_dict()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_matter(dtype):
    optimizer, param = loop_sgd(torch.full((4,), 2.0))
    torch.set_default_dtype(dtype)
    try:
        norm = ShardedGradScaler("cpu", init_scale=1.0).clip_grad_norm_(optimizer, 1.0)
    finally:
        torch.set_default_dtype(torch.float32)

    assert (norm.dtype, norm.item()) == (torch.float32, 4.0)
    torch.testing.assert_close(param.grad, torch.full((4,), 0.5), rtol=1e-6, atol=0)


def test_a_verdict_handed_out_is_not_the_one_that_steps():
    optimizer, param = loop_sgd(torch.full((2,), math.inf))
    scaler = ShardedGradScaler("cpu")
    scaler.unscale_(optimizer)
    scaler.verdict(optimizer).found_inf.zero_()
    scaler.step(optimizer)

    assert param.tolist() == [0.0, 0.0]
