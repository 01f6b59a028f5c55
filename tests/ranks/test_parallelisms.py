"""A real network under each parallelism behaves as one process holding all of it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import shardscale
from shardscale import ShardedGradScaler
from tests.ranks.models import (
    LAYOUTS,
    MESH_LAYOUTS,
    batch,
    lay_out,
    local,
    local_grads,
    make_net,
    reference_grads,
)
from tests.ranks.rank import outcome, scratch

INF, NAN = math.inf, math.nan
SCALE = 8.0
OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.5, momentum=0.5),
    "fused AdamW": lambda params: torch.optim.AdamW(params, lr=0.5, fused=True),
}
ROUNDING = 2.0**-22
"""Relative: a norm or a clipped gradient passes a few roundings to float32, of 2^-24 each."""


def lay_out_with_scaler(name, size, **options):
    """A layout, and a scaler that knows it."""
    laid = lay_out(name, size)
    scaler = ShardedGradScaler("cpu", init_scale=SCALE, **options)
    return laid, scaler.attach(laid.model, copies=laid.copies)


def spoil(model, rank, bad_rank, value):
    """Overwrite the last element of the first gradient that one rank holds."""
    if rank == bad_rank:
        local_grads(model)[0].view(-1)[-1] = value


def whole_bits(laid):
    return {name: p.view(torch.int32) for name, p in laid.whole().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Training:
    """The network in one layout beside the same network in one process."""

    def __init__(self, rank, size, name, optimizer_name, explicit):
        self.laid, self.scaler = lay_out_with_scaler(name, size)
        self.net = make_net()
        self.optimizer = OPTIMIZERS[optimizer_name](self.laid.model.parameters())
        self.reference = OPTIMIZERS[optimizer_name](self.net.parameters())
        self.rank, self.bad_rank, self.explicit = rank, size // 2, explicit

    def iterate(self, step, spoilt=None):
        """One iteration; ``spoilt`` is put into a gradient of the middle rank."""
        self.optimizer.zero_grad()
        self.laid.backward(self.scaler, step)
        if spoilt is not None:
            spoil(self.laid.model, self.rank, self.bad_rank, spoilt)
        if self.explicit:
            self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return self.scaler.get_scale()

    def equals_reference(self, step):
        """Whether the same step in one process leads to the same parameters, bit for bit."""
        reference_grads(self.net, self.laid.num_batches, step)
        self.reference.step()
        params = {name: p.detach() for name, p in self.net.named_parameters()}
        return equal(self.laid.whole(), params)


def train(rank, size, name, ways=(("SGD", False), ("SGD", True), ("fused AdamW", False))):
    """{way: ({check: whether it held}, scales)}; good, spoilt, good, overflowing by itself."""
    return {way: train_one_way(Training(rank, size, name, *way), name) for way in ways}


def train_one_way(training, name):
    held, scales = {}, []
    scales.append(training.iterate(0))
    held["first step"] = training.equals_reference(0)
    before = whole_bits(training.laid)
    scales += [training.iterate(1, spoilt=value) for value in (INF, NAN)]
    held["skip"] = equal(before, whole_bits(training.laid))
    scales.append(training.iterate(2))
    held["moves again"] = not equal(before, whole_bits(training.laid))
    # With weights that are no longer small whole numbers, a 16-bit forward rounds, and so does a
    # division of Adam's.
    if training.optimizer.defaults.get("momentum") and not name.endswith("float16"):
        held["step after skips"] = training.equals_reference(2)
    before = whole_bits(training.laid)
    training.scaler.update(2.0**126)
    scales.append(training.iterate(3))
    held["overflow of its own"] = equal(before, whole_bits(training.laid))
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, {n: p.tolist() for n, p in training.laid.whole().items()})
    held["replicas"] = all(other == gathered[0] for other in gathered)
    return held, scales


ALL = [
    *((name, size) for name in LAYOUTS for size in (2, 3)),
    # On four ranks the bias of three leaves one of them without an element.
    *(
        (name, 4)
        for name in ("FSDP1 FULL_SHARD original", "FSDP2", "FSDP2 float16", "hand-sharded")
    ),
    ("DDP", 1),
    ("FSDP2", 1),
    *MESH_LAYOUTS,
]


def assert_trained(found):
    for ways in found:
        for way, (held, scales) in ways.items():
            assert held == dict.fromkeys(held, True), way
            assert scales == [8.0, 4.0, 2.0, 2.0, 2.0**125], way


@pytest.mark.parametrize(("name", "size"), ALL)
def test_training_equals_one_process_bit_for_bit_and_skips_together(ranks, name, size):
    """Bitwise, because all numbers are whole and small (see ``tests.ranks.models``)."""
    assert_trained(ranks.run(train, size, name=name))


# ---------------------------------------------------------------------------------------- clipping

CLIPS = [
    (max_norm, unscales_first, optimizer_name)
    for max_norm in (0.5, 1e6, INF)
    for unscales_first, optimizer_name in ((False, "SGD"), (True, "SGD"), (False, "fused AdamW"))
]


def clip(rank, size, name):
    """{clip: (norm, norm of the verdict, all parameters after the step)}, and number of batches."""
    found = {}
    laid = lay_out(name, size)
    params = list(laid.model.parameters())
    first = [local(p).clone() for p in params]
    for max_norm, unscales_first, optimizer_name in CLIPS:
        with torch.no_grad():
            for p, values in zip(params, first, strict=True):
                local(p).copy_(values)
        optimizer = OPTIMIZERS[optimizer_name](params)
        optimizer.zero_grad()
        scaler = ShardedGradScaler("cpu", init_scale=SCALE)
        scaler.attach(laid.model, copies=laid.copies)
        laid.backward(scaler, step=0)
        if unscales_first:
            scaler.unscale_(optimizer)
        norm = scaler.clip_grad_norm_(optimizer, max_norm)
        again = scaler.verdict(optimizer).grad_norm
        scaler.step(optimizer)
        scaler.update()
        found[max_norm, unscales_first, optimizer_name] = norm, again, laid.whole()
    return found, laid.num_batches


def clipped_reference(num_batches, max_norm, optimizer_name):
    """Norm in float64, and the parameters that torch's own clipping and stepping arrive at."""
    net = make_net()
    grads = reference_grads(net, num_batches, 0)
    norm = math.sqrt(sum((g.double() ** 2).sum().item() for g in grads.values()))
    torch.nn.utils.clip_grad_norm_(net.parameters(), max_norm)
    OPTIMIZERS[optimizer_name](net.parameters()).step()
    return norm, {name: p.detach() for name, p in net.named_parameters()}


