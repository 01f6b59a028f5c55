"""Accumulation over micro-batches: one verdict, and one step or skip, for all of them."""

from __future__ import annotations

import math

import pytest
import torch

from shardscale import ShardedGradScaler
from tests.ranks.counting import count_collectives
from tests.ranks.models import (
    equal,
    held_back,
    lay_out,
    local,
    make_net,
    reference_grads,
    whole_bits,
)

SCALE = 8.0
NUM_MICRO = 3
OPTIMIZERS = {
    "plain": lambda params: torch.optim.SGD(params, lr=0.5, momentum=0.5, foreach=False),
    "foreach": lambda params: torch.optim.SGD(params, lr=0.5, momentum=0.5, foreach=True),
    "fused": lambda params: torch.optim.AdamW(params, lr=0.5, fused=True),
}
LAYOUTS = [
    "DDP",
    "FSDP1 FULL_SHARD flat",
    "FSDP1 FULL_SHARD original",
    "FSDP1 SHARD_GRAD_OP flat",
    "FSDP1 SHARD_GRAD_OP original",
    "FSDP2",
]
WAYS = [(kind, clips) for clips in (False, True) for kind in OPTIMIZERS]
"""Kind of optimizer, and whether `clip_grad_norm_` is called before `step`."""
ROUNDING = 2.0**-22
"""Relative, of a norm: see `test_every_layout.py`."""


class Spoiling:
    """In the scaler's place for one micro-batch: its loss overflows."""

    def __init__(self, scaler):
        self.scaler = scaler

    def scale(self, loss):
        return self.scaler.scale(loss * math.inf)


class Absent:
    """In the scaler's place to see what is sent without one."""

    def scale(self, loss):
        return loss


class Accumulation:
    """The network in one layout, trained by steps of three micro-batches."""

    def __init__(self, rank, size, name):
        self.rank, self.bad_rank = rank, size // 2
        self.laid = lay_out(name, size)
        self.params = list(self.laid.model.parameters())
        self.first = [local(p).clone() for p in self.params]

    def start(self, kind):
        """An optimizer and a scaler without history; the weights are whole numbers again."""
        for p, values in zip(self.params, self.first, strict=True):
            local(p).copy_(values)
        self.optimizer = OPTIMIZERS[kind](self.params)
        self.optimizer.zero_grad()
        self.scaler = ShardedGradScaler("cpu", init_scale=SCALE, model=self.laid.model)

    def backward(self, scaler, spoilt=None):
        """All micro-batches; of the one numbered ``spoilt`` the loss overflows on one rank."""
        for micro in range(NUM_MICRO):
            is_spoilt = micro == spoilt and self.rank == self.bad_rank
            chosen = Spoiling(scaler) if is_spoilt else scaler
            if micro < NUM_MICRO - 1:
                with held_back(self.laid.model):
                    self.laid.backward(chosen, micro)
            else:
                self.laid.backward(chosen, micro)

    def step(self, clips):
        """What ends an iteration; the norm, if it clips."""
        norm = self.scaler.clip_grad_norm_(self.optimizer, 1e6).item() if clips else None
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return norm

    def collectives(self, kind, clips):
        """How many are sent in a whole step, with the scaler and without one."""
        self.start(kind)
        with count_collectives() as with_scaler:
            self.backward(self.scaler)
            self.step(clips)
        self.start(kind)
        with count_collectives() as without:
            self.backward(Absent())
            self.optimizer.step()
        return with_scaler.num, without.num


def accumulate(rank, size):
    """All layouts, one after the other: a spawn costs more than most of them."""
    return {name: examine(Accumulation(rank, size, name), size) for name in LAYOUTS}


def examine(job, size):
    """For each way a good step, and one of which one micro-batch overflows on one rank.

    What does not depend on the number of ranks is seen on two of them.
    """
    good, spoilt = {}, {}
    ways = WAYS if size == 2 else WAYS[size - 3 :: 4]
    for i, (kind, clips) in enumerate(ways):
        job.start(kind)
        job.backward(job.scaler)
        norm = job.step(clips)
        good[kind, clips] = norm, job.scaler.get_scale(), job.laid.whole()
        job.start(kind)
        before = whole_bits(job.laid)
        job.backward(job.scaler, spoilt=(i + i // 3 + size) % NUM_MICRO)
        job.step(clips)
        untouched = equal(before, whole_bits(job.laid))
        spoilt[kind, clips] = untouched, job.scaler.get_scale(), job.scaler.state_dict()
    return good, spoilt, [job.collectives(*way) for way in ways[::5]], job.laid.num_batches


@pytest.fixture(scope="module")
def accumulated(ranks):
    """``accumulated(name, size)`` gives the findings of each rank; each size is spawned once."""
    known = {}

    def get(name, size):
        if size not in known:
            known[size] = ranks.run(accumulate, size, limit_s=90)
        return [found[name] for found in known[size]]

    return get


every_layout = pytest.mark.parametrize("name", LAYOUTS)
every_size = pytest.mark.parametrize("size", [2, 3, 4])


@every_size
@every_layout
def test_a_step_of_micro_batches_is_one_process_bit_for_bit(accumulated, name, size):
    """Contract 49: bitwise, because all numbers are whole and small (see ``models.net``)."""
    for good, _, _, num_batches in accumulated(name, size):
        for (kind, clips), (norm, scale, whole) in good.items():
            net = make_net()
            grads = reference_grads(net, num_batches, *range(NUM_MICRO))
            OPTIMIZERS[kind](net.parameters()).step()
            assert scale == SCALE
            assert equal(whole, {n: p.detach() for n, p in net.named_parameters()}), (kind, clips)
            if clips:
                expected = math.sqrt(sum((g.double() ** 2).sum().item() for g in grads.values()))
                assert norm == pytest.approx(expected, rel=ROUNDING)


@every_size
@every_layout
def test_a_micro_batch_that_overflows_on_one_rank_is_one_skip_on_all(accumulated, name, size):
    """Contract 49: whichever of them it is, the first, the middle or the last."""
    for _, spoilt, _, _ in accumulated(name, size):
        for way, (untouched, scale, state) in spoilt.items():
            assert (untouched, scale) == (True, SCALE / 2), way
            assert state["_growth_tracker"] == 0


@every_size
@every_layout
def test_a_step_of_micro_batches_is_one_collective_more_than_without_a_scaler(
    accumulated, name, size
):
    """Contract 49: not one for each of them."""
    for _, _, counts, _ in accumulated(name, size):
        for with_scaler, without in counts:
            assert with_scaler == without + 1


def leave_no_sync_too_late(rank, size):
    """No micro-batch is synchronised, and the first one overflows on one rank."""
    laid = lay_out("DDP", size)
    before = whole_bits(laid)
    optimizer = OPTIMIZERS["plain"](laid.model.parameters())
    scaler = ShardedGradScaler("cpu", init_scale=SCALE)
    with held_back(laid.model):
        laid.backward(Spoiling(scaler) if rank == 1 else scaler, 0)
        laid.backward(scaler, 1)
    scaler.step(optimizer)
    scaler.update()
    return equal(before, whole_bits(laid)), scaler.get_scale()


def test_an_overflow_that_no_collective_of_the_model_has_spread_is_skipped_by_all(ranks):
    """Contract 49: DDP has left it on its rank, so that only the verdict can tell the others."""
    assert ranks.run(leave_no_sync_too_late, 3) == [(True, SCALE / 2)] * 3
