"""Models and optimizers whose parts lie differently: each part is counted once, none twice."""

from __future__ import annotations

import itertools
import math
import re
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from shardscale import ShardedGradScaler, distinct
from tests.ranks.models import batch, equal, local, make_net, reference_grads, spoil
from tests.ranks.models.laid import full
from tests.ranks.rank import outcome

with warnings.catch_warnings():  # the package scripts functions, of which torch itself warns
    warnings.simplefilter("ignore")
    from torch.distributed.optim import ZeroRedundancyOptimizer

INF, NAN = math.inf, math.nan
SCALE = 8.0
ROUNDING = 2.0**-22
"""Relative: a norm or a clipped gradient passes a few roundings to float32, of 2^-24 each."""


def sgd(params):
    return torch.optim.SGD(params, lr=0.5, momentum=0.5)


def norm_of(grads) -> float:
    """In float64."""
    return math.sqrt(sum(g.double().square().sum().item() for g in grads))


def counted_by(scaler) -> dict[str, str]:
    """Parameter -> who counts it, as the table says: ``"rank 0"`` or ``"unknown"``."""
    header, *rows = (re.split(r"\s{2,}", line) for line in scaler.describe().splitlines())
    return {row[0]: row[header.index("counted by")] for row in rows}


def bits(params) -> list[torch.Tensor]:
    return [local(p).clone().view(torch.int32) for p in params]


# --------------------------------------------------------------------------------------------- ZeRO

WAYS = {
    "SGD": (torch.optim.SGD, {"lr": 0.5, "momentum": 0.5}, False),
    "SGD, parameters in buckets": (torch.optim.SGD, {"lr": 0.5, "momentum": 0.5}, True),
    "fused AdamW": (torch.optim.AdamW, {"lr": 0.5, "fused": True}, False),
}


def train_with_zero(rank, size):
    """{way: ({check: whether it held}, scale)}."""
    return {way: train_with_zero_once(rank, size, *WAYS[way]) for way in WAYS}


def train_with_zero_once(rank, size, kind, options, in_buckets):
    net, reference = make_net(), make_net()
    model = DistributedDataParallel(net)
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), optimizer_class=kind, parameters_as_bucket_view=in_buckets, **options
    )
    plain = kind(reference.parameters(), **options)
    scaler = ShardedGradScaler("cpu", init_scale=SCALE, model=model)
    held = {}

    def iterate(step, bad_rank=None, max_norm=INF):
        optimizer.zero_grad()
        scaler.scale(model(batch(rank, step)).sum() * size).backward()
        spoil(net, rank, bad_rank, NAN)
        norm = scaler.clip_grad_norm_(optimizer, max_norm).item()
        scaler.step(optimizer)
        scaler.update()
        return norm

    for bad_rank in range(size):
        before = bits(net.parameters())
        iterate(0, bad_rank)
        held["skip", bad_rank] = all(map(torch.equal, before, bits(net.parameters())))
    norm = iterate(0)
    grads = reference_grads(reference, size, 0)
    plain.step()
    held["step"] = equal(full(net), full(reference))
    iterate(1, max_norm=0.5)
    gathered = [None] * size
    dist.all_gather_object(gathered, [p.tolist() for p in net.parameters()])
    held["replicas"] = all(other == gathered[0] for other in gathered)
    held["norm"] = norm == pytest.approx(norm_of(grads.values()), rel=ROUNDING)
    return held, scaler.get_scale()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_zero_redundancy_optimizer_steps_and_skips_as_one_process(ranks, size):
    """Contract 40 and 45: bit for bit; each rank updates its part and hands it to the others."""
    for found in ranks.run(train_with_zero, size):
        for way, (held, scale) in found.items():
            assert held == dict.fromkeys(held, True), way
            assert scale == SCALE / 2**size, way


# ----------------------------------------------------------------- FSDP1 units, each in its own way


