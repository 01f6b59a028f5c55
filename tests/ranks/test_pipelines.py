"""Pipelines that torch's own schedules drive: losses untouched, one verdict for all stages.

All seven schedules of torch 2.13 run on CPU ranks over Gloo. What torch cannot do there, with or
without a scaler, is in no test: DDP beside a schedule that splits the backward pass (replicas keep
gradients that nobody reduced); DDP stages that must find their own shapes ("rebuilt parameter
indices size is not same as original model parameters size", an internal assertion of its reducer);
FSDP2 units that reshard after each forward under a schedule that splits the backward pass
(gradients are lost in silence).
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.pipelining import ScheduleGPipe, SplitPoint, pipeline

import shardscale
from shardscale import ShardedGradScaler
from tests.ranks.models import batch, equal, local_grads, make_net, reference_grads
from tests.ranks.models.data_parallel import shard_each_layer
from tests.ranks.models.laid import local
from tests.ranks.models.pipeline import Pipe, replicated, sharded, weighted_sum
from tests.ranks.rank import outcome

INF = math.inf
OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=2.0**-6, momentum=0.5),
    "fused AdamW": lambda params: torch.optim.AdamW(params, lr=0.5, fused=True),
}
ROUNDING = 2.0**-22
"""Relative: a norm passes a few roundings to float32, of 2^-24 each."""


def make_optimizers(name, pipe):
    """On even ranks one for all stages held, on odd ranks one for each; none without parameters."""
    stages = [list(stage.parameters()) for stage in pipe.model]
    held = stages if dist.get_rank() % 2 else [list(pipe.model.parameters())]
    return [OPTIMIZERS[name](params) for params in held if params]


def same(some, others):
    """Whether two lists of tensors are equal in every bit that is not a NaN's, and in dtype."""
    return [t.dtype for t in some] == [t.dtype for t in others] and all(
        map(torch.equal, some, others)
    )


def held_by(pipe):
    """This rank's parts of the parameters."""
    return [local(p) for p in pipe.model.parameters()]


# ---------------------------------------------------------------- all schedules, beside one process

PLAN = [None, None, 0, 1, -1, None, None]
"""Per iteration, the stage with an Inf in its first gradient: none, the first, second or last."""
SCALES = [8.0, 16.0, 8.0, 4.0, 2.0, 2.0, 4.0]
"""After each iteration, growing at every second good one."""


def train(rank, size, name, **options):
    """What was found, for each optimizer and each way to weigh the micro-batches."""
    return {
        optimizer_name: train_one_way(optimizer_name, scale_grads, name, **options)
        for optimizer_name, scale_grads in (("SGD", True), ("fused AdamW", False))
    }


def train_one_way(optimizer_name, scale_grads, name, **options):
    """A pipeline beside one without a scaler, which leaves out the steps that must be skipped."""
    scaler = ShardedGradScaler("cpu", init_scale=8.0, growth_interval=2)
    scaled, plain = (
        Pipe(name, loss_fn, scale_grads=scale_grads, **options)
        for loss_fn in (scaler.wrap_loss(weighted_sum), weighted_sum)
    )
    scaler.attach(scaled.model, copies=shardscale.distinct)
    optimizers, plain_optimizers = (make_optimizers(optimizer_name, p) for p in (scaled, plain))
    found = {"losses": [], "gradients": [], "parameters": [], "scales": [], "norms": []}
    weight = 4.0 if scale_grads else 1.0
    for step, bad_stage in enumerate(PLAN):
        scaled.model.zero_grad()
        plain.model.zero_grad()
        if step % 2:
            scaler.begin()  # not needed with one update an iteration, and no harm
        losses, plain_losses = scaled.backward(step, weight), plain.backward(step, weight)
        found["losses"].append(same(losses, plain_losses) and len(losses))
        scale = scaler.get_scale()
        unscaled = [g * scale for g in local_grads(plain.model)]
        found["gradients"].append(same(local_grads(scaled.model), unscaled))
        if bad_stage is not None:
            spoil_stage(scaled, bad_stage)
        found["norms"] += judge_and_step(scaler, optimizers, ("clip", "step", "unscale")[step % 3])
        if bad_stage is None:
            for optimizer in plain_optimizers:
                optimizer.step()
        found["parameters"].append(same(held_by(scaled), held_by(plain)))
        found["scales"].append(scaler.get_scale())
        if step == 0:
            found["whole"] = scaled.whole()
    return found


