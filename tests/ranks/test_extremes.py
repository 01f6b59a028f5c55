"""Gradients at both ends of their dtype: the norm is still one process's, and clipping too."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from shardscale import ShardedGradScaler, distinct
from tests.ranks.models import local

INF = math.inf
LARGEST = torch.finfo(torch.float32).max
SMALLEST = 2.0**-149  # of float32, subnormal
ROUNDING = 2.0**-22
"""Relative: a norm or a factor passes a few roundings to float32, of 2^-24 each."""


class Extreme(NamedTuple):
    """Gradients of one size."""

    dtype: torch.dtype
    values: tuple[float, ...]  # repeated over all elements
    scale: float = 8.0  # times which they must be finite

    def whole(self, num: int) -> Tensor:
        """(num,) of this dtype: one parameter's unscaled gradient."""
        repeated = [self.values[i % len(self.values)] for i in range(num)]
        return torch.tensor(repeated, dtype=torch.float64).to(self.dtype)


FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
EXTREMES = [
    *(Extreme(dtype, (value,)) for dtype in (FP32, BF16) for value in (1e20, -1e30, 1e-40)),
    *(Extreme(dtype, (3e38,), scale) for dtype in (FP32, BF16) for scale in (1.0, 0.5)),
    Extreme(FP32, (1e-45,)),  # one unit in the last place of the smallest numbers
    Extreme(FP32, (1e-45, 0.0, -3e-45)),
    Extreme(FP32, (1e19, 1e-19, 1e-40)),
    Extreme(FP32, (3e38, 1e-45, 1.0), 1.0),
    Extreme(BF16, (3e38, 1e-40, 1.0), 1.0),
    Extreme(FP16, (65504.0,), 1.0),
    Extreme(FP16, (6e-8,)),
    Extreme(FP16, (60000.0, 6e-8, 1.0), 1.0),
]
NUMS = {"by hand": 9, "shard": 5, "replica": 3, "copies": 2}
"""How many elements each of the four parameters has."""
CLIPS = (INF, 1.0, 1e-3)


def lay(wholes, rank, size):
    """Uneven, with nothing by hand on rank 1, and on four ranks no shard of five on the last."""
    mesh = init_device_mesh("cpu", (size,))
    ends = {2: (4, 9), 3: (4, 4, 9), 4: (4, 4, 8, 9)}[size]
    begin = ends[rank - 1] if rank else 0
    return {
        "by hand": wholes["by hand"][begin : ends[rank]].clone(),
        "shard": distribute_tensor(wholes["shard"], mesh, [Shard(0)]),
        "replica": distribute_tensor(wholes["replica"], mesh, [Replicate()]),
        "copies": wholes["copies"].clone(),
    }


def clip(rank, size):
    """{(extreme, max_norm): (norm, clipped gradients in full, found_inf)}."""
    found = {}
    for extreme in EXTREMES:
        grads = lay({name: extreme.whole(num) for name, num in NUMS.items()}, rank, size)
        for max_norm in CLIPS:
            found[extreme, max_norm] = clip_once(size, grads, extreme.scale, max_norm)
    return found


def clip_once(size, grads, scale, max_norm):
    model = nn.ParameterDict({name: nn.Parameter(g.clone()) for name, g in grads.items()})
    for name, g in grads.items():
        model[name].grad = g * scale
    scaler = ShardedGradScaler("cpu", init_scale=scale)
    scaler.attach(model, copies=lambda name, p: range(size) if name == "copies" else None)
    optimizer = torch.optim.SGD(model.values(), lr=0.0, foreach=False)
    norm = scaler.clip_grad_norm_(optimizer, max_norm).item()
    found_inf = scaler.verdict(optimizer).found_inf.item()
    return norm, {name: local(p.grad) for name, p in model.items()}, found_inf


def pieces_of(name, results, key):
    """One parameter's clipped gradient, put together from all ranks; each replica for itself."""
    pieces = [found[key][1][name] for found in results]
    return [torch.cat(pieces)] if name in ("by hand", "shard") else pieces


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_norm_of_extreme_gradients_is_that_of_one_process(ranks, size):
    """Contract 45: against float64, in which the square of any float32 is a normal number.

    A norm beyond float32 is told as the largest float32; it is finite, and clipping uses the true
    one. The factor is a float32, too: where it is subnormal it is as coarse as these are.
    """
    results = ranks.run(clip, size)
    assert results[0].keys() == results[-1].keys() and len(results[0]) == 3 * len(EXTREMES)
    for extreme, max_norm in results[0]:
        case = f"{extreme}, clipped to {max_norm}"
        wholes = {name: extreme.whole(num).double() for name, num in NUMS.items()}
        norm = math.sqrt(sum(g.square().sum().item() for g in wholes.values()))
        factor = min(1.0, max_norm / (norm + 1e-6))
        [told] = {found[extreme, max_norm][0] for found in results}
        assert told == pytest.approx(min(norm, LARGEST), rel=ROUNDING, abs=SMALLEST), case
        assert {found[extreme, max_norm][2] for found in results} == {0.0}, case
        info = torch.finfo(extreme.dtype)
        for name, whole in wholes.items():
            for clipped in pieces_of(name, results, (extreme, max_norm)):
                torch.testing.assert_close(
                    clipped.double(),
                    whole * factor,
                    rtol=ROUNDING + info.eps / 2 + SMALLEST / 2 / factor,
                    atol=info.smallest_normal * info.eps,
                    msg=f"{case}: {name}",
                )
                if factor == 1.0:
                    assert torch.equal(clipped.double(), whole), case


def overflow(rank, size):
    """{(dtype, scale, bad rank): (norm, found_inf)}: finite where scaled, not where unscaled."""
    found = {}
    for dtype, value in ((FP32, 3e38), (BF16, 3e38), (FP16, 6e4)):
        for bad_rank in (None, *range(size)):
            p = nn.Parameter(torch.zeros(3, dtype=dtype))
            p.grad = torch.full_like(p, value if rank == bad_rank else value / 4)
            scaler = ShardedGradScaler("cpu", init_scale=0.5)
            scaler.attach(nn.ParameterList([p]), copies=distinct)
            optimizer = torch.optim.SGD([p], lr=0.0)
            norm = scaler.clip_grad_norm_(optimizer, INF).item()
            found[dtype, bad_rank] = norm, scaler.verdict(optimizer).found_inf.item()
    return found


def test_gradients_that_overflow_when_unscaled_are_found_by_all(ranks):
    """Contract 40: a scale below 1 multiplies."""
    for found in ranks.run(overflow, 3):
        for (dtype, bad_rank), (norm, found_inf) in found.items():
            assert found_inf == (0.0 if bad_rank is None else 1.0), (dtype, bad_rank)
            assert math.isfinite(norm) == (bad_rank is None), (dtype, bad_rank)
