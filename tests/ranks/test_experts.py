"""Mixtures of experts: parameters of several meshes and of none, under one verdict."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from shardscale import ShardedGradScaler
from tests.ranks.models.experts import LAYOUTS, Mixture, reference_grads
from tests.ranks.models.laid import equal, local, whole_bits

INF, NAN = math.inf, math.nan
SCALE = 8.0
ROUNDING = 2.0**-22
"""Relative: a norm passes a few roundings to float32, of 2^-24 each."""
EVERY_LAYOUT = [(name, size) for name, layout in LAYOUTS.items() for size in layout.sizes]


class Training:
    """A mixture in one layout beside the same mixture in one process."""

    def __init__(self, rank, size, name):
        self.laid = LAYOUTS[name].lay(size, torch.float32)
        self.scaler = ShardedGradScaler("cpu", init_scale=SCALE)
        self.scaler.attach(self.laid.model, copies=self.laid.copies)
        self.params = list(self.laid.model.parameters())
        self.experts = [p for p in self.params if p.ndim == 3]
        self.net = Mixture(size)

    def iterate(self, step, params, bad=False):
        """One iteration; the norm that the scaler finds."""
        self.laid.model.zero_grad()
        self.laid.backward(self.scaler, step)
        if bad:
            local(self.experts[0].grad).view(-1)[-1] = NAN
        optimizer = torch.optim.SGD(params, lr=0.5)
        norm = self.scaler.clip_grad_norm_(optimizer, INF).item()
        self.scaler.step(optimizer)
        self.scaler.update()
        return norm

    def equals_reference(self, step, names):
        """The norm that one process finds; whether it arrives at the same parameters."""
        reference_grads(self.net, self.laid.num_batches, step)
        params = [p for name, p in self.net.named_parameters() if name.startswith(names)]
        norm = torch.nn.utils.get_total_norm([p.grad.double() for p in params]).item()
        torch.optim.SGD(params, lr=0.5).step()
        whole = {name: p.detach() for name, p in self.net.named_parameters()}
        return norm, equal(self.laid.whole(), whole)


def train(rank, size, name):
    """All that the test below looks at."""
    training = Training(rank, size, name)
    # At step 0 no token visits the first expert.
    norms = [training.iterate(0, training.params)]
    references = [training.equals_reference(0, "")]
    has_gradient = training.experts[0].grad is not None
    before = whole_bits(training.laid)
    # In one expert of one rank; where there are copies, in one of them.
    bad_norm = training.iterate(1, training.params, bad=rank == size - 1)
    skipped = equal(before, whole_bits(training.laid)), training.scaler.get_scale()
    # Of the experts alone: on the rank of the first one the optimizer has no gradient at all.
    norms.append(training.iterate(0, training.experts))
    references.append(training.equals_reference(0, "experts"))
    return norms, references, has_gradient, bad_norm, skipped


@pytest.mark.parametrize(("name", "size"), EVERY_LAYOUT)
def test_a_mixture_of_experts_is_one_process_bit_for_bit_and_skips_together(ranks, name, size):
    """Contracts 42, 43, 45: the norm counts dense layers once and every expert once, and a rank
    whose expert saw no token has no gradient, and the same verdict."""
    results = ranks.run(train, size, name=name)
    for rank, (norms, references, has_gradient, bad_norm, skipped) in enumerate(results):
        for norm, (expected, equals) in zip(norms, references, strict=True):
            assert norm == pytest.approx(expected, rel=ROUNDING)
            assert expected > 0.5 and equals
        assert norms == results[0][0]
        assert has_gradient == (rank > 0 or name not in ("EP", "EP beside DDP"))
        assert skipped == (True, SCALE / 2)
        # The norm counts the first of two copies, and the second was spoilt; the verdict sees both.
        assert math.isfinite(bad_norm) == name.endswith(("copied", "replicated"))


# -------------------------------------------------------------------------------- in any order

NAMES = ("plain", "copied", "sharded", "replicated", "hybrid", "on one axis")
ORDERS = list(itertools.islice(itertools.permutations(NAMES), 0, None, 103))


def judge_in_every_order(rank, size):
    """{(order, the bad one): (norm, found, whether each parameter moved)}."""
    everyone = init_device_mesh("cpu", (4,))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))

    def copies(name, param):
        return mesh["replica"].get_group() if name in ("copied", "on one axis") else None

    found = {}
    for order, bad in itertools.product(ORDERS, (None, *NAMES)):
        params = {
            "plain": torch.full((2,), rank + 1.0),
            "copied": torch.full((3,), rank % 2 + 1.0),
            "sharded": DTensor.from_local(torch.full((2,), rank + 1.0), everyone, [Shard(0)]),
            "replicated": DTensor.from_local(torch.ones(5), everyone, [Replicate()]),
            "hybrid": DTensor.from_local(
                torch.full((3,), rank % 2 + 1.0), mesh, [Replicate(), Shard(0)]
            ),
            "on one axis": DTensor.from_local(torch.ones(1), mesh["shard"], [Shard(0)]),
        }
        model = nn.ParameterDict({name: nn.Parameter(p.clone()) for name, p in params.items()})
        for p in model.values():
            p.grad = p.detach() * SCALE
        if bad is not None and rank == NAMES.index(bad) % size:
            local(model[bad].grad)[-1] = NAN
        optimizer = torch.optim.SGD([model[name] for name in order], lr=0.5)
        scaler = ShardedGradScaler("cpu", init_scale=SCALE).attach(model, copies=copies)
        scaler.scale(torch.ones(()))
        norm = scaler.clip_grad_norm_(optimizer, INF).item()
        found_inf = scaler.verdict(optimizer).found_inf.item()
        scaler.step(optimizer)
        scaler.update()
        moved = {not torch.equal(local(params[name]), local(model[name])) for name in NAMES}
        found[order, bad] = norm, found_inf, moved
    return found


def test_parameters_of_several_meshes_have_one_verdict_in_any_order(ranks):
    """Contracts 41, 45: one gradient as large as its parameter, each counted once; then one bad
    element on one rank."""
    values = {
        "plain": [1, 1, 2, 2, 3, 3, 4, 4],
        "copied": [1, 1, 1, 2, 2, 2],
        "sharded": [1, 1, 2, 2, 3, 3, 4, 4],
        "replicated": [1] * 5,
        "hybrid": [1, 1, 1, 2, 2, 2],
        "on one axis": [1, 1],
    }
    norm = math.sqrt(sum(value**2 for each in values.values() for value in each))
    assert len(ORDERS) == 7
    for found in ranks.run(judge_in_every_order, 4):
        for (order, bad), (measured, found_inf, moved) in found.items():
            assert (found_inf, moved) == ((0.0, {True}) if bad is None else (1.0, {False})), order
            if bad is None:
                assert measured == pytest.approx(norm, rel=ROUNDING), order