def judge_and_step(scaler, optimizers, first_call):
    """The end of an iteration; the norm, where it was measured."""
    norms = []
    if first_call == "clip":
        norms.append(scaler.clip_grad_norm_(optimizers, INF).item())
    elif first_call == "unscale":
        scaler.unscale_(optimizers)
    scaler.step(optimizers)
    scaler.update()
    return norms


def spoil_stage(pipe, stage):
    """Put an Inf into a gradient of one stage, in the first of several pipelines."""
    stage %= pipe.num_stages
    if stage in pipe.indices and pipe.mesh.get_local_rank("dp") == 0:
        local_grads(pipe.stages[pipe.indices.index(stage)])[0].view(-1)[-1] = INF


def first_step(optimizer_name, num_batches):
    """Norm in float64 and parameters of one process after its first step."""
    net = make_net()
    grads = reference_grads(net, num_batches, 0)
    norm = math.sqrt(sum((g.double() ** 2).sum().item() for g in grads.values()))
    OPTIMIZERS[optimizer_name](net.parameters()).step()
    return norm, {name: p.detach() for name, p in net.named_parameters()}


BESIDE = {
    "alone": {},
    "DDP": {"num_pipes": 2, "beside": replicated},
    "FSDP2": {"num_pipes": 2, "beside": sharded},
}


@pytest.mark.parametrize(
    ("name", "beside", "size"),
    [
        ("GPipe", "alone", 5),  # rank 2 holds a ReLU, and no optimizer
        ("1F1B", "alone", 4),
        ("interleaved 1F1B", "alone", 2),
        ("looped BFS", "alone", 2),
        ("zero bubble", "alone", 2),
        ("ZBV", "alone", 2),
        ("DualPipeV", "alone", 2),
        ("interleaved 1F1B", "DDP", 4),
        ("zero bubble", "FSDP2", 4),
    ],
)
def test_a_scheduled_pipeline_is_one_process(ranks, name, beside, size):
    """Contract 40, 42, 43, 45: see the name.

    Losses equal those without a scaler and gradients are scaled, bit for bit, on all stages; an Inf
    on any of them is skipped by all; only the rank of the last one ever sees a loss. Bitwise,
    because scales are powers of two and, in the first step, all numbers whole.
    """
    num_pipes = BESIDE[beside].get("num_pipes", 1)
    results = ranks.run(train, size, name=name, **BESIDE[beside])
    for optimizer_name in OPTIMIZERS:
        norm, params = first_step(optimizer_name, num_pipes)
        all_found = [result[optimizer_name] for result in results]
        for found in all_found:
            assert found["losses"] in ([0] * len(PLAN), [4] * len(PLAN))
            assert found["gradients"] == found["parameters"] == [True] * len(PLAN)
            assert found["scales"] == SCALES
            assert found["norms"] == all_found[0]["norms"]
            assert found["norms"][0] == pytest.approx(norm, rel=ROUNDING)
            assert found["norms"][1] == INF
            assert equal(found["whole"], params)
        assert sum(found["losses"][0] == 4 for found in all_found) == num_pipes


def train_traced(rank, size):
    """Stages that torch has cut out of the network itself."""
    x = batch(0, 0)
    cut = pipeline(make_net(), mb_args=(x[:1],), split_spec={"3": SplitPoint.BEGINNING})
    stage = cut.build_stage(rank, torch.device("cpu"))
    scaler = ShardedGradScaler("cpu", init_scale=8.0)
    scaler.attach(stage.submod, copies=shardscale.distinct)
    loss_fn = scaler.wrap_loss(weighted_sum)
    schedule = ScheduleGPipe(stage, 4, loss_fn=loss_fn, scale_grads=False)
    optimizer = OPTIMIZERS["SGD"](stage.submod.parameters())
    losses = []
    schedule.step(*[x] if rank == 0 else [], target=torch.ones(4, 1), losses=losses)
    norm = scaler.clip_grad_norm_(optimizer, INF).item()
    scaler.step(optimizer)
    scaler.update()
    return norm, losses, {name: p.detach() for name, p in stage.submod.named_parameters()}


