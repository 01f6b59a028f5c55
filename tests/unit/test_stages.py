"""Which call may follow which, and what ``verdict`` tells."""

from __future__ import annotations

import math

import pytest
import torch

from shardscale import ConfigError, ShardedGradScaler, StageError
from shardscale.stages import as_list
from shardscale.testing import run_ranks


def sgd(value=65536.0, **options):
    param = torch.nn.Parameter(torch.ones(4))
    param.grad = torch.full((4,), value)
    return torch.optim.SGD([param], lr=1.0, **options)


CALLS = {
    "unscale_": lambda s, o: s.unscale_(o),
    "clip_grad_norm_": lambda s, o: s.clip_grad_norm_(o, 1.0),
    "step": lambda s, o: s.step(o),
}
# Which call may follow which on one optimizer, before ``update``.
ALLOWED = {
    ("unscale_", "clip_grad_norm_"),
    ("unscale_", "step"),
    ("clip_grad_norm_", "clip_grad_norm_"),
    ("clip_grad_norm_", "step"),
}


@pytest.mark.parametrize("second", CALLS)
@pytest.mark.parametrize("first", CALLS)
@pytest.mark.parametrize("fused", [False, True])
def test_every_pair_of_calls_is_allowed_or_refused(first, second, fused):
    scaler, optimizer = ShardedGradScaler("cpu"), sgd(fused=fused)
    CALLS[first](scaler, optimizer)
    if (first, second) in ALLOWED:
        CALLS[second](scaler, optimizer)
    else:
        with pytest.raises(StageError):
            CALLS[second](scaler, optimizer)
    scaler.update()
    CALLS[second](scaler, optimizer)


def test_one_optimizer_a_sequence_and_nothing_are_told_apart():
    one, other = sgd(), sgd()
    assert as_list(one) == ([one], True)
    assert as_list([one, other]) == ([one, other], False)
    assert as_list((one,)) == ([one], False)
    assert as_list(o for o in (one, other)) == ([one, other], False)
    assert as_list(()) == ([], False)


@pytest.mark.parametrize(
    "wrong", [None, 3, [None], "ab", torch.nn.Parameter(torch.ones(1))], ids=str
)
def test_what_is_no_optimizer_is_named(wrong):
    with pytest.raises(ConfigError, match="was passed as an optimizer"):
        as_list(wrong)


def test_an_optimizer_named_twice_is_refused():
    one = sgd()
    with pytest.raises(ConfigError, match="named twice"):
        as_list([one, one])


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("value", "found"), [(65536.0, 0.0), (math.inf, 1.0)])
def test_a_verdict_can_be_read_after_every_call(call, value, found):
    scaler, optimizer = ShardedGradScaler("cpu"), sgd(value)
    with pytest.raises(StageError, match="before there is one"):
        scaler.verdict(optimizer)
    CALLS[call](scaler, optimizer)
    verdict = scaler.verdict(optimizer)
    assert verdict.found_inf.item() == found
    assert (verdict.found_inf.shape, verdict.found_inf.dtype) == ((), torch.float32)
    assert (verdict.grad_norm.shape, verdict.grad_norm.dtype) == ((), torch.float32)
    if call != "clip_grad_norm_":
        assert verdict.grad_norm.isnan()
    else:
        assert verdict.grad_norm.item() == (2.0 if not found else math.inf)
    scaler.update()
    with pytest.raises(StageError):
        scaler.verdict(optimizer)


def test_a_verdict_over_several_calls_is_bad_if_one_was():
    scaler, good, bad = ShardedGradScaler("cpu"), sgd(), sgd(math.nan)
    scaler.clip_grad_norm_(good, 1.0)
    scaler.clip_grad_norm_(bad, 1.0)
    verdict = scaler.verdict([good, bad])
    assert verdict.found_inf.item() == 1.0
    assert verdict.grad_norm.isnan()
    assert scaler.verdict(good).found_inf.item() == 0.0


def test_a_joint_clip_has_one_norm_for_its_optimizers():
    scaler, pair = ShardedGradScaler("cpu"), [sgd(3 * 65536.0), sgd(4 * 65536.0)]
    norm = scaler.clip_grad_norm_(pair, 5.0)
    assert norm.item() == scaler.verdict(pair).grad_norm.item() == 10.0
    grads = [o.param_groups[0]["params"][0].grad for o in pair]
    # torch's clip factor is 5 / (10 + 1e-6).
    assert grads[0].tolist() == pytest.approx([1.5] * 4, rel=1e-6)
    assert grads[1].tolist() == pytest.approx([2.0] * 4, rel=1e-6)