@pytest.mark.parametrize(("name", "size"), ALL)
def test_the_norm_is_that_of_one_process_holding_the_whole_model(ranks, name, size):
    results = ranks.run(clip, size, name=name)
    bits = {key: norm.item() for key, (norm, _, _) in results[0][0].items()}
    for found, num_batches in results:
        for key, (measured, again, whole) in found.items():
            norm, params = clipped_reference(num_batches, key[0], key[2])
            assert norm > 0.5
            assert (measured.shape, measured.dtype) == ((), torch.float32)
            assert measured.item() == bits[key] == again.item()
            assert measured.item() == pytest.approx(norm, rel=ROUNDING)
            for parameter, expected in params.items():
                torch.testing.assert_close(whole[parameter], expected, rtol=ROUNDING, atol=ROUNDING)
                if key[0] != 0.5:  # nothing to clip: not a bit may change
                    assert torch.equal(whole[parameter], expected), (key, parameter)


def clip_with_experts(rank, size):
    """A first layer that DDP replicates, and an expert of this rank's own behind it."""
    shared = DistributedDataParallel(torch.nn.Linear(5, 7))
    expert = torch.nn.Linear(7, 3)
    for p in [*shared.parameters(), *expert.parameters()]:
        torch.nn.init.ones_(p)
    model = torch.nn.ModuleList([shared, expert])
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    scaler = ShardedGradScaler("cpu", init_scale=SCALE)
    scaler.attach(model, copies=shardscale.distinct)
    scaler.scale(expert(shared(batch(rank, 0))).sum() * (rank + 1)).backward()
    norm = scaler.clip_grad_norm_(optimizer, INF).item()
    shared_squares, own_squares = (
        sum((p.grad.double() ** 2).sum().item() for p in part.parameters())
        for part in (shared, expert)
    )
    return norm, shared_squares, own_squares


def test_the_norm_counts_what_is_shared_once_and_each_expert(ranks):
    found = ranks.run(clip_with_experts, 4)
    expected = math.sqrt(found[0][1] + sum(own for _, _, own in found))
    assert len({own for _, _, own in found}) == 4
    for norm, _, _ in found:
        assert norm == pytest.approx(expected, rel=ROUNDING)


