"""`fold_clip=True`: a fused optimizer clips in its own pass, and all else stays as it was."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from functools import partial

import pytest
import torch

from shardscale import (
    DisagreementError,
    LayoutError,
    ShardedGradScaler,
    distinct,
    skip_on_device,
)
from shardscale.testing import run_ranks
from tests.ranks.models import equal, lay_out, local_grads, spoil, whole_bits

INF = math.inf
SCALE = 8.0
FUSED = {
    "SGD": partial(torch.optim.SGD, lr=0.5, momentum=0.5, fused=True),
    "Adam": partial(torch.optim.Adam, lr=0.5, fused=True),
    "AdamW": partial(torch.optim.AdamW, lr=0.5, fused=True),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.5, fused=True),
}
# The factor is rounded once more on its way through grad_scale, and the quotient once.
ROUNDING = 2.0**-21


class Job:
    """Two parameters whose gradients are [3, 0] and [0, 4], so the norm is 5; scaled by 8."""

    def __init__(self, make=FUSED["SGD"], fold=True, dtype=torch.float32, **options):
        self.params = [torch.nn.Parameter(torch.ones(2, dtype=dtype)) for _ in range(2)]
        self.optimizer = make(self.params)
        self.scaler = ShardedGradScaler("cpu", init_scale=SCALE, fold_clip=fold, **options)
        self.begin()

    def begin(self, factor=1.0):
        self.scaler.begin()
        for p, values in zip(self.params, ([3.0, 0.0], [0.0, 4.0]), strict=True):
            p.grad = torch.tensor(values, dtype=p.dtype) * SCALE * factor

    def close(self):
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def values(self):
        return [value for p in self.params for value in p.tolist()]


def steps_of(fold, make, max_norms, calls=("clip",), bad_at=None):
    """Values after each iteration, and the norms that were returned."""
    job = Job(make, fold)
    found = []
    for i, max_norm in enumerate(max_norms):
        job.begin(factor=INF if i == bad_at else 1.0 + i)
        if "unscale_" in calls:
            job.scaler.unscale_(job.optimizer)
        norms = [job.scaler.clip_grad_norm_(job.optimizer, max_norm) for c in calls if c == "clip"]
        job.close()
        found.append((job.values(), [norm.item() for norm in norms], job.scaler.get_scale()))
        job.scaler.update(SCALE)
    return found


@pytest.mark.parametrize("calls", [("clip",), ("unscale_", "clip"), ("clip", "clip")], ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_folding_gives_what_clipping_in_place_gives(name, calls):
    """Iterations with and without clipping, one that is skipped, one that clips to nothing."""
    max_norms = [1.0, INF, 1.0, 2.5, 0.0, 1.0]
    folded, in_place = (steps_of(f, FUSED[name], max_norms, calls, bad_at=2) for f in (True, False))
    for (values, norms, scale), (want, their_norms, their_scale) in zip(
        folded, in_place, strict=True
    ):
        assert values == pytest.approx(want, rel=ROUNDING, abs=ROUNDING)  # they began at 1
        assert norms == pytest.approx(their_norms, rel=ROUNDING, nan_ok=True)
        assert scale == their_scale
    assert folded[1][0] == folded[2][0], "the bad step was not skipped"
    assert folded[2][2] == SCALE / 2


def test_gradients_stay_scaled_until_the_step_which_divides_them_once():
    """By 8 / 0.2: the norm of 5 becomes 1. torch's fused SGD writes what it has divided."""
    job = Job()
    before = [p.grad.clone() for p in job.params]
    norm = job.scaler.clip_grad_norm_(job.optimizer, 1.0)
    assert norm.item() == 5.0
    assert all(map(torch.equal, before, [p.grad for p in job.params]))
    job.close()
    left = torch.cat([p.grad for p in job.params]).tolist()
    assert left == pytest.approx([0.6, 0.0, 0.0, 0.8], rel=1e-6)  # torch adds 1e-6 to the norm
    assert job.values() == pytest.approx([1 - 0.3, 1, 1, 1 - 0.4], rel=1e-6)


