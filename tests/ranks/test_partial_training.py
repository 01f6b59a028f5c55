"""Models of which only a part is trained, and ranks that hold no part of that part."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import shardscale
from shardscale import ShardedGradScaler
from tests.ranks.models import batch, equal, spoil
from tests.ranks.models.laid import Laid, averaging, full, local_grads, whole_bits

INF, NAN = math.inf, math.nan
SCALE = 8.0
ROUNDING = 2.0**-22
"""Relative: a norm passes a few roundings to float32, of 2^-24 each."""


class Adapted(nn.Module):
    """A frozen layer with a trained low-rank one beside it."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.base = nn.Linear(num_in, num_out).requires_grad_(False)
        self.down = nn.Linear(num_in, 2, bias=False)
        self.up = nn.Linear(2, num_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def make_net() -> nn.Sequential:
    """5 -> 7 -> 3, of which 44 elements in 4 matrices are trained; whole numbers, as ever."""
    generator = torch.Generator().manual_seed(11)
    net = nn.Sequential(Adapted(5, 7), nn.ReLU(), Adapted(7, 3))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randint(-1, 2, p.shape, generator=generator))
    return net


def train_reference(num_batches: int, step: int, optimizer_name: str, chosen: str):
    """One process, one step: the gradients' norm in float64, and all parameters."""
    net = make_net()
    for index in range(num_batches):
        net(batch(index, step)).sum().backward()
    grads = [p.grad.double() for p in net.parameters() if p.grad is not None]
    OPTIMIZERS[optimizer_name](CHOICES[chosen](net)).step()
    return math.sqrt(sum(g.square().sum().item() for g in grads)), full(net)


# ------------------------------------------------------------------------------------- the adapters


def lay_ddp(size):
    net = make_net()
    return averaging(DistributedDataParallel(net), size, lambda: full(net), torch.float32)


def _fsdp1(size, model):
    def whole():
        with FullyShardedDataParallel.summon_full_params(model):
            params = full(model.module)
        return {name.replace("_fsdp_wrapped_module.", ""): p for name, p in params.items()}

    return averaging(model, size, whole, torch.float32)


def lay_fsdp1_original(size):
    """One unit: a rank may hold elements of frozen parameters alone."""
    return _fsdp1(
        size,
        FullyShardedDataParallel(make_net(), use_orig_params=True, device_id=torch.device("cpu")),
    )


def lay_fsdp1_flat(size):
    """A unit each: without the original parameters torch takes none that is frozen in part."""
    options = {"use_orig_params": False, "device_id": torch.device("cpu")}
    net = make_net()
    for adapted in (net[0], net[2]):
        for name, layer in list(adapted.named_children()):
            setattr(adapted, name, FullyShardedDataParallel(layer, **options))
    return _fsdp1(size, FullyShardedDataParallel(net, **options))


def lay_fsdp2(size):
    net = make_net()
    mesh = init_device_mesh("cpu", (size,))
    for layer in (net[0], net[2], net):
        fully_shard(layer, mesh=mesh)
    return averaging(net, size, lambda: full(net), torch.float32)


LAYOUTS = {
    "DDP": lay_ddp,
    "FSDP1 original": lay_fsdp1_original,
    "FSDP1 flat": lay_fsdp1_flat,
    "FSDP2": lay_fsdp2,
}
OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.5, momentum=0.5),
    "fused AdamW": lambda params: torch.optim.AdamW(params, lr=0.5, fused=True),
}
CHOICES = {
    "trained": lambda model: [p for p in model.parameters() if p.requires_grad],
    "all": lambda model: list(model.parameters()),
}
"""Which parameters the optimizer is given."""


def adapt(rank, size, name):
    """{(optimizer, chosen): {check: whether it held}}, and the number of gradients on this rank."""
    found = {}
    laid = LAYOUTS[name](size)
    first = [p.detach().clone() for p in laid.model.parameters()]
    for optimizer_name in OPTIMIZERS:
        for chosen in CHOICES:
            with torch.no_grad():
                for p, values in zip(laid.model.parameters(), first, strict=True):
                    p.copy_(values)
            found[optimizer_name, chosen] = adapt_once(rank, size, laid, optimizer_name, chosen)
    return found, len(local_grads(laid.model))


def adapt_once(rank, size, laid: Laid, optimizer_name, chosen):
    optimizer = OPTIMIZERS[optimizer_name](CHOICES[chosen](laid.model))
    scaler = ShardedGradScaler("cpu", init_scale=SCALE, model=laid.model)
    held = {}
    before = whole_bits(laid)
    for value in (INF, NAN):
        optimizer.zero_grad()
        laid.backward(scaler, step=1)
        # On the last rank that has a gradient.
        ranks_with_grads: list[int | None] = [None] * size
        dist.all_gather_object(ranks_with_grads, rank if local_grads(laid.model) else -1)
        spoil(laid.model, rank, max(ranks_with_grads), value)
        scaler.step(optimizer)
        scaler.update()
        held["skip", value] = equal(before, whole_bits(laid))
    held["scale"] = scaler.get_scale() == SCALE / 4

    optimizer.zero_grad()
    laid.backward(scaler, step=0)
    norm = scaler.clip_grad_norm_(optimizer, INF).item()
    scaler.step(optimizer)
    scaler.update()
    expected_norm, params = train_reference(laid.num_batches, 0, optimizer_name, chosen)
    held["norm"] = norm == pytest.approx(expected_norm, rel=ROUNDING)
    held["step"] = equal(laid.whole(), params)
    return held


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("name", LAYOUTS)
def test_adapters_are_trained_as_by_one_process(ranks, name, size):
    """Contract 43 and 45: skipped together, the same norm, and bit for bit the same step.

    Frozen parameters do not move and count nothing, whether or not the optimizer has them.
    """
    results = ranks.run(adapt, size, name=name)
    for found, _ in results:
        for way, held in found.items():
            assert held == dict.fromkeys(held, True), way
    if name == "FSDP1 original" and size == 4:
        # What this layout is here for: shards that hold no trained element, among others.
        assert 0 in [num for _, num in results]
        assert max(num for _, num in results) > 1