def clip_declared_copies(rank, size, declare):
    """Plain tensors, by hand: ranks 0 and 2 hold one shard, 1 and 3 another, rank 3 one more."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    model = torch.nn.ParameterDict({"shard": torch.nn.Parameter(torch.ones(4))})
    if rank == 3:
        model["alone"] = torch.nn.Parameter(torch.ones(7))
    for p in model.values():
        p.grad = torch.full_like(p, SCALE * (rank % 2 + 1))
    where = {"ranks": [rank % 2, rank % 2 + 2], "group": groups[rank % 2]}[declare]
    scaler = ShardedGradScaler("cpu", init_scale=SCALE)
    scaler.attach(model, copies=lambda name, p: where if name == "shard" else None)
    return scaler.clip_grad_norm_(torch.optim.SGD(model.values()), INF).item()


@pytest.mark.parametrize("declare", ["ranks", "group"])
def test_the_norm_counts_declared_copies_once(ranks, declare):
    """4 ones, 4 twos, and 7 twos: each once."""
    norm = math.sqrt(4 + 16 + 28)
    for found in ranks.run(clip_declared_copies, 4, declare=declare):
        assert found == pytest.approx(norm, rel=ROUNDING)


def clip_a_bad_one(rank, size, name, value):
    laid, scaler = lay_out_with_scaler(name, size)
    optimizer = OPTIMIZERS["SGD"](laid.model.parameters())
    laid.backward(scaler, step=0)
    before = whole_bits(laid)
    # DDP has reduced its gradients: all replicas hold the same bad value.
    spoil(laid.model, rank, rank if name == "DDP" else size // 2, value)
    norm = scaler.clip_grad_norm_(optimizer, 0.5)
    largest = max(g.abs().nan_to_num(posinf=0.0).max().item() for g in local_grads(laid.model))
    scaler.step(optimizer)
    scaler.update()
    return norm.item(), largest, equal(before, whole_bits(laid)), scaler.get_scale()


@pytest.mark.parametrize("name", ["DDP", "FSDP1 FULL_SHARD original", "FSDP2", "hand-sharded"])
@pytest.mark.parametrize("value", [INF, NAN])
def test_a_norm_that_is_not_finite_is_returned_and_clips_nothing(ranks, name, value):
    for norm, largest, unmoved, scale in ranks.run(clip_a_bad_one, 3, name=name, value=value):
        assert math.isnan(norm) if math.isnan(value) else norm == INF
        assert largest != 0.0
        assert (unmoved, scale) == (True, SCALE / 2)


def clip_without_attach(rank, size, name):
    laid = lay_out(name, size)
    scaler = ShardedGradScaler("cpu", init_scale=SCALE)
    optimizer = OPTIMIZERS["SGD"](laid.model.parameters())
    laid.backward(scaler, step=0)
    before = whole_bits(laid)
    clipped = outcome(lambda: scaler.clip_grad_norm_(optimizer, 0.5))
    return clipped.error, clipped.message, equal(before, whole_bits(laid))


def test_the_norm_of_plain_tensors_is_refused_until_their_owner_is_known(ranks):
    """Copies or other parameters: nothing tells which, and either guess is wrong half of the
    time."""
    for error, message, unmoved in ranks.run(clip_without_attach, 2, name="hand-sharded"):
        assert error == "LayoutError"
        assert "attach" in message
        assert unmoved


# -------------------------------------------------------------------------------- DDP, accumulation


def accumulate(rank, size, syncs_last, bad):
    """Three micro-batches, all but the last under `no_sync`; the first overflows on one rank
    only."""
    net = make_net()
    model = DistributedDataParallel(net)
    optimizer = OPTIMIZERS["SGD"](net.parameters())
    scaler = ShardedGradScaler("cpu", init_scale=SCALE)
    before = [p.detach().clone() for p in net.parameters()]
    for micro in range(3):
        loss = model(batch(rank, micro)).sum() * size
        if bad and micro == 0 and rank == 1:
            loss = loss * INF
        if micro == 2 and syncs_last:
            scaler.scale(loss).backward()
        else:
            with model.no_sync():
                scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    untouched = all(map(torch.equal, before, net.parameters()))
    return untouched, scaler.get_scale(), [p.detach() for p in net.parameters()]


@pytest.mark.parametrize("syncs_last", [True, False])
def test_accumulation_that_overflows_on_one_rank_is_skipped_by_all(ranks, syncs_last):
    """Without the last synchronisation only that rank holds the Inf: DDP alone does not spread
    it."""
    for untouched, scale, _ in ranks.run(accumulate, 3, syncs_last=syncs_last, bad=True):
        assert (untouched, scale) == (True, SCALE / 2)


def test_accumulation_that_does_not_is_one_process_bit_for_bit(ranks):
    """On two ranks: DDP's own division by three is not exact."""
    net = make_net()
    reference_grads(net, 2, 0, 1, 2)
    OPTIMIZERS["SGD"](net.parameters()).step()
    for untouched, scale, params in ranks.run(accumulate, 2, syncs_last=True, bad=False):
        assert (untouched, scale) == (False, SCALE)
        assert all(map(torch.equal, params, net.parameters()))


