"""Loops in the shapes of real trainers, with torch's class, with ours, and without any scaling.

Where torch is right, all three go the same way, bit for bit: scales are powers of two, so scaling
rounds nothing away. Where torch is wrong, it goes exactly the wrong way that is claimed of it, and
ours goes the right one. Each number of ranks is one spawn that runs all loops.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler as TorchShardedGradScaler
from torch.nn.parallel import DistributedDataParallel

from shardscale import ShardedGradScaler
from tests.ranks.loops import (
    accelerate,
    gan,
    lightning,
    nanochat,
    pipeline,
    ray_train,
    torchtitan,
)
from tests.ranks.loops.data import Batches
from tests.ranks.loops.told import told
from tests.ranks.loops.trace import Trace
from tests.ranks.models import lay_out, make_net
from tests.ranks.models.data_parallel import shard_each_layer
from tests.ranks.rank import outcome

SIZES = (1, 2, 3, 4)
SEVERAL = (2, 3, 4)
SIZES_OF_FLOAT16 = (1, 2, 3)
"""For a long run: it takes the scale a while to become too large."""
FSDP1 = "FSDP1 FULL_SHARD original"
sgd = functools.partial(torch.optim.SGD, lr=2.0**-6, momentum=0.5)
fused_adamw = functools.partial(torch.optim.AdamW, lr=2.0**-6, fused=True)


class Case(NamedTuple):
    """A loop, and where it must lead."""

    run: Callable[..., Trace]
    """``run(scaler_class, rank, size)`` trains anew."""
    told: list[float | None]
    """What each call of ``step`` comes to; see ``loops.told``."""
    scales: list[float]
    """After each step."""
    torch_class: type = torch.amp.GradScaler
    torch_told: Callable[[int, int], list[float | None]] | None = None
    """Where torch is wrong: what its steps come to on a rank, given it and the bad one."""
    torch_scales: Callable[[int, int], list[float]] | None = None
    torch_error: str = ""
    """Where it raises: the beginning of the message, on all ranks but one without any error."""
    torch_run: Callable[..., Trace] | None = None
    """If torch cannot be made to do all that ours is."""
    sizes: tuple[int, ...] = SIZES


def bad_rank(size):
    """The one on which a gradient overflows."""
    return size - 1


def batches_of(rank, size, overflows_at=None):
    return Batches(rank, overflows_at, bad_rank(size))


# ---------------------------------------------------------------------------------- loops to be run


def run_nanochat(scaler_class, rank, size, overflows_at=None, **options):
    model, batches = make_net(), batches_of(rank, size, overflows_at)
    batches.spoil(model, [p for p in model.parameters() if p.ndim == 2])
    return nanochat.train(scaler_class, model, batches, 6, **options)


def run_torchtitan_in_float16(scaler_class, rank, size):
    """The scale grows until gradients overflow by themselves."""
    net = make_net()
    policy = MixedPrecisionPolicy(torch.float16, torch.float32)
    shard_each_layer(net, init_device_mesh("cpu", (size,)), mp_policy=policy)
    batches = batches_of(rank, size)
    return torchtitan.train(scaler_class, [net], batches, 20, sgd)


def run_torchtitan(scaler_class, rank, size, overflows_at=None, make_optimizer=sgd):
    net, batches = make_net(), batches_of(rank, size, overflows_at)
    parts = [net[:3], net[3:]]
    for part in parts:
        shard_each_layer(part, init_device_mesh("cpu", (size,)))
    batches.spoil(parts[0])  # the other one has no row for a fourth rank
    return torchtitan.train(scaler_class, parts, batches, 4, make_optimizer)


def run_torchtitan_with_tp(scaler_class, rank, size, overflows_at):
    model, batches = lay_out("FSDP2 and TP", size).model, batches_of(rank, size, overflows_at)
    batches.spoil(model, list(model.parameters())[2:])
    return torchtitan.train(scaler_class, [model], batches, 3, sgd, clips=False)


def run_torchtitan_with_plain(scaler_class, rank, size):
    """The last layer is left out of FSDP2; its gradients are averaged by hand."""
    net = make_net()
    plain = set(net[4].parameters())
    fully_shard(net, mesh=init_device_mesh("cpu", (size,)), ignored_params=plain)

    def average(p):
        dist.all_reduce(p.grad)
        p.grad.div_(size)

    for p in plain:
        p.register_post_accumulate_grad_hook(average)
    batches = batches_of(rank, size)
    return torchtitan.train(scaler_class, [net], batches, 4, sgd, clips=False)


def run_accelerate(
    scaler_class, rank, size, layout, overflows_at=None, make_optimizer=sgd, clips=True
):
    model, batches = lay_out(layout, size).model, batches_of(rank, size, overflows_at)
    batches.spoil(model)
    optimizers = [make_optimizer(model.parameters())]
    return accelerate.train(scaler_class, model, batches, 5, optimizers, clips)


def run_accelerate_with_two(scaler_class, rank, size, overflows_at=None, make_optimizer=sgd):
    """An optimizer for matrices and one for the rest."""
    model, batches = lay_out("DDP", size).model, batches_of(rank, size, overflows_at)
    matrices, others = (
        [p for p in model.parameters() if (p.ndim == 2) is are_matrices]
        for are_matrices in (True, False)
    )
    batches.spoil(model, matrices)
    optimizers = [make_optimizer(matrices), make_optimizer(others)]
    return accelerate.train(scaler_class, model, batches, 3, optimizers, clips=True)


def run_ray(
    scaler_class,
    rank,
    size,
    overflows_at=None,
    hits_critic=False,
    growth_interval=4,
    make_optimizer=sgd,
):
    nets = [DistributedDataParallel(make_net()) for _ in range(2)]
    batches = batches_of(rank, size, overflows_at)
    batches.spoil(nets[hits_critic])
    return ray_train.train(scaler_class, *nets, batches, 4, growth_interval, make_optimizer)


def run_lightning(scaler_class, rank, size, layout, overflows_at=None, make_optimizer=sgd):
    model, batches = lay_out(layout, size).model, batches_of(rank, size, overflows_at)
    batches.spoil(model)
    optimizer = make_optimizer(model.parameters())
    return lightning.train(scaler_class, model, batches, 6, optimizer)


def run_gan(scaler_class, rank, size, is_sharded, overflows_at=None, train=gan.train):
    discriminator = nn.Sequential(nn.Linear(3, 7), nn.LeakyReLU(0.25), nn.Linear(7, 1))
    with torch.no_grad():
        for p in discriminator.parameters():
            p.copy_(torch.arange(p.numel()).view_as(p) % 3 - 0.5)
    nets = [discriminator, make_net()]
    if is_sharded:
        for net in nets:
            shard_each_layer(net, init_device_mesh("cpu", (size,)))
    else:
        nets = [DistributedDataParallel(net) for net in nets]
    batches = batches_of(rank, size, overflows_at)
    batches.spoil(nets[0])
    return train(scaler_class, *nets, batches, 2)


def run_pipeline(scaler_class, rank, size, num_steps=4, overflows_at=None, scales_nothing=False):
    stage = nn.Sequential(nn.Linear(5, 5), nn.ReLU())
    with torch.no_grad():
        stage[0].weight.copy_(torch.eye(5) - 0.25)
        stage[0].bias.fill_(0.5)
    batches = batches_of(rank, size, overflows_at)
    batches.spoil(stage)
    return pipeline.train(scaler_class, stage, batches, num_steps, scales_nothing)


part = functools.partial


# ----------------------------------------------------------------------------- where torch is right

RIGHT = {
    "nanochat": Case(run_nanochat, [1.0] * 12, [8, 16, 16, 32, 32, 64]),
    "nanochat, overflow": Case(
        # The matrices' optimizer skips alone; there are two batches to a step.
        part(run_nanochat, overflows_at=5),
        [1.0] * 4 + [None] + [1.0] * 7,
        [8, 16, 8, 8, 16, 16],
    ),
    "torchtitan FSDP2": Case(run_torchtitan, [1.0] * 4, [8, 16, 16, 32]),
    "torchtitan FSDP2, overflow": Case(
        part(run_torchtitan, overflows_at=2, make_optimizer=fused_adamw),
        [1.0, 1.0, None, 1.0],
        [8, 16, 8, 8],
    ),
    **{
        f"Accelerate {layout}{', overflow' if overflows else ''}": Case(
            part(run_accelerate, layout=layout, overflows_at=5 if overflows else None),
            [1.0, 1.0, None, 1.0, 1.0] if overflows else [1.0] * 5,
            [8, 8, 4, 4, 4] if overflows else [8, 8, 8, 16, 16],
            torch_class=TorchShardedGradScaler if layout == FSDP1 else torch.amp.GradScaler,
            sizes=SEVERAL if layout == FSDP1 else SIZES,
        )
        for layout in ("DDP", FSDP1, "FSDP2")
        for overflows in (False, True)
    },
    "Ray Train": Case(run_ray, [1.0] * 8, [8, 16, 16, 32]),
    "Ray Train, overflow in the second": Case(
        part(run_ray, overflows_at=2, hits_critic=True),
        [1.0] * 5 + [None] + [1.0] * 2,
        [8, 16, 8, 8],
    ),
    "Lightning DDP": Case(part(run_lightning, layout="DDP"), [1.0] * 6, [8, 16, 16, 32, 32, 64]),
    "Lightning DDP, fused, overflow": Case(
        part(run_lightning, layout="DDP", make_optimizer=fused_adamw, overflows_at=2),
        [1.0, 1.0, None, 1.0, 1.0, 1.0],
        [8, 16, 8, 8, 16, 16],
    ),
    "GAN DDP": Case(part(run_gan, is_sharded=False), [1.0] * 6, [8, 16, 16, 32, 32, 64]),
    "GAN FSDP2, overflow": Case(
        # In the second step of the discriminator's pair: the generator's gradients come after it.
        part(run_gan, is_sharded=True, overflows_at=4),
        [1.0] * 4 + [None, 1.0],
        [8, 16, 16, 32, 16, 16],
    ),
    "GAN with Accelerate, overflow": Case(
        # What the other network's turn unscaled in vain must not be taken for done.
        part(run_gan, is_sharded=False, overflows_at=1, train=accelerate.train_in_turns),
        [1.0, None, 1.0, 1.0],
        [8, 4, 4, 4],
    ),
    "pipeline, zeros scaled": Case(
        part(run_pipeline, scales_nothing=True), [1.0] * 4, [8, 16, 16, 32]
    ),
}

# ----------------------------------------------------------------------------- where torch is wrong

WRONG = {
    **{
        f"Ray Train{kind}, overflow in the first": Case(
            # The critic's gradients, made at 16, are divided by 8.
            part(run_ray, overflows_at=2, make_optimizer=make_optimizer),
            [1.0] * 4 + [None] + [1.0] * 3,
            [8, 16, 8, 8],
            torch_told=lambda rank, bad: [1.0] * 4 + [None, 2.0] + [1.0] * 2,
        )
        for kind, make_optimizer in (("", sgd), (", fused", fused_adamw))
    },
    "Ray Train, the scale grows between the two": Case(
        part(run_ray, growth_interval=5),
        [1.0] * 8,
        [8, 8, 16, 16],
        torch_told=lambda rank, bad: [1.0] * 5 + [0.5] + [1.0] * 2,
    ),
    # torch forgets at the first update that the second is unscaled, and divides it again.
    **{
        f"Accelerate, two optimizers clipped{kind}": Case(
            part(run_accelerate_with_two, make_optimizer=make_optimizer),
            [1.0] * 6,
            [8, 16, 16],
            torch_told=lambda rank, bad: [1.0, 1 / 8, 1.0, 1 / 8, 1.0, 1 / 16],
        )
        for kind, make_optimizer in (("", sgd), (", fused", fused_adamw))
    },
    "Accelerate, two optimizers clipped, overflow in the first": Case(
        part(run_accelerate_with_two, overflows_at=3),
        [1.0, 1.0, None, 1.0, 1.0, 1.0],
        [8, 4, 4],
        torch_told=lambda rank, bad: [1.0, 1 / 8, None, 1 / 4, 1.0, 1 / 4],
    ),
    # From here on the overflow is one rank's, in the last step: afterwards torch's ranks would mix
    # gradients of two scales.
    "Accelerate FSDP1, fused, overflow": Case(
        part(
            run_accelerate,
            layout=FSDP1,
            overflows_at=9,
            make_optimizer=fused_adamw,
            clips=False,
        ),
        [1.0] * 4 + [None],
        [8, 8, 8, 16, 8],
        torch_class=TorchShardedGradScaler,
        torch_told=lambda rank, bad: [1.0] * 4 + [None if rank == bad else 1.0],
        torch_scales=lambda rank, bad: [8, 8, 8, 16, 8 if rank == bad else 16],
        sizes=SEVERAL,
    ),
    "Lightning FSDP1, fused, overflow": Case(
        part(run_lightning, layout=FSDP1, overflows_at=5, make_optimizer=fused_adamw),
        [1.0] * 5 + [None],
        [8, 16, 16, 32, 32, 16],
        torch_class=TorchShardedGradScaler,
        torch_told=lambda rank, bad: [1.0] * 5 + [None if rank == bad else 1.0],
        torch_scales=lambda rank, bad: [8, 16, 16, 32, 32, 16 if rank == bad else 64],
        sizes=SEVERAL,
    ),
    "Accelerate FSDP1, fused, clipped": Case(
        part(run_accelerate, layout=FSDP1, make_optimizer=fused_adamw),
        [1.0] * 5,
        [8, 8, 8, 16, 16],
        torch_class=TorchShardedGradScaler,
        torch_error="output with shape [] doesn't match the broadcast shape [1]",
        sizes=SEVERAL,
    ),
    "torchtitan FSDP2 and TP, overflow": Case(
        part(run_torchtitan_with_tp, overflows_at=2),
        [1.0, 1.0, None],
        [8, 16, 8],
        torch_told=lambda rank, bad: [1.0, 1.0, None if rank % 2 == bad % 2 else 1.0],
        torch_scales=lambda rank, bad: [8, 16, 8 if rank % 2 == bad % 2 else 16],
        sizes=(4,),
    ),
    "torchtitan FSDP2 beside plain parameters": Case(
        run_torchtitan_with_plain,
        [1.0] * 4,
        [8, 16, 16, 32],
        torch_error="aten._amp_foreach_non_finite_check_and_unscale_.default: got mixed",
        sizes=SEVERAL,
    ),
    "pipeline, zeros scaled, overflow": Case(
        part(run_pipeline, overflows_at=3, scales_nothing=True),
        [1.0] * 3 + [None],
        [8, 16, 16, 8],
        torch_told=lambda rank, bad: [1.0] * 3 + [None if rank == bad else 1.0],
        torch_scales=lambda rank, bad: [8, 16, 16, 8 if rank == bad else 32],
        sizes=SEVERAL,
    ),
    "pipeline, overflow": Case(
        part(run_pipeline, overflows_at=3),
        [1.0] * 3 + [None],
        [8, 16, 16, 8],
        # One step: the last rank would wait for those that raised.
        torch_run=part(run_pipeline, num_steps=1),
        torch_error="Attempted step but _scale is None.",
        sizes=SEVERAL,
    ),
}


# ----------------------------------------------------------------------- what torch cannot be given

BY_OURS_ALONE = {
    # With torch's class these ranks would fall out of step within the optimizers' collectives.
    "nanochat, its reduction of flags left out": Case(
        part(run_nanochat, overflows_at=5, reduces_flags=False),
        [1.0] * 4 + [None] + [1.0] * 7,
        [8, 16, 8, 8, 16, 16],
    ),
}


# ----------------------------------------------------------------------------------------- the runs


def examine(rank, size):
    """{case: {who: trace or message}} of this rank."""
    found = {}
    for name, case in (RIGHT | WRONG | BY_OURS_ALONE).items():
        if size not in case.sizes:
            continue
        found[name] = traces = {
            "ours": case.run(ShardedGradScaler, rank, size),
            "told": case.run(told(case.told), rank, size),
        }
        if name in BY_OURS_ALONE:
            continue
        run = case.torch_run or case.run
        trained = outcome(lambda run=run, case=case: run(case.torch_class, rank, size))
        traces["torch"] = trained.message or trained.value
        if case.torch_told is not None:
            claimed = told(case.torch_told(rank, bad_rank(size)))
            traces["torch told"] = case.run(claimed, rank, size)
    if size in SIZES_OF_FLOAT16:
        found["float16"] = {
            who: run_torchtitan_in_float16(scaler_class, rank, size)
            for who, scaler_class in (("ours", ShardedGradScaler), ("torch", torch.amp.GradScaler))
        }
    return found


@pytest.fixture(scope="module")
def examined(ranks):
    """``examined(size)``: what each rank found; spawned once for each number of ranks."""
    tried = functools.cache(lambda size: _tried(lambda: ranks.run(examine, size, limit_s=90)))

    def look(size):
        found = tried(size)
        if isinstance(found, Exception):  # raised again for each test that would have looked
            raise found
        return found

    return look


def _tried(call):
    try:
        return call()
    except Exception as error:
        return error


def on_every_size(cases):
    return pytest.mark.parametrize(
        ("name", "size"), [(name, size) for name, case in cases.items() for size in case.sizes]
    )


@on_every_size(RIGHT)
def test_with_nothing_changed_but_the_import_a_loop_goes_the_same_way(examined, name, size):
    case = RIGHT[name]
    for found in examined(size):
        traces = found[name]
        assert traces["ours"].scales == case.scales
        assert traces["ours"] == traces["torch"]
        assert traces["ours"].without_scaler() == traces["told"].without_scaler()


@pytest.mark.parametrize("size", SIZES_OF_FLOAT16)
def test_float16_that_overflows_by_itself_goes_the_same_way(examined, size):
    """Beside torch alone: without a scale, small gradients have fewer bits in float16."""
    for found in examined(size):
        ours = found["float16"]["ours"]
        falls = [after < before for before, after in itertools.pairwise(ours.scales)]
        assert sum(falls) >= 2
        assert ours == found["float16"]["torch"]


@on_every_size(WRONG | BY_OURS_ALONE)
def test_where_torch_goes_wrong_ours_goes_as_without_scaling(examined, name, size):
    case = (WRONG | BY_OURS_ALONE)[name]
    for found in examined(size):
        traces = found[name]
        assert traces["ours"].scales == case.scales
        assert traces["ours"].without_scaler() == traces["told"].without_scaler()


@on_every_size(WRONG)
def test_torch_goes_wrong_as_claimed(examined, name, size):
    """A torch that has mended it is to be told of here, and in the docs."""
    case = WRONG[name]
    all_traces = [found[name] for found in examined(size)]
    if case.torch_error:
        messages = [t["torch"] for t in all_traces if isinstance(t["torch"], str)]
        assert all(message.startswith(case.torch_error) for message in messages)
        assert len(messages) >= size - 1
        return
    for rank, traces in enumerate(all_traces):
        assert traces["torch"].without_scaler() == traces["torch told"].without_scaler()
        if case.torch_scales is not None:
            assert traces["torch"].scales == case.torch_scales(rank, bad_rank(size))
    assert any(traces["torch told"] != traces["told"] for traces in all_traces)


@pytest.mark.parametrize("size", SIZES)
def test_accelerate_sees_a_skip_of_a_plain_optimizer(examined, size):
    for found in examined(size):
        for layout in ("DDP", "FSDP2"):
            skipped = found[f"Accelerate {layout}, overflow"]["ours"].skipped
            assert skipped == [False, False, True, False, False]
        in_turns = found["GAN with Accelerate, overflow"]["ours"].skipped
        assert in_turns == [False, True, True, False]


@pytest.mark.parametrize("size", SEVERAL)
def test_accelerate_sees_no_skip_of_a_fused_optimizer(examined, size):
    """With either class: the kernel itself leaves out the step, so `optimizer.step` is called."""
    for found in examined(size):
        for who in ("torch", "ours"):
            assert found["Accelerate FSDP1, fused, overflow"][who].skipped == [False] * 5


@on_every_size(RIGHT | WRONG)
def test_the_loops_train(examined, name, size):
    """Every step moves the weights but those to be skipped: bits that stand still prove nothing."""
    case = (RIGHT | WRONG)[name]
    steps_at_once = len(case.told) // len(case.scales)
    wanted = [
        any(case.told[i * steps_at_once : (i + 1) * steps_at_once]) for i in range(len(case.scales))
    ]
    for found in examined(size):
        weights = found[name]["ours"].weights
        moved = [a != b for a, b in itertools.pairwise(weights)]
        assert moved == wanted[1:]