def test_a_traced_pipeline_is_one_process(ranks):
    norm, params = first_step("SGD", 1)
    first, last = ranks.run(train_traced, 2)
    assert equal(first[2] | last[2], params)
    assert first[0] == last[0] == pytest.approx(norm, rel=ROUNDING)
    assert first[1] == []
    assert same(last[1], list(make_net()(batch(0, 0)).sum(dim=1).detach()))


# ------------------------------------------------------------- one micro-batch too large, 16 bits


def sum_in_output_dtype(output, weight):
    """A loss of the network's own dtype."""
    return (output * weight.to(output.dtype)).sum()


LARGE = {torch.float32: 2.0**110, torch.float16: 2.0**7}
"""The weight of the third micro-batch's loss: finite itself, but not its scaled gradient."""


def weights_with_one_large(dtype):
    return torch.tensor([1.0, 1.0, LARGE[dtype], 1.0]).view(4, 1)


def overflow(rank, size, dtype):
    return {name: overflow_under(name, dtype) for name in ("1F1B", "ZBV")}


def overflow_under(name, dtype):
    """Train one batch until the scale is small enough for it; beside a pipeline without scaler."""
    scaler = ShardedGradScaler("cpu", init_scale=2.0**20)
    scaled = Pipe(name, scaler.wrap_loss(sum_in_output_dtype), dtype)
    plain = Pipe(name, sum_in_output_dtype, dtype)
    optimizers, plain_optimizers = (make_optimizers("SGD", p) for p in (scaled, plain))
    losses, scales, moved = [], [], []
    before = [p.clone() for p in held_by(scaled)]
    while not any(moved) and len(scales) < 20:
        scaled.model.zero_grad()
        plain.model.zero_grad()
        weight = weights_with_one_large(dtype)
        losses.append(same(scaled.backward(0, weight), plain.backward(0, weight)))
        scales.append(scaler.get_scale())
        scaler.step(optimizers)
        scaler.update()
        moved.append(not same(before, held_by(scaled)))
    for optimizer in plain_optimizers:
        optimizer.step()
    return all(losses), scales, moved, same(held_by(scaled), held_by(plain))