class Tower(nn.Module):
    """Six layers, nested: 5 -> 7 -> 7 -> 7 -> 7 -> 3, and a scale factor at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 7), nn.Linear(7, 7)
        self.inner = nn.Sequential(nn.Linear(7, 7), nn.ReLU(), nn.Linear(7, 7))
        self.last = nn.Linear(7, 3)
        self.factor = nn.Parameter(torch.ones(3))
        generator = torch.Generator().manual_seed(17)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randint(-1, 2, p.shape, generator=generator))
            self.factor.fill_(1)

    def forward(self, x):
        return self.last(self.inner(self.b(self.a(x).relu()))) * self.factor


def fsdp1(module, strategy, **options):
    return FullyShardedDataParallel(
        module,
        sharding_strategy=ShardingStrategy[strategy],
        device_id=torch.device("cpu"),
        **options,
    )


def train_units(rank, size, use_orig_params):
    """{bad rank: (norm of one process?, step of one process?, scale)}, and who counts what."""
    net, reference = Tower(), Tower()
    options = {"use_orig_params": use_orig_params}
    net.a = fsdp1(net.a, "NO_SHARD", **options)
    net.b = fsdp1(net.b, "SHARD_GRAD_OP", **options)
    if size == 4:
        mesh = init_device_mesh("cpu", (2, 2))
        groups = (mesh.get_group(1), mesh.get_group(0))
        net.inner[2] = fsdp1(net.inner[2], "HYBRID_SHARD", process_group=groups, **options)
    net.inner = fsdp1(net.inner, "NO_SHARD", **options)  # around a unit of another kind
    model = fsdp1(net, "FULL_SHARD", **options)
    optimizer, plain = sgd(model.parameters()), sgd(reference.parameters())
    scaler = ShardedGradScaler("cpu", init_scale=SCALE, model=model)
    found = {}
    for bad_rank in (*range(size), None):
        before = bits(model.parameters())
        optimizer.zero_grad()
        scaler.scale(model(batch(rank, 0)).sum() * size).backward()
        spoil(model, rank, bad_rank, INF)
        norm = scaler.clip_grad_norm_(optimizer, INF).item()
        scaler.step(optimizer)
        scaler.update()
        if bad_rank is not None:
            unmoved = all(map(torch.equal, before, bits(model.parameters())))
            found[bad_rank] = True, unmoved, scaler.get_scale()
    for index in range(size):
        reference(batch(index, 0)).sum().backward()
    plain.step()
    expected = norm_of(p.grad for p in reference.parameters())
    with FullyShardedDataParallel.summon_full_params(model):
        whole = {n.replace("_fsdp_wrapped_module.", ""): p for n, p in full(model).items()}
    is_step = equal(whole, full(reference))
    found[None] = norm == pytest.approx(expected, rel=ROUNDING), is_step, scaler.get_scale()
    return found, counted_by(scaler)


@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_fsdp1_units_of_different_strategies_are_one_model(ranks, size, use_orig_params):
    """Contract 41 and 45: replicated units are counted by one rank, sharded ones by all."""
    results = ranks.run(train_units, size, use_orig_params=use_orig_params)
    for found, _ in results:
        for i, (norm_is_right, values_are_right, scale) in enumerate(found.values()):
            assert norm_is_right and values_are_right
            assert scale == SCALE / 2 ** min(i + 1, size)
    for rank, (_, table) in enumerate(results):
        for name, counted in table.items():
            owner = rank
            if name.startswith(("a", "inner")):
                owner = 0
            if name.startswith("inner.2") and size == 4:
                owner = rank % 2  # the same shard, in the first replica
            assert counted == f"rank {owner}", name


# ------------------------------------------------------------------------- parameters FSDP1 ignores


def train_ignored(rank, size, where):
    """({declared: outcome of clipping}, {declared: this rank's gradients}).

    The last layer and the factor are ignored. Where they are the same on all ranks, their gradients
    are summed by hand; else each rank has layers of its own.
    """
    net = Tower()
    ignored = [*net.last.parameters(), net.factor]
    if where == "nested":
        net.inner = fsdp1(net.inner, "FULL_SHARD", use_orig_params=True)
    model = fsdp1(net, "FULL_SHARD", use_orig_params=True, ignored_states=ignored)
    optimizer = sgd(model.parameters())
    declarations = {
        "nothing": None,
        "replicated": lambda name, p: range(size) if name.startswith(("last", "factor")) else None,
        "distinct": distinct,
    }
    found = {}
    for declared, copies in declarations.items():
        optimizer.zero_grad()
        scaler = ShardedGradScaler("cpu", init_scale=SCALE)
        scaler.attach(model, copies=copies)
        # Of the parameters that FSDP1 does not know, it averages nothing.
        scaler.scale(model(batch(rank, 0)).sum() * size).backward()
        for p in ignored:
            p.grad /= size
            if declared == "replicated":
                dist.all_reduce(p.grad)
        clipped = outcome(lambda s=scaler: s.clip_grad_norm_(optimizer, INF).item())
        own = norm_of(p.grad for p in ignored)
        found[declared] = clipped, own, counted_by(scaler)
    return found


@pytest.mark.parametrize(("size", "where"), [(2, "flat"), (3, "nested"), (4, "flat")])
def test_parameters_that_fsdp1_ignores_are_counted_as_declared(ranks, size, where):
    """Contract 45: they are plain tensors to everybody, so a word is needed, and is enough."""
    reference = Tower()
    for index in range(size):
        reference(batch(index, 0)).sum().backward()
    grads = {name: p.grad for name, p in reference.named_parameters()}
    whole = norm_of(grads.values())
    sharded = norm_of(g for n, g in grads.items() if not n.startswith(("last", "factor")))
    results = ranks.run(train_ignored, size, where=where)
    each = math.hypot(sharded, *(found["distinct"][1] for found in results))
    for rank, found in enumerate(results):
        refused, _, table = found["nothing"]
        assert refused.error == "LayoutError"
        assert "factor (plain)" in refused.message and "copies=" in refused.message
        unknown = [name for name, counted in table.items() if counted == "unknown"]
        assert sorted(unknown) == ["factor", "last.bias", "last.weight"]
        for declared, expected in (("replicated", whole), ("distinct", each)):
            clipped, _, table = found[declared]
            assert clipped.value == pytest.approx(expected, rel=ROUNDING), clipped.message
            owner = rank if declared == "distinct" else 0
            assert [table[name] for name in unknown] == [f"rank {owner}"] * 3


# --------------------------------------------------------------- several optimizers, one joint clip

CLIPS = [(0.5, False, None), (0.5, True, None), (INF, False, None)]
BAD_PARTS = [(0.5, False, "ddp"), (0.5, True, "fsdp2"), (INF, False, "by hand")]
"""Largest norm, whether `unscale_` comes first, and which part gets a NaN on one rank."""


def clip_jointly(rank, size):
    """{clip: (norm, parameters moved?, all parameters, scale, who counts what)}."""
    return {way: clip_jointly_once(rank, size, *way) for way in CLIPS + BAD_PARTS}


def clip_jointly_once(rank, size, max_norm, unscales_first, bad_part):
    """Data parallelism in three ways: the first layers by DDP, the next by FSDP2, the last by hand,
    in plain tensors."""
    net = make_net()
    parts = nn.ModuleDict(
        {"ddp": DistributedDataParallel(net[:2]), "fsdp2": net[2:4], "by hand": net[4:]}
    )
    fully_shard(parts["fsdp2"], mesh=init_device_mesh("cpu", (size,)))
    optimizers = [sgd(parts[name].parameters()) for name in ("by hand", "ddp", "fsdp2")]
    scaler = ShardedGradScaler("cpu", init_scale=SCALE)
    scaler.attach(parts, copies=lambda name, p: range(size) if name.startswith("by hand") else None)
    before = bits(net.parameters())
    out = parts["by hand"](parts["fsdp2"](parts["ddp"](batch(rank, 0))))
    scaler.scale(out.sum() * size).backward()
    for p in parts["by hand"].parameters():
        dist.all_reduce(p.grad)
        p.grad /= size
    if bad_part:
        spoil(parts[bad_part], rank, size // 2, NAN)
    if unscales_first:
        scaler.unscale_(optimizers)
    norm = scaler.clip_grad_norm_(optimizers, max_norm).item()
    scaler.step(optimizers)
    scaler.update()
    unmoved = all(map(torch.equal, before, bits(net.parameters())))
    return norm, unmoved, full(net), scaler.get_scale(), counted_by(scaler)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_optimizers_of_different_layouts_are_clipped_jointly_as_torch_clips(ranks, size):
    """Contract 41 and 45: one call, one norm over all of them, and one factor."""
    results = ranks.run(clip_jointly, size)
    for rank, found in enumerate(results):
        for max_norm, unscales_first, bad_part in found:
            norm, unmoved, whole, scale, table = found[max_norm, unscales_first, bad_part]
            if bad_part is not None:
                # Replicas of a part that only one of them spoiled: the first is counted.
                assert (unmoved, scale) == (True, SCALE / 2), bad_part
                continue
            net = make_net()
            grads = reference_grads(net, size, 0)
            torch.nn.utils.clip_grad_norm_(net.parameters(), max_norm)
            sgd(net.parameters()).step()
            assert norm == pytest.approx(norm_of(grads.values()), rel=ROUNDING)
            for name, p in net.named_parameters():
                torch.testing.assert_close(whole[name], p.detach(), rtol=ROUNDING, atol=ROUNDING)
                if max_norm == INF:
                    assert torch.equal(whole[name], p.detach())
            for name, counted in table.items():
                assert counted == f"rank {rank if name.startswith('fsdp2') else 0}", name


# ---------------------------------------------------------------------- many layouts, one optimizer


def make_parts(rank, size, line, grid):
    """{name: (parameter, who holds copies of it besides what its mesh says)}.

    Whole numbers that differ everywhere: parameter i holds multiples of i + 1, before sharding.
    """
    wholes = [torch.arange(1.0, n + 1) * (i + 1) for i, n in enumerate((7, 7, 7, 7, 7, 3, 5, 2))]
    parts = {
        "shard": (distribute_tensor(wholes[0], line, [Shard(0)]), None),
        "replica": (distribute_tensor(wholes[1], line, [Replicate()]), None),
        "shard of shards": (distribute_tensor(wholes[2], grid, [Shard(0), Shard(0)]), None),
        "shard of replicas": (distribute_tensor(wholes[3], grid, [Replicate(), Shard(0)]), None),
        "replica of shards": (distribute_tensor(wholes[4], grid, [Shard(0), Replicate()]), None),
        "plain replica": (wholes[5].clone(), range(size)),
        "plain, of this rank": (wholes[6] * (rank + 1), None),
    }
    if size == 4:  # a mesh of half the ranks, and the other half holds copies
        parts["on a sub-mesh"] = (
            distribute_tensor(wholes[7], grid["inner"], [Shard(0)]),
            grid["outer"].get_group(),
        )
    squares = sum(w.square().sum() for w in wholes[: 8 if size == 4 else 7])
    squares += wholes[6].square().sum() * (sum((r + 1) ** 2 for r in range(size)) - 1)
    return parts, squares.sqrt().item()


ORDERS = {
    "as they are": lambda names: names,
    "reversed": lambda names: names[::-1],
    "plain first": lambda names: sorted(names, key=lambda name: not name.startswith("plain")),
    "in turns": lambda names: [*names[::2], *names[1::2]],
}


def mix(rank, size):
    """{order: norm}, {(order, bad parameter, bad rank): unmoved}, and who counts what."""
    line = init_device_mesh("cpu", (size,))
    shape = (2, size // 2) if size % 2 == 0 else (1, size)
    grid = init_device_mesh("cpu", shape, mesh_dim_names=("outer", "inner"))
    parts, expected = make_parts(rank, size, line, grid)
    model = nn.ParameterDict({name: nn.Parameter(p) for name, (p, _) in parts.items()})
    grads = {name: p.detach().clone() for name, p in model.items()}
    norms, unmoved = {}, {}
    for order, sort in ORDERS.items():
        names = sort(list(parts))
        optimizer = torch.optim.SGD([model[name] for name in names], lr=0.0, foreach=False)
        scaler = ShardedGradScaler("cpu", init_scale=SCALE)
        scaler.attach(model, copies=lambda name, p: parts[name][1])
        for bad in [None, *itertools.product(names, range(size))]:
            for name, grad in grads.items():
                model[name].grad = grad * scaler.get_scale()
            if bad is not None and rank == bad[1] and local(model[bad[0]].grad).numel():
                local(model[bad[0]].grad)[-1] = NAN
            if bad is None:
                norms[order] = scaler.clip_grad_norm_(optimizer, INF).item()
            scaler.step(optimizer)
            skipped = scaler.verdict(optimizer).found_inf.item() == 1.0
            unmoved[order, bad] = skipped, bad and local(model[bad[0]]).numel() > 0
            scaler.update(SCALE)
    return expected, norms, unmoved, counted_by(scaler)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_plain_and_sharded_parameters_of_many_meshes_in_any_order(ranks, size):
    """Contract 41 and 45: the same bits of the norm, and a NaN anywhere is found by all."""
    results = ranks.run(mix, size)
    for rank, (expected, norms, verdicts, table) in enumerate(results):
        assert len(set(norms.values())) == 1  # whole numbers: no order rounds
        assert norms["reversed"] == pytest.approx(expected, rel=ROUNDING)
        for order, bad in verdicts:
            on_bad_rank = results[bad[1]][2][order, bad][1] if bad else False
            assert verdicts[order, bad][0] == on_bad_rank, (order, bad)
        width = size // 2 if size % 2 == 0 else size
        owners = {
            "shard": rank,
            "replica": 0,
            "shard of shards": rank,
            "shard of replicas": rank % width,
            "replica of shards": rank - rank % width,
            "plain replica": 0,
            "plain, of this rank": rank,
            "on a sub-mesh": rank % width,
        }
        assert table == {name: f"rank {owners[name]}" for name in table}
