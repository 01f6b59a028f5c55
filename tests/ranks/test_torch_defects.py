"""Ten ways in which torch 2.13's own scalers fail, shown on torch's class and absent from ours.

Every test runs the same case on both classes. On torch's it must end in `DefectError`, which is
raised only when *exactly* the known wrong result was seen: any other failure is a failure, and a
torch that has mended it is reported too.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler as TorchShardedGradScaler
from torch.distributed.tensor import DTensor, Replicate, Shard

from shardscale import ShardedGradScaler
from tests.ranks.counting import count_collectives
from tests.ranks.models import local
from tests.ranks.rank import outcome

ON_PINNED_TORCH = torch.__version__.startswith("2.13.")
INF, NAN = math.inf, math.nan


class DefectError(Exception):
    """The known wrong result, and no other, was seen."""


def judge(found, *, right, wrong):
    """Tell the defect from any other failure; ``wrong`` is the known result, or a predicate."""
    if wrong(found) if callable(wrong) else found == wrong:
        raise DefectError(found)
    assert found == right


def on(torch_class):
    """Parametrize over torch's class, which must show the defect, and ours, which must not.

    On any other torch than the pinned one the outcome is shown (-ra) but decides nothing.
    """
    shows_it = pytest.mark.xfail(
        raises=DefectError, strict=ON_PINNED_TORCH, reason="a defect of torch 2.13"
    )
    return pytest.mark.parametrize(
        "scaler_class",
        [
            pytest.param(torch_class, marks=shows_it, id="torch"),
            pytest.param(ShardedGradScaler, id="ours"),
        ],
    )


def parameter(values, grad):
    """A parameter whose gradient is, on its own, ``grad`` everywhere."""
    p = torch.nn.Parameter(values)
    p.grad = torch.full_like(values, grad)
    return p


def d_parameter(mesh, placements, grad, shape=(4, 4), dtype=torch.float32):
    """A DTensor parameter; ``grad`` fills this rank's shard only."""
    num_shards = math.prod(
        mesh.size(axis) for axis, placed in enumerate(placements) if not placed.is_replicate()
    )
    shard = torch.ones(shape[0] // num_shards, *shape[1:], dtype=dtype)
    p = torch.nn.Parameter(DTensor.from_local(shard, mesh, placements, run_check=False))
    p.grad = DTensor.from_local(torch.full_like(shard, grad), mesh, placements, run_check=False)
    return p


def skipped(params, call):
    """Whether ``call`` left every bit of every parameter alone."""
    before = [local(p).clone() for p in params]
    call()
    return all(torch.equal(a, local(p)) for a, p in zip(before, params, strict=True))


# ----------------------------------------------------------------------------------------------- F1


def step_fused_with_inf_on_rank_1(rank, size, scaler_class):
    p = parameter(torch.ones(3), INF if rank == 1 else 4.0)
    optimizer = torch.optim.AdamW([p], fused=True)
    scaler = scaler_class("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    was_skipped = skipped([p], lambda: scaler.step(optimizer))
    scaler.update()
    return was_skipped, scaler.get_scale()


@on(TorchShardedGradScaler)
def test_f1_fused_optimizers_skip_together(ranks, scaler_class):
    judge(
        ranks.run(step_fused_with_inf_on_rank_1, 2, scaler_class=scaler_class),
        right=[(True, 2.0), (True, 2.0)],
        wrong=[(False, 4.0), (True, 2.0)],
    )


def step_fsdp1_fused_with_inf_on_rank_1(rank, size, scaler_class):
    model = FullyShardedDataParallel(
        torch.nn.Linear(3, 5), device_id=torch.device("cpu"), use_orig_params=True
    )
    params = [p for p in model.parameters() if p.numel()]
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    scaler = scaler_class("cpu", init_scale=4.0)
    scaler.scale(model(torch.ones(2, 3)).sum()).backward()
    if rank == 1:
        params[-1].grad[0] = INF
    was_skipped = skipped(params, lambda: scaler.step(optimizer))
    scaler.update()
    return was_skipped, scaler.get_scale()


@on(TorchShardedGradScaler)
def test_f1_fsdp1_with_fused_adamw_skips_together(ranks, scaler_class):
    judge(
        ranks.run(step_fsdp1_fused_with_inf_on_rank_1, 2, scaler_class=scaler_class),
        right=[(True, 2.0), (True, 2.0)],
        wrong=[(False, 4.0), (True, 2.0)],
    )


# ----------------------------------------------------------------------------------------------- F2


def unscale_and_step_fused(rank, size, scaler_class, optimizer_class, grad):
    p = parameter(torch.ones(3), grad)
    optimizer = optimizer_class([p], lr=0.5, fused=True)
    scaler = scaler_class("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))

    def run():
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()

    # Adam's first step is lr, to within its eps of 1e-8: six digits.
    return outcome(run).message, [round(v, 6) for v in p.tolist()], scaler.get_scale()


@on(TorchShardedGradScaler)
def test_f2_inf_on_every_rank_is_one_inf_to_a_fused_sgd(ranks, scaler_class):
    judge(
        ranks.run(
            unscale_and_step_fused,
            2,
            scaler_class=scaler_class,
            optimizer_class=torch.optim.SGD,
            grad=INF,
        ),
        right=[("", [1.0] * 3, 2.0)] * 2,
        wrong=[("", [-INF] * 3, 2.0)] * 2,
    )


@on(TorchShardedGradScaler)
def test_f2_fused_adam_takes_the_flag_of_an_explicit_unscale(ranks, scaler_class):
    judge(
        ranks.run(
            unscale_and_step_fused,
            2,
            scaler_class=scaler_class,
            optimizer_class=torch.optim.Adam,
            grad=4.0,
        ),
        right=[("", [0.5] * 3, 4.0)] * 2,
        wrong=lambda found: all(
            message.startswith("output with shape [] doesn't match the broadcast shape [1]")
            for message, _, _ in found
        ),
    )


# ----------------------------------------------------------------------------------------------- F3


def step_on_meshes_of_two_shapes(rank, size, scaler_class, wide_first):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    narrow = d_parameter(mesh["dp"], [Shard(0)], 4.0)
    wide = d_parameter(mesh, [Shard(0), Shard(0)], INF if rank == 1 else 4.0)
    params = [wide, narrow] if wide_first else [narrow, wide]
    optimizer = torch.optim.SGD(params, lr=0.5)
    scaler = scaler_class("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    return skipped(params, lambda: scaler.step(optimizer))


@on(torch.amp.GradScaler)
def test_f3_all_agree_if_the_first_gradient_lives_on_fewer_ranks(ranks, scaler_class):
    """Contract 41: see the name."""
    judge(
        ranks.run(step_on_meshes_of_two_shapes, 4, scaler_class=scaler_class, wide_first=False),
        right=[True] * 4,
        wrong=[False, True, False, True],
    )


@pytest.mark.parametrize("scaler_class", [torch.amp.GradScaler, ShardedGradScaler])
def test_f3_all_agree_in_the_other_order(ranks, scaler_class):
    """The one order in which torch's class is right: what breaks it is the order alone."""
    found = ranks.run(step_on_meshes_of_two_shapes, 4, scaler_class=scaler_class, wide_first=True)
    assert found == [True] * 4


# ----------------------------------------------------------------------------------------------- F4


def count_for_two_dtypes_on_two_axes(rank, size, scaler_class):
    mesh = init_device_mesh("cpu", (2, 2))
    params = [
        d_parameter(mesh, [Shard(0), Shard(0)], 4.0, dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    optimizer = torch.optim.SGD(params, lr=0.5)
    scaler = scaler_class("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    with count_collectives() as counted:
        scaler.unscale_(optimizer)
    return counted.num


@on(torch.amp.GradScaler)
def test_f4_one_collective_for_several_dtypes_and_axes(ranks, scaler_class):
    """Torch: one for each pair of dtype and sharded axis, one after the other."""
    judge(
        ranks.run(count_for_two_dtypes_on_two_axes, 4, scaler_class=scaler_class),
        right=[1] * 4,
        wrong=[4] * 4,
    )


def step_with_nan_on_one_replica(rank, size, scaler_class):
    mesh = init_device_mesh("cpu", (2, 2))
    p = d_parameter(mesh, [Replicate(), Shard(0)], NAN if rank == 0 else 4.0)
    optimizer = torch.optim.SGD([p], lr=0.5)
    scaler = scaler_class("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    return skipped([p], lambda: scaler.step(optimizer))


@on(torch.amp.GradScaler)
def test_f4_a_nan_on_one_replica_stops_the_other(ranks, scaler_class):
    judge(
        ranks.run(step_with_nan_on_one_replica, 4, scaler_class=scaler_class),
        right=[True] * 4,
        wrong=[True, True, False, False],
    )


# ----------------------------------------------------------------------------------------------- F5


def step_plain_and_dtensor(rank, size, scaler_class):
    mesh = init_device_mesh("cpu", (size,))
    params = [parameter(torch.ones(3), 4.0), d_parameter(mesh, [Shard(0)], 4.0)]
    optimizer = torch.optim.SGD(params, lr=0.5, foreach=False)
    scaler = scaler_class("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    message = outcome(lambda: scaler.step(optimizer)).message
    return message, [local(p).flatten()[0].item() for p in params]


@on(torch.amp.GradScaler)
def test_f5_plain_and_dtensor_gradients_share_an_optimizer(ranks, scaler_class):
    """Contract 41: see the name."""
    judge(
        ranks.run(step_plain_and_dtensor, 2, scaler_class=scaler_class),
        right=[("", [0.5, 0.5])] * 2,
        wrong=lambda found: all(
            "got mixed torch.Tensor and DTensor" in message for message, _ in found
        ),
    )


# ----------------------------------------------------------------------------------------------- F6


def step_pipeline_with_inf_in_the_last_stage(rank, size, scaler_class):
    stages = [DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [2, 3])]
    p = d_parameter(stages[rank // 2], [Shard(0)], INF if rank == 3 else 8.0)
    optimizer = torch.optim.SGD([p], lr=0.5)
    scaler = scaler_class("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    was_skipped = skipped([p], lambda: scaler.step(optimizer))
    scaler.update()
    return was_skipped, scaler.get_scale()


@on(torch.amp.GradScaler)
def test_f6_pipeline_stages_keep_one_scale(ranks, scaler_class):
    """Contract 42: see the name."""
    judge(
        ranks.run(step_pipeline_with_inf_in_the_last_stage, 4, scaler_class=scaler_class),
        right=[(True, 4.0)] * 4,
        wrong=[(False, 8.0)] * 2 + [(True, 4.0)] * 2,
    )


# ----------------------------------------------------------------------------------------------- F7


def step_without_gradients_on_rank_1(rank, size, scaler_class):
    mesh = init_device_mesh("cpu", (size,))
    p = d_parameter(mesh, [Shard(0)], 4.0)
    if rank == 1:
        p.grad = None
    optimizer = torch.optim.SGD([p], lr=0.5)
    scaler = scaler_class("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    stepped = outcome(lambda: scaler.step(optimizer))
    return stepped.error, stepped.message, local(p).flatten()[0].item()


def _one_asserts_and_the_other_waits_in_vain(found):
    (waited, _, unmoved), (refused, text, _) = found
    return (
        refused == "AssertionError"
        and text == "No inf checks were recorded for this optimizer."
        and waited is not None
        and unmoved == 1.0
    )


@on(torch.amp.GradScaler)
def test_f7_a_rank_without_gradients_takes_part(ranks, scaler_class):
    """Contract 43: see the name."""
    judge(
        ranks.run(
            step_without_gradients_on_rank_1, 2, scaler_class=scaler_class, group_timeout_s=2.0
        ),
        right=[(None, "", 0.5), (None, "", 1.0)],
        wrong=_one_asserts_and_the_other_waits_in_vain,
    )


# ----------------------------------------------------------------------------------------------- F8


@on(TorchShardedGradScaler)
def test_f8_a_float16_loss_survives_the_default_scale(scaler_class):
    scaled = scaler_class("cpu").scale(torch.tensor(1.5, dtype=torch.float16))
    judge(scaled.item(), right=1.5 * 2**16, wrong=INF)


# ----------------------------------------------------------------------------------------------- F9


@pytest.mark.parametrize(
    ("torch_class", "third", "fourth"),
    [(torch.amp.GradScaler, 2.0, 0.5), (TorchShardedGradScaler, 0.5, 2.0)],
)
def test_f9_the_two_classes_of_torch_swap_two_positional_arguments(torch_class, third, fourth):
    scaler = torch_class("cpu", 4.0, third, fourth)
    assert (scaler.get_growth_factor(), scaler.get_backoff_factor()) == (2.0, 0.5)
    with pytest.raises(AssertionError, match="growth factor"):
        torch_class("cpu", 4.0, fourth, third)


@pytest.mark.parametrize("order", [(2.0, 0.5), (0.5, 2.0)])
def test_f9_growth_and_backoff_cannot_be_swapped_by_position(order):
    with pytest.raises(TypeError):
        ShardedGradScaler("cpu", 4.0, *order)


# ---------------------------------------------------------------------------------------------- F10


def recover_from_many_overflows(rank, size, scaler_class):
    p = parameter(torch.ones(3), 1.0)
    optimizer = torch.optim.SGD([p], lr=0.5)
    scaler = scaler_class("cpu", init_scale=2.0**-100)
    for _ in range(60):
        p.grad = torch.full_like(p, INF)
        scaler.scale(torch.ones(()))
        scaler.step(optimizer)
        scaler.update()
    at_the_bottom = scaler.get_scale()
    p.grad = torch.full_like(p, 2.0**-126)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    return at_the_bottom, p.tolist()


@on(torch.amp.GradScaler)
def test_f10_a_good_step_is_taken_after_any_number_of_overflows(ranks, scaler_class):
    """Torch: the scale sinks to zero, its reciprocal is inf, and a finite gradient destroys the
    model."""
    judge(
        ranks.run(recover_from_many_overflows, 1, backend=None, scaler_class=scaler_class),
        right=[(2.0**-126, [0.5] * 3)],
        wrong=[(0.0, [-INF] * 3)],
    )