# ---------------------------------------------------------------------- ownership, groups, backends


def own_different_numbers(rank, size, bad_rank, fused):
    """Rank r owns r optimizers of r + 1 elements each, all stepped by one call."""
    params = [torch.nn.Parameter(torch.ones(rank + 1)) for _ in range(rank)]
    optimizers = [torch.optim.AdamW([p], lr=0.5, weight_decay=0.0, fused=fused) for p in params]
    scaler = ShardedGradScaler("cpu", init_scale=SCALE)
    scaler.attach(torch.nn.ParameterList(params), copies=shardscale.distinct)
    scaler.scale(torch.ones(()))
    for p in params:
        p.grad = torch.full_like(p, SCALE)
    if rank == bad_rank:
        params[-1].grad[-1] = NAN
    norm = scaler.clip_grad_norm_(optimizers, INF)
    scaler.step(optimizers)
    scaler.update()
    stepped = [not torch.equal(p.detach(), torch.ones_like(p)) for p in params]
    return norm.item(), stepped, scaler.get_scale()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bad_rank", [None, 1, 3])
def test_ranks_that_own_different_numbers_of_optimizers_take_one_decision(ranks, bad_rank, fused):
    found = ranks.run(own_different_numbers, 4, bad_rank=bad_rank, fused=fused)
    good = bad_rank is None
    # Rank r holds r * (r + 1) gradients of 1.0: 0 + 2 + 6 + 12 of them.
    assert [stepped for _, stepped, _ in found] == [[good] * rank for rank in range(4)]
    assert {scale for _, _, scale in found} == {SCALE if good else SCALE / 2}
    for norm, _, _ in found:
        assert norm == pytest.approx(math.sqrt(20), rel=ROUNDING) if good else math.isnan(norm)


def train_three_of_four(rank, size, named):
    """Ranks 0 to 2 train; rank 3 serves something else and never calls a scaler."""
    group = dist.new_group([0, 1, 2])
    if rank == 3:
        return None
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.full((3,), INF if rank == 2 else SCALE)
    optimizer = torch.optim.SGD([p], lr=0.5)
    options = {"process_group": group} if named else {"timeout_s": 1.0}
    scaler = ShardedGradScaler("cpu", init_scale=SCALE, **options)
    scaler.scale(torch.ones(()))
    stepped = outcome(lambda: scaler.step(optimizer))
    if stepped.error is None:
        scaler.update()
    return stepped.error, p.tolist(), scaler.get_scale()


def test_a_named_group_agrees_without_the_ranks_outside(ranks):
    found = ranks.run(train_three_of_four, 4, named=True)
    assert found == [(None, [1.0] * 3, SCALE / 2)] * 3 + [None]


def test_an_unnamed_group_waits_for_them_and_says_so(ranks):
    found = ranks.run(train_three_of_four, 4, named=False)
    assert found == [("MissingRankError", [1.0] * 3, SCALE)] * 3 + [None]


@pytest.mark.parametrize("backend", ["cpu:gloo,cuda:gloo", "cpu:gloo"])
def test_a_group_with_a_backend_per_device_agrees(ranks, backend):
    assert_trained(ranks.run(train, 2, name="FSDP2", backend=backend))


def make_scaler_first(rank, size):
    """The scaler is made before the group: it must find the group at its first verdict."""
    scaler = ShardedGradScaler("cpu", init_scale=SCALE)
    store = dist.FileStore(str(scratch() / "late"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.full((3,), INF if rank == 1 else SCALE)
    scaler.scale(torch.ones(()))
    scaler.step(torch.optim.SGD([p], lr=0.5))
    scaler.update()
    return p.tolist(), scaler.get_scale()


def test_a_group_made_after_the_scaler_is_found(ranks):
    found = ranks.run(make_scaler_first, 3, backend=None)
    assert found == [([1.0] * 3, SCALE / 2)] * 3
