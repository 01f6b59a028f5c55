"""Every parallelism, on every number of ranks, beside one process that holds the whole model.

One spawn examines one layout on one number of ranks; several tests look at what it found.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from shardscale import ShardedGradScaler
from tests.ranks.counting import count_collectives
from tests.ranks.models import (
    EVERY_LAYOUT,
    equal,
    lay_out,
    local,
    make_net,
    reference_grads,
    spoil,
    whole_bits,
)

INF, NAN = math.inf, math.nan
SCALE = 8.0
OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.5, momentum=0.5),
    "fused AdamW": lambda params: torch.optim.AdamW(params, lr=0.5, fused=True),
}
WAYS = (("SGD", False), ("SGD", True), ("fused AdamW", False))
"""Kind of optimizer, and whether `unscale_` is called before `step`."""
CLIPS = [(max_norm, *way) for max_norm in (0.5, 1e6, INF) for way in WAYS]
ROUNDING = 2.0**-22
"""Relative: a norm or a clipped gradient passes a few roundings to float32, of 2^-24 each."""
ROUNDING_OF_BFLOAT16 = 2.0**-6
"""Relative: sums above 256 are rounded to 8 bits, 2^-9 each, at most seven times over 8 ranks."""


def examine(rank, size, name):
    """All that the tests below look at; ``rank`` and ``size`` are those of the whole job.

    What does not depend on the number of ranks is seen on few of them in every combination; on
    four and eight, each way and each largest norm comes once.
    """
    ways, clips = (WAYS, CLIPS) if size < 4 else (WAYS[::2], CLIPS[::4])
    return {
        "training": {way: train(Training(rank, size, name, *way)) for way in ways},
        "clipping": clip(name, size, clips),
        "bfloat16": measure(name, size, torch.bfloat16),
    }


@pytest.fixture(scope="module")
def examined(ranks):
    """``examined(name, size)`` gives the findings of each rank; each layout is spawned once."""
    findings = {}

    def look(name, size):
        if (name, size) not in findings:
            try:
                findings[name, size] = ranks.run(examine, size, name=name, limit_s=90)
            except Exception as error:  # raised again for each test that would have looked
                findings[name, size] = error
        if isinstance(findings[name, size], Exception):
            raise findings[name, size]
        return findings[name, size]

    return look


every_layout = pytest.mark.parametrize(("name", "size"), EVERY_LAYOUT)


def lay_out_with_scaler(name, size, dtype=torch.float32):
    """A layout, and a scaler that knows it."""
    laid = lay_out(name, size, dtype)
    scaler = ShardedGradScaler("cpu", init_scale=SCALE)
    return laid, scaler.attach(laid.model, copies=laid.copies)


# ----------------------------------------------------------------------------------------- training


class Training:
    """The network in one layout beside the same network in one process."""

    def __init__(self, rank, size, name, optimizer_name, explicit):
        self.laid, self.scaler = lay_out_with_scaler(name, size)
        self.net = make_net()
        self.optimizer = OPTIMIZERS[optimizer_name](self.laid.model.parameters())
        self.reference = OPTIMIZERS[optimizer_name](self.net.parameters())
        self.rank, self.bad_rank, self.explicit = rank, size // 2, explicit
        self.first = [
            (p, local(p).clone()) for part in (self.laid.model, self.net) for p in part.parameters()
        ]

    def start_over(self):
        """Make all weights small whole numbers again, so that the next step is exact, too."""
        for p, values in self.first:
            local(p).copy_(values)

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


def train(training):
    """({check: whether it held}, scales); good, spoilt, good, overflowing by itself."""
    held, scales = {}, []
    scales.append(training.iterate(0))
    held["first step"] = training.equals_reference(0)
    before = whole_bits(training.laid)
    scales += [training.iterate(1, spoilt=value) for value in (INF, NAN)]
    held["skip"] = equal(before, whole_bits(training.laid))
    training.start_over()
    before = whole_bits(training.laid)
    scales.append(training.iterate(2))
    held["moves again"] = not equal(before, whole_bits(training.laid))
    if training.optimizer.defaults.get("momentum"):  # a division of Adam's rounds
        held["step after skips"] = training.equals_reference(2)
    before = whole_bits(training.laid)
    training.scaler.update(2.0**126)
    scales.append(training.iterate(3))
    held["overflow of its own"] = equal(before, whole_bits(training.laid))
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, {n: p.tolist() for n, p in training.laid.whole().items()})
    held["replicas"] = all(other == gathered[0] for other in gathered)
    return held, scales


@every_layout
def test_training_equals_one_process_bit_for_bit_and_skips_together(examined, name, size):
    """Contract 42: bitwise, because all numbers are whole and small (see ``models.net``)."""
    for found in examined(name, size):
        for way, (held, scales) in found["training"].items():
            assert held == dict.fromkeys(held, True), way
            assert scales == [8.0, 4.0, 2.0, 2.0, 2.0**125], way


# ---------------------------------------------------------------------------------------- the norm


def clip(name, size, clips):
    """For each clip: norm, norm of the verdict, collectives of each call, all parameters after it.

    With it the number of batches, and of sums of Partial gradients.
    """
    found = {}
    laid = lay_out(name, size)
    params = list(laid.model.parameters())
    first = [local(p).clone() for p in params]
    for max_norm, optimizer_name, unscales_first in clips:
        for p, values in zip(params, first, strict=True):
            local(p).copy_(values)
        optimizer = OPTIMIZERS[optimizer_name](params)
        optimizer.zero_grad()
        scaler = ShardedGradScaler("cpu", init_scale=SCALE)
        scaler.attach(laid.model, copies=laid.copies)
        laid.backward(scaler, step=0)
        counts = []
        if unscales_first:
            with count_collectives() as counted:
                scaler.unscale_(optimizer)
            counts.append(counted.num)
        with count_collectives() as counted:
            norm = scaler.clip_grad_norm_(optimizer, max_norm)
        counts.append(counted.num)
        again = scaler.verdict(optimizer).grad_norm
        with count_collectives() as counted:
            scaler.step(optimizer)
            scaler.update()
        counts.append(counted.num)
        found[max_norm, optimizer_name, unscales_first] = norm, again, counts, laid.whole()
    return found, laid.num_batches, laid.num_sums


def clipped_reference(num_batches, max_norm, optimizer_name):
    """Norm in float64, and the parameters that torch's own clipping and stepping arrive at."""
    net = make_net()
    grads = reference_grads(net, num_batches, 0)
    norm = math.sqrt(sum((g.double() ** 2).sum().item() for g in grads.values()))
    torch.nn.utils.clip_grad_norm_(net.parameters(), max_norm)
    OPTIMIZERS[optimizer_name](net.parameters()).step()
    return norm, {name: p.detach() for name, p in net.named_parameters()}