def test_an_optimizer_that_is_not_fused_is_clipped_in_place():
    for make in (
        partial(torch.optim.SGD, lr=0.5, foreach=True),
        lambda params: skip_on_device(torch.optim.SGD(params, lr=0.5)),
    ):
        job = Job(make)
        job.scaler.clip_grad_norm_(job.optimizer, 1.0)
        grads = torch.cat([p.grad for p in job.params]).tolist()
        assert grads == pytest.approx([0.6, 0.0, 0.0, 0.8], rel=1e-6)
        job.close()
        assert job.values() == pytest.approx([0.7, 1, 1, 0.6], rel=1e-6)


def test_fused_and_other_optimizers_are_clipped_by_one_factor():
    job, other = Job(), Job(partial(torch.optim.SGD, lr=0.5))
    norm = job.scaler.clip_grad_norm_([job.optimizer, other.optimizer], 1.0)
    assert norm.item() == pytest.approx(math.sqrt(50), rel=ROUNDING)
    job.scaler.step([job.optimizer, other.optimizer])
    assert job.values() == pytest.approx(other.values(), rel=ROUNDING)
    assert job.values()[0] == pytest.approx(1 - 0.5 * 3 / math.sqrt(50), rel=1e-6)


def test_a_clip_is_not_lost_when_an_update_comes_before_the_step():
    """The scale of the update must not come in, and the second verdict must not unscale again."""
    job = Job()
    job.scaler.clip_grad_norm_(job.optimizer, 1.0)
    job.scaler.update(2 * SCALE)
    job.close()
    assert job.values() == pytest.approx([0.7, 1, 1, 0.6], rel=1e-6)


@pytest.mark.parametrize(
    ("scale", "scaled", "max_norm", "numel", "dtype"),
    [
        (65536.0, 3e37, 1.0, 10**5, torch.float32),
        (1.0, 1e38, 1.0, 10**4, torch.float32),
        (1.0, 1e38, 0.1, 5, torch.float32),
        (65536.0, 1e36, 0.0, 5, torch.float32),
        (65536.0, 1e60, 1.0, 5, torch.float64),
        (1.0, 3e38, 1e-30, 5, torch.bfloat16),
    ],
)
def test_a_divisor_that_float32_does_not_hold_clips_all_the_same(
    scale, scaled, max_norm, numel, dtype
):
    """Scale over factor is beyond 3.4e38: a part of it is multiplied at once."""
    moved = []
    for fold in (True, False):
        param = torch.nn.Parameter(torch.zeros(numel, dtype=dtype))
        param.grad = torch.full_like(param, scaled)
        optimizer = torch.optim.SGD([param], lr=1.0, fused=True)
        scaler = ShardedGradScaler("cpu", init_scale=scale, fold_clip=fold)
        scaler.clip_grad_norm_(optimizer, max_norm)
        scaler.step(optimizer)
        scaler.update()
        moved.append(param.detach().double().norm().item())
    # Far below 1 the parts are denormal, of which float32 holds few digits.
    assert moved[0] == pytest.approx(moved[1], rel=1e-2, abs=1e-37)
    assert moved[0] <= 1.01 * max_norm


def test_an_update_raises_nothing_that_other_ranks_do_not_know_of():
    """A gradient goes bad between clip and update: the next verdict tells all ranks of it."""

    def rank(comm):
        jobs = [Job(comm=comm, sync=True), Job()]
        scaler = jobs[0].scaler
        scaler.attach(torch.nn.ParameterList(jobs[0].params + jobs[1].params), copies=distinct)
        scaler.clip_grad_norm_([job.optimizer for job in jobs], 1.0)
        scaler.step(jobs[0].optimizer)
        if comm.rank == 1:
            jobs[1].params[1].grad.untyped_storage().resize_(0)
        scaler.update()
        scales = scaler.get_scale()
        error = LayoutError if comm.rank == 1 else DisagreementError
        with pytest.raises(error, match="no memory"):
            scaler.clip_grad_norm_(jobs[1].optimizer, 1.0)
        return scales, jobs[1].values()

    assert run_ranks(rank, 2) == [(SCALE, [1.0] * 4)] * 2