@pytest.mark.parametrize("max_norm", [0.5, 2.0, 2.5, 1e-3, 0.0, math.inf])
@pytest.mark.parametrize("disabled", [False, True])
def test_clipping_is_torchs(max_norm, disabled):
    """One rounding more than torch's: there the norm is a float32 when the factor is made."""
    scale = 1.0 if disabled else 8.0
    ours, theirs = sgd(scale), sgd(1.0)
    scaler = ShardedGradScaler("cpu", init_scale=8.0, enabled=not disabled)
    norm = scaler.clip_grad_norm_(ours, max_norm)
    want = torch.nn.utils.clip_grad_norm_(theirs.param_groups[0]["params"], max_norm)
    assert norm.item() == want.item() == 2.0
    got, expected = (o.param_groups[0]["params"][0].grad for o in (ours, theirs))
    torch.testing.assert_close(got, expected, rtol=2e-7, atol=0.0)


@pytest.mark.parametrize(
    "max_norm", [-1.0, math.nan, None, "1", torch.tensor(1j), torch.tensor(-1.0)]
)
def test_a_norm_that_is_none_is_refused_before_anything_happens(max_norm):
    scaler, optimizer = ShardedGradScaler("cpu"), sgd()
    with pytest.raises(ConfigError, match="max_norm is"):
        scaler.clip_grad_norm_(optimizer, max_norm)
    scaler.unscale_(optimizer)


@pytest.mark.parametrize("value", [1e20, 1e30, 3e38])
def test_finite_gradients_have_a_finite_norm_and_are_not_clipped_to_zero(value):
    scaler, optimizer = ShardedGradScaler("cpu", init_scale=1.0), sgd(value)
    norm = scaler.clip_grad_norm_(optimizer, 1.0)
    assert norm.isfinite() and scaler.verdict(optimizer).found_inf.item() == 0.0
    grad = optimizer.param_groups[0]["params"][0].grad
    assert grad.norm().item() == pytest.approx(1.0, rel=1e-6)


def test_a_norm_that_is_not_finite_counts_as_found_before_anything_is_clipped():
    """Squares of 1e200 do not fit float64; without clipping the gradients are good."""
    optimizer = sgd()
    param = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
    param.grad = torch.full((4,), 1e200, dtype=torch.float64)
    optimizer.add_param_group({"params": [param]})
    scaler = ShardedGradScaler("cpu", init_scale=1.0)
    assert scaler.clip_grad_norm_(optimizer, 1.0).item() == math.inf
    assert scaler.verdict(optimizer).found_inf.item() == 1.0
    assert param.grad.tolist() == [1e200] * 4
    scaler.step(optimizer)
    scaler.update()
    assert param.tolist() == [1.0] * 4
    scaler.unscale_(optimizer)
    assert scaler.verdict(optimizer).found_inf.item() == 0.0


def test_reports_tell_each_iteration_in_plain_numbers():
    scaler = ShardedGradScaler("cpu", init_scale=8.0)
    assert scaler.last_report() is None
    optimizer = sgd(8.0)
    scaler.clip_grad_norm_(optimizer, 1.0)
    scaler.step(optimizer)
    scaler.update()
    assert tuple(scaler.last_report()) == (0, 8.0, 8.0, False, 2.0, ())
    scaler.step(sgd(math.inf))
    scaler.update()
    report = scaler.last_report()
    assert report[:4] == (1, 8.0, 4.0, True) and math.isnan(report.grad_norm)


def test_with_a_fused_optimizer_reports_are_one_iteration_behind():
    scaler = ShardedGradScaler("cpu", init_scale=8.0)
    for i in range(3):
        scaler.step(sgd(8.0 if i else math.inf, fused=True))
        scaler.update()
        assert (scaler.last_report().step if i else scaler.last_report()) == (i - 1 if i else None)
    assert scaler.last_report().skipped is False


@pytest.mark.parametrize("fused", [False, True])
def test_every_rank_reports_the_same(fused):
    def rank(comm):
        scaler = ShardedGradScaler("cpu", init_scale=8.0, comm=comm, sync=True)
        for i in range(3):
            scaler.begin()
            scaler.step(sgd(math.inf if (comm.rank, i) == (1, 1) else 8.0, fused=fused))
            scaler.update()
        return scaler.last_report()[:4], dict(scaler.state_dict()["shardscale"])["num_skipped"]

    assert run_ranks(rank, 3) == [((2, 4.0, 4.0, False), 1)] * 3