@every_layout
def test_the_norm_is_that_of_one_process_holding_the_whole_model(examined, name, size):
    """Contract 45: see the name."""
    results = [found["clipping"] for found in examined(name, size)]
    bits = {key: norm.item() for key, (norm, *_) in results[0][0].items()}
    for key in bits:
        norm, params = clipped_reference(results[0][1], key[0], key[1])
        assert norm > 0.5
        for found, _, _ in results:
            measured, again, _, whole = found[key]
            assert (measured.shape, measured.dtype) == ((), torch.float32)
            assert measured.item() == bits[key] == again.item()
            assert measured.item() == pytest.approx(norm, rel=ROUNDING)
            for parameter, expected in params.items():
                torch.testing.assert_close(whole[parameter], expected, rtol=ROUNDING, atol=ROUNDING)
                if key[0] != 0.5:  # nothing to clip: not a bit may change
                    assert torch.equal(whole[parameter], expected), (key, parameter)


@every_layout
def test_a_call_is_one_collective(examined, name, size):
    """Contract 44: flag, norm and drift check together; sums of Partial gradients apart."""
    for found, _, num_sums in (found["clipping"] for found in examined(name, size)):
        for key, (_, _, counts, _) in found.items():
            num_verdicts = len(counts) - 1 if size > 1 else 0
            wanted = [1] * num_verdicts + [0] * (len(counts) - num_verdicts)
            wanted[0] += 2 * num_sums  # what will be sent, and then that
            assert counts == wanted, key


def measure(name, size, dtype):
    """The norm of a model held in ``dtype``, and the number of batches."""
    laid, scaler = lay_out_with_scaler(name, size, dtype)
    optimizer = OPTIMIZERS["SGD"](laid.model.parameters())
    laid.backward(scaler, step=0)
    return scaler.clip_grad_norm_(optimizer, INF).item(), laid.num_batches


@every_layout
def test_the_norm_of_bfloat16_gradients_is_that_of_one_process(examined, name, size):
    """Contract 45: see the name."""
    results = [found["bfloat16"] for found in examined(name, size)]
    grads = reference_grads(make_net(), results[0][1], 0)
    norm = math.sqrt(sum((g.double() ** 2).sum().item() for g in grads.values()))
    assert {measured for measured, _ in results} == {results[0][0]}
    assert results[0][0] == pytest.approx(norm, rel=ROUNDING_OF_BFLOAT16)
