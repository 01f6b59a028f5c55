"""Statements 18 to 27: who steps, on what, and how often."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import shardscale
from shardscale import DisagreementError, ShardedGradScaler, StageError
from shardscale.testing import run_ranks
from tests.conformance.side_by_side import (
    BOTH,
    assert_fails_alike,
    assert_same_bits,
    assert_same_optimizers,
    assert_same_scale,
    full,
    grad_of,
    parameter,
    params_of,
    sgd,
)

OPTIMIZERS = {
    "SGD": lambda params, **how: torch.optim.SGD(params, lr=0.1, **how),
    "SGD momentum": lambda params, **how: torch.optim.SGD(
        params, lr=0.1, momentum=0.9, nesterov=True, **how
    ),
    "Adam": lambda params, **how: torch.optim.Adam(params, lr=0.1, amsgrad=True, **how),
    "AdamW": lambda params, **how: torch.optim.AdamW(params, lr=0.1, **how),
    "Adagrad": lambda params, **how: torch.optim.Adagrad(params, lr=0.1, **how),
}
HOW = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


class Recorder:
    """An optimizer of one's own; notes every call of ``step``."""

    def __init__(self, *grads: Tensor | None, returns: Any = None) -> None:
        self.param_groups = [{"params": [parameter(g) for g in grads]}]
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.returns = returns

    def step(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        return self.returns


class FusedRecorder(Recorder):
    """One that takes flag and scale; notes what it finds on itself."""

    _step_supports_amp_scaling = True

    def step(self, *args: Any, **kwargs: Any) -> Any:
        self.seen = (self.grad_scale, self.found_inf, grad_of(self).clone())
        return super().step(*args, **kwargs)


class Legacy(Recorder):
    """One of the older kind, that takes the scaler and asks it."""

    _step_supports_amp_scaling = True

    def __init__(self, *grads: Tensor | None, ask: Callable[[Any, Any], Any]) -> None:
        super().__init__(*grads)
        self.ask = ask

    def step(self, closure: Any = None, *, grad_scaler: Any) -> Any:
        del closure
        self.answers = self.ask(grad_scaler, self)
        return "stepped"


@BOTH
def test_a_good_step_returns_what_the_optimizer_returned_and_passes_arguments_on(make):
    """Contract 18: for a sequence, a list of that."""
    optimizer = Recorder(full(1.0), returns=42)
    scaler = make("cpu")
    scaler.scale(torch.ones(()))
    assert scaler.step(optimizer, 1, lr=2) == 42
    assert optimizer.calls == [((1,), {"lr": 2})]


def test_a_sequence_returns_a_list():
    """Contract 18: in the order of the optimizers, all with the same arguments."""
    pair = [Recorder(full(1.0), returns="a"), Recorder(full(1.0), returns="b")]
    assert ShardedGradScaler("cpu").step(pair, 7) == ["a", "b"]
    assert [optimizer.calls for optimizer in pair] == [[((7,), {})]] * 2


@BOTH
def test_a_bad_step_returns_none_and_is_not_taken(make):
    """Contract 18: the optimizer is not called at all."""
    optimizer = Recorder(full(math.nan), returns=42)
    scaler = make("cpu")
    scaler.scale(torch.ones(()))
    assert scaler.step(optimizer) is None
    assert optimizer.calls == []


@pytest.mark.parametrize("explicit", [False, True], ids=["step", "unscale_, step"])
@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
@pytest.mark.parametrize("kind", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_every_optimizer_moves_as_under_torch_bit_for_bit(kind, how, explicit):
    """Contract 18: good and bad steps mixed; parameters, gradients, state, scale."""
    rng = torch.Generator().manual_seed(3)
    shapes = [(3, 4), (), (0,), (5,)]
    start = [torch.randn(shape, generator=rng) for shape in shapes]

    def job(make):
        params = [torch.nn.Parameter(t.clone()) for t in start]
        optimizer = kind([{"params": params[:2]}, {"params": params[2:], "lr": 0.01}], **how)
        return make("cpu", init_scale=48.0, growth_interval=2), optimizer

    (theirs, one), (ours, other) = job(torch.amp.GradScaler), job(ShardedGradScaler)
    for i, good in enumerate([True, True, False, True, False, False, True, True, True]):
        grads = [torch.randn(shape, generator=rng) * 48 for shape in shapes]
        if not good:
            grads[i % 2].view(-1)[-1] = math.nan
        for scaler, optimizer in ((theirs, one), (ours, other)):
            for param, grad in zip(params_of(optimizer), grads, strict=True):
                param.grad = grad.clone()
            before = [p.detach().clone() for p in params_of(optimizer)]
            scaler.scale(torch.ones(()))
            if explicit:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            moved = [
                not torch.equal(p, b) for p, b in zip(params_of(optimizer), before, strict=True)
            ]
            assert moved == [good, good, False, good]
        assert_same_optimizers(one, other)
        assert_same_scale(theirs, ours)


def test_stepping_twice_is_torchs_error():
    """Contract 19: until ``update``."""
    theirs, ours = torch.amp.GradScaler("cpu"), ShardedGradScaler("cpu")
    one, other = sgd(full(1.0)), sgd(full(1.0))
    theirs.scale(torch.ones(()))
    theirs.step(one)
    ours.step(other)
    text = "step() has already been called since the last update()."
    assert_fails_alike(lambda: theirs.step(one), lambda: ours.step(other), text, RuntimeError)
    ours.update()
    ours.step(other)


CLOSURES = {
    "keyword": ((), {"closure": lambda: 1.0}),
    "keyword None": ((), {"closure": None}),
    "position": ((lambda: 1.0,), {}),
}


@pytest.mark.parametrize(("args", "kwargs"), CLOSURES.values(), ids=CLOSURES)
def test_a_closure_is_refused_before_anything_happens(args, kwargs):
    """Contract 20: torch takes one by position, and runs it on scaled gradients or not at all."""
    theirs, ours = torch.amp.GradScaler("cpu"), ShardedGradScaler("cpu")
    one, other = sgd(full(65536.0)), sgd(full(65536.0))
    theirs.scale(torch.ones(()))
    if kwargs:
        text = "Closure use is not currently supported if GradScaler is enabled."
        assert_fails_alike(
            lambda: theirs.step(one, *args, **kwargs),
            lambda: ours.step(other, *args, **kwargs),
            text,
            RuntimeError,
        )
    else:
        assert theirs.step(one, *args) == 1.0
        with pytest.raises(RuntimeError, match=r"^Closure use is not currently supported"):
            ours.step(other, *args)
    assert grad_of(other).tolist() == [65536.0] * 4
    ours.step(other)


@BOTH
def test_none_by_position_passes(make):
    """Contract 20: Accelerate calls it so."""
    optimizer = sgd(full(65536.0))
    scaler = make("cpu")
    scaler.scale(torch.ones(()))
    scaler.step(optimizer, None)
    assert params_of(optimizer)[0].tolist() == [0.0] * 4


@pytest.mark.parametrize("before", ["nothing", "unscale_", "clip_grad_norm_"])
@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_gradients_are_unscaled_exactly_once(how, before):
    """Contract 21: whichever call does it."""
    optimizer = sgd(full(8.0), **how)
    scaler = ShardedGradScaler("cpu", init_scale=8.0)
    if before == "unscale_":
        scaler.unscale_(optimizer)
    if before == "clip_grad_norm_":
        scaler.clip_grad_norm_(optimizer, math.inf)
    scaler.step(optimizer)
    assert params_of(optimizer)[0].tolist() == [0.0] * 4
    assert grad_of(optimizer).tolist() == [1.0] * 4


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_after_unscaling_clipping_does_not_unscale_again(how):
    """Contract 21: nor does the step after it."""
    optimizer = sgd(full(8.0), **how)
    scaler = ShardedGradScaler("cpu", init_scale=8.0)
    scaler.unscale_(optimizer)
    assert scaler.clip_grad_norm_(optimizer, math.inf).item() == 2.0
    scaler.step(optimizer)
    assert params_of(optimizer)[0].tolist() == [0.0] * 4


@BOTH
def test_what_happens_to_gradients_after_unscaling_is_the_callers_business(make):
    """Contract 21: the verdict is made; a test of torch's own says so, too."""
    optimizer = sgd(full(1.0))
    scaler = make("cpu")
    scaler.scale(torch.ones(()))
    scaler.unscale_(optimizer)
    grad_of(optimizer).fill_(math.inf)
    scaler.step(optimizer)
    assert params_of(optimizer)[0].isinf().all()


@BOTH
def test_a_fused_optimizer_sees_flag_and_scale_during_its_step_only(make):
    """Contract 22: it is called on a skip, too, on gradients that are still scaled."""
    for value, flag in ((4.0, 0.0), (math.inf, 1.0)):
        optimizer = FusedRecorder(full(value))
        scaler = make("cpu", init_scale=8.0)
        scaler.scale(torch.ones(()))
        scaler.step(optimizer)
        grad_scale, found_inf, grad = optimizer.seen
        assert (grad_scale.item(), grad_scale.shape, grad_scale.dtype) == (8.0, (), torch.float32)
        assert (found_inf.item(), found_inf.shape, found_inf.dtype) == (flag, (), torch.float32)
        assert grad.tolist() == [value] * 4
        assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")


def test_flag_and_scale_are_gone_after_a_step_that_raised():
    """Contract 22: torch leaves them, and the next step would multiply by the scale twice."""

    class Raising(FusedRecorder):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            raise KeyError("a bug of the optimizer's")

    optimizer = Raising(full(1.0))
    with pytest.raises(KeyError):
        ShardedGradScaler("cpu").step(optimizer)
    assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")


@BOTH
@pytest.mark.parametrize("own", [None, 3.0])
def test_after_explicit_unscaling_grad_scale_is_the_users_own_or_none(make, own):
    """Contract 22: the scale must not be divided out again."""
    optimizer = FusedRecorder(full(16.0))
    scaler = make("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    scaler.unscale_(optimizer)
    if own is not None:
        optimizer.grad_scale = torch.tensor(own)
    scaler.step(optimizer)
    grad_scale, found_inf, grad = optimizer.seen
    assert grad_scale is None if own is None else grad_scale.item() == own
    assert found_inf.item() == 0.0
    assert grad.tolist() == [2.0] * 4


@pytest.mark.parametrize("kind", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_after_a_fused_skip_nothing_has_moved_and_gradients_stay_scaled(kind):
    """Contract 22: parameters and step count; a good step afterwards counts as the second."""
    param = parameter(full(8.0))
    optimizer = kind([param], fused=True)
    scaler = ShardedGradScaler("cpu", init_scale=8.0)
    scaler.step(optimizer)
    scaler.update()
    before = param.detach().clone()
    steps = optimizer.state[param].get("step", torch.zeros(())).clone()
    param.grad = full(8.0)
    param.grad[2] = math.inf
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(param, before)
    assert torch.equal(optimizer.state[param].get("step", torch.zeros(())), steps)
    assert param.grad.tolist() == [8.0, 8.0, math.inf, 8.0]


@BOTH
def test_an_existing_grad_scale_is_multiplied_in(make):
    """Contract 23: gradients that the user has scaled, too."""
    optimizer = FusedRecorder(full(16.0))
    optimizer.grad_scale = torch.tensor(3.0)
    scaler = make("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    assert optimizer.seen[0].item() == 24.0
    assert not hasattr(optimizer, "grad_scale")


def asks(scaler: Any, optimizer: Any) -> list[float]:
    first = [f.item() for f in scaler._check_inf_per_device(optimizer).values()]
    return first + [f.item() for f in scaler._found_inf_per_device(optimizer).values()]


@BOTH
@pytest.mark.parametrize(("value", "flag"), [(1.0, 0.0), (math.inf, 1.0)])
def test_a_legacy_optimizer_is_handed_the_scaler_and_asks_it(make, value, flag):
    """Contract 24: with torch's FutureWarning, at the caller's line."""
    optimizer = Legacy(full(value), ask=asks)
    scaler = make("cpu")
    scaler.scale(torch.ones(()))
    with pytest.warns(FutureWarning, match="^GradScaler is going to stop passing") as caught:
        assert scaler.step(optimizer) == "stepped"
    assert caught[0].filename == __file__
    assert optimizer.answers == [flag, flag]
    assert grad_of(optimizer).tolist() == [value] * 4
    scaler.update()
    assert scaler.get_scale() == (32768.0 if flag else 65536.0)


def test_a_legacy_optimizer_that_asks_twice_sends_once():
    """Contract 24: the first question is the collective; on two ranks, one of them bad."""

    def rank(comm):
        def ask(scaler, optimizer):
            scaler._check_inf_per_device(optimizer)
            return asks(scaler, optimizer)

        optimizer = Legacy(full(math.inf if comm.rank else 1.0), ask=ask)
        scaler = ShardedGradScaler("cpu", comm=comm)
        scaler.step(optimizer)
        scaler.update()
        return optimizer.answers, comm.num_reduces, scaler.get_scale()

    with pytest.warns(FutureWarning):
        outcomes = run_ranks(rank, 2)
    assert outcomes == [([1.0, 1.0], 1, 32768.0)] * 2


@BOTH
@pytest.mark.parametrize("before", [False, True], ids=["in its step", "before its step"])
def test_a_legacy_optimizer_may_have_its_gradients_unscaled(make, before):
    """Contract 24: by ``unscale_``, called by itself or by the training loop."""

    def ask(scaler, optimizer):
        if not before:
            scaler.unscale_(optimizer)
        return grad_of(optimizer)[0].item()

    optimizer = Legacy(full(8.0), ask=ask)
    scaler = make("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    if before:
        scaler.unscale_(optimizer)
    with pytest.warns(FutureWarning):
        scaler.step(optimizer)
    assert optimizer.answers == 1.0
    scaler.update()


def test_a_legacy_optimizer_that_never_asks_is_an_error_on_every_rank():
    """Contract 24: it may have stepped on Inf."""

    def rank(comm):
        never = comm.rank == 1
        optimizer = Legacy(full(1.0), ask=(lambda *_: None) if never else asks)
        scaler = ShardedGradScaler("cpu", comm=comm, sync=True)
        scaler.step(optimizer)

    with pytest.warns(FutureWarning):
        one, other = run_ranks(rank, 2)
    assert isinstance(one, DisagreementError) and "StageError" in str(one)
    assert isinstance(other, StageError) and "without having asked" in str(other)


def test_each_call_has_its_own_verdict_and_the_scale_backs_off_once():
    """Contract 25: the bad optimizers skip, the others step, as under torch."""
    grads = [full(1.0), full(math.inf), full(1.0), full(math.nan)]
    jobs = []
    for make in (torch.amp.GradScaler, ShardedGradScaler):
        scaler, optimizers = (
            make("cpu"),
            [sgd(g.clone(), fused=i == 2) for i, g in enumerate(grads)],
        )
        scaler.scale(torch.ones(()))
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        jobs.append((scaler, optimizers))
    (theirs, ones), (ours, others) = jobs
    assert_same_scale(theirs, ours)
    assert ours.get_scale() == 32768.0
    for one, other in zip(ones, others, strict=True):
        assert_same_optimizers(one, other)


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
@pytest.mark.parametrize("bad", [None, 0, 1])
def test_a_sequence_has_one_verdict_and_all_step_or_all_skip(bad, how):
    """Contract 25: on two ranks, with one all-reduce."""

    def rank(comm):
        pair = [sgd(full(8.0), **how), sgd(full(8.0))]
        if comm.rank == 1 and bad is not None:
            grad_of(pair[bad])[3] = math.inf
        scaler = ShardedGradScaler("cpu", init_scale=8.0, comm=comm)
        scaler.step(pair)
        scaler.update()
        return [params_of(o)[0].tolist() for o in pair], comm.num_reduces, scaler.get_scale()

    value, scale = (0.0, 8.0) if bad is None else (1.0, 4.0)
    assert run_ranks(rank, 2) == [([[value] * 4] * 2, 1, scale)] * 2


def test_a_sequence_of_judged_optimizers_sends_nothing_and_skips_if_either_is_bad():
    """Contract 25: verdicts of ``unscale_`` and of ``clip_grad_norm_`` count."""

    def rank(comm):
        model = torch.nn.ParameterList([torch.ones(4)])
        model[0].grad = full(math.inf)
        good, bad = sgd(full(8.0), fused=True), torch.optim.SGD(model, lr=1.0)
        scaler = ShardedGradScaler("cpu", init_scale=8.0, comm=comm)
        scaler.attach(model, copies=shardscale.distinct)
        scaler.unscale_(good)
        scaler.clip_grad_norm_(bad, 1.0)
        scaler.step([good, bad])
        return [params_of(o)[0].tolist() for o in (good, bad)], comm.num_reduces

    assert run_ranks(rank, 2) == [([[1.0] * 4] * 2, 2)] * 2


def test_a_sequence_in_which_only_some_have_a_verdict_is_refused():
    """Contract 25: nobody could say which verdict counts."""
    scaler, (one, other) = ShardedGradScaler("cpu"), (sgd(full(1.0)), sgd(full(1.0)))
    scaler.unscale_(one)
    for call in (scaler.step, lambda pair: scaler.clip_grad_norm_(pair, 1.0)):
        with pytest.raises(StageError, match="only some have a verdict"):
            call([one, other])


def test_a_rank_without_optimizers_joins_with_an_empty_sequence():
    """Contract 25: one call for one call; its scale moves with the others'."""

    def rank(comm):
        mine = [sgd(full(math.inf))] if comm.rank == 0 else []
        scaler = ShardedGradScaler("cpu", comm=comm)
        scaler.unscale_(mine)
        returned = scaler.step(mine)
        scaler.update()
        scaler.step(mine)
        scaler.update()
        return returned, comm.num_reduces, scaler.get_scale()

    assert run_ranks(rank, 3) == [(None, 2, 16384.0)] * 3


def test_each_empty_unscaling_lets_one_empty_step_send_nothing():
    """Contract 25: two calls, then two steps; a third one sends."""

    def rank(comm):
        mine = [sgd(full(8.0)), sgd(full(8.0))] if comm.rank == 0 else [(), ()]
        scaler = ShardedGradScaler("cpu", init_scale=8.0, comm=comm)
        for each in mine:
            scaler.unscale_(each)
        for each in mine:
            scaler.step(each)
        sent = comm.num_reduces
        scaler.step(sgd(full(8.0)) if comm.rank == 0 else ())
        scaler.update()
        return sent, comm.num_reduces, scaler._growth_tracker.item()

    assert run_ranks(rank, 2) == [(2, 3, 1)] * 2


@pytest.mark.parametrize("fused", [False, True])
def test_different_numbers_of_calls_are_an_error_on_all_and_nothing_moves(fused):
    """Contract 25: rank 1 owns two optimizers, and steps them one by one."""
    moved = {}

    def rank(comm):
        optimizers = [sgd(full(65536.0), fused=fused) for _ in range(1 + comm.rank)]
        moved[comm.rank] = optimizers
        scaler = ShardedGradScaler("cpu", comm=comm, timeout_s=5.0)
        for _ in range(5):
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()

    outcomes = run_ranks(rank, 2, timeout_s=5.0)
    assert [type(o) for o in outcomes] == [DisagreementError] * 2, outcomes
    # The first call of the first iteration is the same on both; from the second on, nothing.
    assert params_of(moved[0][0])[0].tolist() == [0.0] * 4
    assert params_of(moved[1][0])[0].tolist() == [0.0] * 4
    assert params_of(moved[1][1])[0].tolist() == [1.0] * 4


def container(optimizers):
    """What some frameworks build around several optimizers."""

    class Container:
        def __init__(self):
            self.param_groups = [group for o in optimizers for group in o.param_groups]

        def step(self):
            return [o.step() for o in optimizers]

    return Container()


def namespace(optimizers):
    [one] = optimizers
    return types.SimpleNamespace(
        param_groups=one.param_groups, step=one.step, _step_supports_amp_scaling=False
    )


def fused_namespace(optimizers):
    proxy = namespace(optimizers)
    proxy._step_supports_amp_scaling = True
    proxy.step = lambda: setattr(proxy, "seen", proxy.found_inf.item())
    return proxy


@BOTH
@pytest.mark.parametrize("wrap", [container, namespace])
def test_a_container_of_optimizers_works_as_one(make, wrap):
    """Contract 25: it need not be a torch.optim.Optimizer, nor have a class of its own."""
    inner = sgd(full(8.0))
    optimizer = wrap([inner])
    scaler = make("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    scaler.update()
    assert params_of(inner)[0].tolist() == [0.0] * 4


@BOTH
def test_a_container_may_be_fused(make):
    """Contract 25: whether its step takes the scaler is asked of the step that will be called."""
    optimizer = fused_namespace([sgd(full(math.inf))])
    scaler = make("cpu")
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    assert optimizer.seen == 1.0


@pytest.mark.parametrize(("value", "moved"), [(65536.0, 0.0), (math.inf, 1.0)])
def test_a_rank_without_gradients_joins_and_gets_the_verdict(value, moved):
    """Contract 26: a parameter of its own, unused in this iteration."""

    def rank(comm):
        optimizer = sgd(full(value) if comm.rank == 0 else None)
        scaler = ShardedGradScaler("cpu", comm=comm)
        scaler.step(optimizer)
        found_inf = scaler.verdict(optimizer).found_inf.item()
        scaler.update()
        return params_of(optimizer)[0][0].item(), found_inf, scaler._growth_tracker.item()

    found = float(value == math.inf)
    assert run_ranks(rank, 2) == [(moved, found, 1 - found), (1.0, found, 1 - found)]


def test_no_gradient_on_any_rank_is_a_good_step():
    """Contract 26: the optimizers find nothing to do."""

    def rank(comm):
        optimizer = Recorder(None)
        scaler = ShardedGradScaler("cpu", comm=comm)
        scaler.step(optimizer)
        scaler.update()
        return len(optimizer.calls), scaler._growth_tracker.item()

    assert run_ranks(rank, 2) == [(1, 1)] * 2


@pytest.mark.parametrize("explicit", [False, True], ids=["step", "unscale_, step"])
def test_alone_a_step_without_gradients_is_torchs_assertion(explicit):
    """Contract 26: kept for a job of one rank; also for one parameter that is None."""
    theirs, ours = torch.amp.GradScaler("cpu"), ShardedGradScaler("cpu")
    one, other = sgd(None), sgd(None)
    theirs.scale(torch.ones(()))
    if explicit:
        theirs.unscale_(one)
        ours.unscale_(other)
    text = "No inf checks were recorded for this optimizer."
    assert_fails_alike(lambda: theirs.step(one), lambda: ours.step(other), text, AssertionError)


def test_alone_a_fused_step_without_gradients_is_torchs():
    """Contract 26: the step passes, the update asserts."""
    theirs, ours = torch.amp.GradScaler("cpu"), ShardedGradScaler("cpu")
    one, other = sgd(None, fused=True), sgd(None, fused=True)
    theirs.scale(torch.ones(()))
    theirs.step(one)
    ours.step(other)
    text = "No inf checks were recorded prior to update."
    assert_fails_alike(theirs.update, ours.update, text, AssertionError)


@pytest.mark.parametrize("foreach", [False, True])
def test_fused_sgd_whose_first_step_was_skipped_starts_clean(foreach):
    """Contract 27: as an SGD that is not fused, and so never saw the bad gradient."""
    fused = sgd(full(math.inf), lr=0.1, momentum=0.9, fused=True)
    plain = sgd(full(math.inf), lr=0.1, momentum=0.9, foreach=foreach)
    for optimizer in (fused, plain):
        scaler = ShardedGradScaler("cpu", init_scale=8.0)
        for value in (math.inf, math.nan, 4.0, 2.0):
            params_of(optimizer)[0].grad = full(value)
            scaler.step(optimizer)
            scaler.update()
    assert_same_bits(params_of(plain)[0].data, params_of(fused)[0].data)
    assert_same_bits(
        plain.state[params_of(plain)[0]]["momentum_buffer"],
        fused.state[params_of(fused)[0]]["momentum_buffer"],
    )


def test_torchs_fused_sgd_keeps_an_uninitialised_momentum_buffer():
    """Contract 27: the day this fails, torch initialises it."""
    optimizer = sgd(full(math.inf), momentum=0.9, fused=True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    assert optimizer.state[params_of(optimizer)[0]]["momentum_buffer"] is not None


def test_a_later_skip_keeps_the_momentum():
    """Contract 27: only a buffer that this very step made is dropped."""
    optimizer = sgd(full(8.0), momentum=0.9, fused=True)
    scaler = ShardedGradScaler("cpu", init_scale=8.0)
    for value in (8.0, math.inf):
        params_of(optimizer)[0].grad = full(value)
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.state[params_of(optimizer)[0]]["momentum_buffer"].tolist() == [1.0] * 4