def test_an_update_after_a_bad_clip_still_skips_the_step():
    job = Job()
    job.begin(INF)
    job.scaler.clip_grad_norm_(job.optimizer, 1.0)
    job.scaler.update()
    job.close()
    assert job.values() == [1.0] * 4


def test_a_factor_of_an_optimizer_s_own_is_kept():
    job = Job()
    job.optimizer.grad_scale = torch.tensor(2.0)  # its gradients are twice as large
    job.scaler.clip_grad_norm_(job.optimizer, 5.0)
    job.close()
    assert job.values() == pytest.approx([1 - 0.75, 1, 1, 0], rel=1e-6, abs=1e-6)


def test_a_tensor_for_a_limit_folds_too():
    job = Job()
    job.scaler.clip_grad_norm_(job.optimizer, torch.tensor(1.0))
    job.close()
    assert job.values() == pytest.approx([0.7, 1, 1, 0.6], rel=1e-6)


def test_a_disabled_scaler_clips_in_place():
    """Its step calls the optimizer's own, which would know nothing of a factor."""
    job = Job(enabled=False)
    job.begin(1 / SCALE)
    job.scaler.clip_grad_norm_(job.optimizer, 1.0)
    job.close()
    assert job.values() == pytest.approx([0.7, 1, 1, 0.6], rel=1e-6)


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_copy_folds_too(make_copy):
    job = Job()
    job.scaler = make_copy(job.scaler)
    job.begin()
    before = job.params[0].grad.clone()
    job.scaler.clip_grad_norm_(job.optimizer, 1.0)
    assert torch.equal(job.params[0].grad, before)


def test_ranks_that_fold_and_ranks_that_do_not_disagree():
    """They would round differently, and copies of a parameter drift apart."""

    def rank(comm):
        job = Job(fold=comm.rank == 1, comm=comm, sync=True)
        job.scaler.attach(torch.nn.ParameterList(job.params), copies=lambda *_: range(comm.size))
        with pytest.raises(DisagreementError, match="'clip_grad_norm_ with fold_clip' on rank 1"):
            job.scaler.clip_grad_norm_(job.optimizer, 1.0)
        return job.values()

    assert run_ranks(rank, 3) == [[1.0] * 4] * 3


def train(rank, size, name, fold):
    """Four steps of which one is bad; everything this rank ends with."""
    laid = lay_out(name, size)
    optimizer = FUSED["AdamW"](laid.model.parameters())
    scaler = ShardedGradScaler("cpu", init_scale=SCALE, fold_clip=fold)
    scaler.attach(laid.model, copies=laid.copies)
    norms, moved = [], []
    for step in range(4):
        laid.backward(scaler, step=step)
        if step == 2:
            spoil(laid.model, rank, size - 1, INF)
        before = whole_bits(laid)
        grads = [g.clone() for g in local_grads(laid.model)]
        norms.append(scaler.clip_grad_norm_(optimizer, 0.25).item())
        left_alone = all(map(torch.equal, grads, local_grads(laid.model)))
        scaler.step(optimizer)
        scaler.update()
        moved.append((left_alone or not grads, not equal(before, whole_bits(laid))))
        optimizer.zero_grad()
    return norms, moved, torch.cat([t.flatten() for t in laid.whole().values()]).tolist()


@pytest.mark.parametrize("name", ["DDP", "FSDP1 FULL_SHARD original", "FSDP2"])
def test_sharded_training_folds_and_skips_together(ranks, name):
    """Contract 51: see the name."""
    folded, in_place = (ranks.run(train, 3, name=name, fold=fold) for fold in (True, False))
    for (norms, moved, values), (their_norms, _, want) in zip(folded, in_place, strict=True):
        assert [alone for alone, _ in moved] == [True] * 4
        assert [has_moved for _, has_moved in moved] == [True, True, False, True]
        assert norms == pytest.approx(their_norms, rel=1e-5, nan_ok=True)
        # AdamW divides by the root of squares: an error of the gradient comes through relatively.
        assert values == pytest.approx(want, rel=1e-4, abs=1e-5)
    for one, other in itertools.pairwise(folded):
        assert one[0] == pytest.approx(other[0], nan_ok=True)