# -------------------------------------------------------------- gradients that only some ranks have


class Experts(nn.Module):
    """Three layers, of which each batch goes through one, and none ever through the last."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 3) for _ in range(3))
        generator = torch.Generator().manual_seed(13)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randint(-1, 2, p.shape, generator=generator))

    def forward(self, x: Tensor, index: int) -> Tensor:
        return self.layers[index % 2](x)


def route(rank, size, name):
    """(norms, parameters, scales) of a good, a bad and another good step."""
    net = Experts()
    if name == "DDP":
        model = DistributedDataParallel(net, find_unused_parameters=True)
    else:
        options = {"use_orig_params": True, "device_id": torch.device("cpu")}
        model = FullyShardedDataParallel(net, **options)
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    scaler = ShardedGradScaler("cpu", init_scale=SCALE, model=model)
    scales, norms = [], []
    for step, bad_rank in enumerate((None, size - 1, None)):
        optimizer.zero_grad()
        scaler.scale(model(batch(rank, step), rank).sum() * size).backward()
        spoil(model, rank, bad_rank, NAN)
        norms.append(scaler.clip_grad_norm_(optimizer, INF).item())
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    with FullyShardedDataParallel.summon_full_params(model):  # does nothing to DDP's
        return norms, full(model.module), scales


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ["DDP", "FSDP1"])
def test_parameters_that_some_ranks_do_not_use_are_trained_as_by_one_process(ranks, name, size):
    """Contract 43 and 45: one expert has a gradient on every other rank, one nowhere."""
    net = Experts()
    optimizer = OPTIMIZERS["SGD"](net.parameters())
    expected_norms = []
    for step in (0, 2):
        optimizer.zero_grad()
        for index in range(size):
            net(batch(index, step), index).sum().backward()
        grads = [p.grad.double() for p in net.parameters() if p.grad is not None]
        expected_norms.append(math.sqrt(sum(g.square().sum().item() for g in grads)))
        optimizer.step()
    for norms, whole, scales in ranks.run(route, size, name=name):
        assert [norms[0], norms[2]] == pytest.approx(expected_norms, rel=ROUNDING)
        assert scales == [SCALE, SCALE / 2, SCALE / 2]
        assert equal(whole, full(net))


# --------------------------------------------------------------------- a rank with nothing to train


def train_beside(rank, size):
    """{(what rank 1 passes, bad rank): (norm, how many of its parameters moved, scale)}.

    Every rank has an adapter of its own; that of rank 1 is frozen.
    """
    found = {}
    for passes in ("frozen parameters", "no optimizer", "an optimizer without gradients"):
        for bad_rank in (None, *({0, size - 1} - {1})):  # rank 1 has nothing that could be bad
            found[passes, bad_rank] = train_beside_once(rank, passes, bad_rank)
    return found


def train_beside_once(rank, passes, bad_rank):
    adapter = nn.Linear(5, 2 + rank, bias=False)
    nn.init.zeros_(adapter.weight)
    adapter.requires_grad_(rank != 1 or passes == "an optimizer without gradients")
    optimizers = torch.optim.SGD(adapter.parameters(), lr=0.5)
    if rank == 1 and passes == "no optimizer":
        optimizers = ()
    scaler = ShardedGradScaler("cpu", init_scale=SCALE)
    scaler.attach(adapter, copies=shardscale.distinct)
    if rank != 1:
        scaler.scale(adapter(torch.ones(1, 5)).sum()).backward()
    else:
        scaler.begin()
    spoil(adapter, rank, bad_rank, INF)
    norm = scaler.clip_grad_norm_(optimizers, INF).item()
    scaler.step(optimizers)
    scaler.update()
    return norm, int(adapter.weight.count_nonzero()), scaler.get_scale()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_rank_with_nothing_to_train_decides_with_the_others(ranks, size):
    """Contract 43 and 45: see the name; with ranks 0 and 2, gradients of 1.0."""
    num_elements = [0 if rank == 1 else 5 * (2 + rank) for rank in range(size)]
    for rank, found in enumerate(ranks.run(train_beside, size)):
        for (passes, bad_rank), (norm, num_moved, scale) in found.items():
            if bad_rank is None:
                assert norm == pytest.approx(math.sqrt(sum(num_elements)), rel=ROUNDING), passes
                assert (num_moved, scale) == (num_elements[rank], SCALE), passes
            else:
                assert (norm, num_moved, scale) == (INF, 0, SCALE / 2), passes


def train_nothing(rank, size):
    """All is frozen, everywhere."""
    model = nn.Linear(5, 3).requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scaler = ShardedGradScaler("cpu", init_scale=SCALE)
    scaler.attach(model, copies=shardscale.distinct)
    scaler.begin()
    norm = scaler.clip_grad_norm_(optimizer, 1.0).item()
    scaler.step(optimizer)
    scaler.update()
    return norm, scaler.last_report().skipped


def test_no_gradient_on_any_rank_is_a_good_step_of_norm_zero(ranks):
    """Contract 43: see the name."""
    assert ranks.run(train_nothing, 2) == [(0.0, False)] * 2