def scales_until_finite(dtype):
    """The scales that one process goes through, multiplying its losses by hand."""
    scales = [2.0**20]
    while True:
        net = make_net(dtype)
        for x, weight in zip(batch(0, 0, dtype), weights_with_one_large(dtype), strict=True):
            (sum_in_output_dtype(net(x), weight).float() * scales[-1]).backward()
        if all(p.grad.isfinite().all() for p in net.parameters()):
            return scales
        scales.append(scales[-1] / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_one_micro_batch_that_overflows_alone_is_a_skip(ranks, dtype):
    """Contract 40, 43: in float16 the loss has 16 bits, too, and keeps its dtype and value."""
    expected = scales_until_finite(dtype)
    assert len(expected) > 3
    for found in ranks.run(overflow, 2, dtype=dtype):
        for name, (losses, scales, moved, equals_plain) in found.items():
            assert losses, name
            assert scales == expected, name
            assert moved == [False] * (len(expected) - 1) + [True], name
            assert equals_plain, name


# ---------------------------------------------------------------- two updates between two backwards


def update_twice(rank, size, begins):
    """An optimizer each for weights and biases; the second steps after the first has overflowed."""
    scaler = ShardedGradScaler("cpu", init_scale=8.0)
    pipe = Pipe("GPipe", scaler.wrap_loss(weighted_sum))
    params = dict(pipe.stages[0].named_parameters())
    weights, biases = (
        OPTIMIZERS["SGD"]([p for name, p in params.items() if name.endswith(end)])
        for end in ("weight", "bias")
    )
    before = {name: p.detach().clone() for name, p in params.items()}
    if begins:
        scaler.begin()
    pipe.backward(0)
    spoil_stage(pipe, 1)
    scaler.step(weights)
    scaler.update()
    stepped = outcome(lambda: scaler.step(biases))
    after = {name: p.detach() for name, p in params.items()}
    return stepped.error, before, after, scaler.get_scale()


def test_a_stage_without_a_loss_begins_before_several_updates(ranks):
    """Contract 43: after `begin` all ranks know that the gradients have the scale from before."""
    _, params = first_step("SGD", 1)
    for error, before, after, scale in ranks.run(update_twice, 3, begins=True):
        assert (error, scale) == (None, 4.0)
        for name, p in after.items():
            assert torch.equal(p, params[name] if name.endswith("bias") else before[name]), name


def test_a_stage_that_forgot_to_is_a_disagreement_on_all(ranks):
    """Contract 46: two ranks of three would unscale by the newest scale; nothing moves."""
    for error, before, after, _ in ranks.run(update_twice, 3, begins=False):
        assert error == "DisagreementError"
        assert equal(before, after)


# ------------------------------------------------------------- one mesh, two readings of the others


def measure_on_part_of_the_ranks(rank, size):
    """{what lies on a mesh of two ranks, and what the scaler is told: the norm, or its error}."""
    stages = Pipe("1F1B", weighted_sum, num_pipes=2, beside=sharded)
    stages.backward(0)
    mesh, group = stages.mesh["dp"], stages.mesh.get_group("pp")
    copies = make_net()
    shard_each_layer(copies, mesh)
    (copies(batch(mesh.get_local_rank(), 0)).sum() * 2).backward()
    by_hand = Pipe("1F1B", weighted_sum, num_pipes=2)
    by_hand.backward(0)
    for p in by_hand.model.parameters():
        dist.all_reduce(p.grad, dist.ReduceOp.AVG, mesh.get_group())
    across, along = dist.get_process_group_ranks(group), mesh.get_group()
    return {
        key: measure(model, declared)
        for key, model, declared in [
            ("stages", stages.model, shardscale.distinct),
            ("copies, by ranks", copies, lambda name, param: across),
            ("copies, by group", copies, lambda name, param: group),
            ("copies, as if stages", copies, shardscale.distinct),
            ("stages, as if copies", stages.model, lambda name, param: across),
            ("stages by hand, copied", by_hand.model, lambda name, param: along),
            ("stages, undeclared", stages.model, None),
            ("copies, undeclared", copies, None),
        ]
    }


def measure(model, declared):
    # A scale of 1 leaves the gradients as they are, for the next reading.
    scaler = ShardedGradScaler("cpu", init_scale=1.0).attach(model, copies=declared)
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    clipped = outcome(lambda: scaler.clip_grad_norm_(optimizer, INF).item())
    return clipped.error or clipped.value


def test_what_lies_on_part_of_the_ranks_is_stages_or_copies_as_declared(ranks):
    """Contract 45: the mesh does not tell, and either guess would be wrong for the other."""
    norm, _ = first_step("SGD", 2)
    results = ranks.run(measure_on_part_of_the_ranks, 4)
    assert all(found == results[0] for found in results)
    found = results[0]
    for key in ("stages", "copies, by ranks", "copies, by group", "stages by hand, copied"):
        assert found[key] == pytest.approx(norm, rel=ROUNDING), key
    assert found["copies, as if stages"] == pytest.approx(norm * math.sqrt(2), rel=ROUNDING)
    # The first stage alone is counted, on ranks 0 and 1.
    first_stage = {"0.weight", "0.bias", "1.weight", "1.bias"}
    grads = reference_grads(make_net(), 2, 0)
    squares = sum(
        (g.double() ** 2).sum().item() for name, g in grads.items() if name in first_stage
    )
    assert found["stages, as if copies"] == pytest.approx(math.sqrt(squares), rel=ROUNDING)
    assert found["stages, undeclared"] == found["copies, undeclared"] == "LayoutError"
