"""Graph breaks, graphs and recompilations of a whole training step under ``torch.compile``.

The step is forward, ``scale``, backward, the calls named, ``update`` and ``zero_grad``. Ten
iterations, one of which is skipped; the scale grows before and after it. The model has two layers,
and the backend runs the graphs as they were traced: what is counted is settled before a backend
sees a graph. ``tests/compile`` goes through Inductor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch._dynamo
from job import on_ranks
from side_by_side import Row
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from shardscale import ShardedGradScaler

__all__ = ["rows"]

NUM_ITERATIONS = 10
SKIPPED = 5
CALLS = ("step", "unscale_, step", "clip, step")
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD loop": lambda params: torch.optim.SGD(params, lr=0.5, foreach=False),
    "SGD foreach": lambda params: torch.optim.SGD(params, lr=0.5, foreach=True),
    "SGD fused": lambda params: torch.optim.SGD(params, lr=0.5, fused=True),
    "AdamW foreach": lambda params: torch.optim.AdamW(params, lr=0.5, foreach=True),
    "AdamW fused": lambda params: torch.optim.AdamW(params, lr=0.5, fused=True),
}


ON_RANKS = ("AdamW foreach", "AdamW fused")
WHAT = ("graph breaks", "graphs", "frames compiled after the first iteration")


class Counts(NamedTuple):
    """What ten iterations came to."""

    breaks: int
    graphs: int
    late: int  # frames that were compiled, or tried to be, after the first iteration


def rows() -> list[Row]:
    """In one process, under DDP and under FSDP2."""
    alone = [count(nn.Module.train, list(OPTIMIZERS), is_ours) for is_ours in (False, True)]
    found = {"one process": alone}
    for name, lay in (("DDP", DistributedDataParallel), ("FSDP2", fsdp2)):
        both = [on_ranks(count_on_rank, 2, lay, is_ours)[0] for is_ours in (False, True)]
        found[f"{name}, 2 ranks"] = both
    return [
        Row(
            f"{what} of {calls}, update; {kind}, {layout}",
            "",
            ours[kind, calls][i],
            theirs[kind, calls][i],
            None,
            "",
            "<= torch's",
            ours[kind, calls][i] <= theirs[kind, calls][i],
            "torch's include those of the optimizer's own step" if what == "graphs" else "",
        )
        for i, what in enumerate(WHAT)
        for layout, (theirs, ours) in found.items()
        for kind, calls in ours
    ]


def fsdp2(model: nn.Module) -> nn.Module:
    return fully_shard(model)


def count_on_rank(
    rank: int, size: int, lay: Callable[[nn.Module], nn.Module], is_ours: bool
) -> Mapping[tuple[str, str], Counts]:
    return count(lay, ON_RANKS, is_ours)


def count(
    lay: Callable[[nn.Module], nn.Module], kinds: Sequence[str], is_ours: bool
) -> Mapping[tuple[str, str], Counts]:
    """By kind of optimizer and calls."""
    return {
        (kind, calls): count_one(lay, is_ours, kind, calls) for calls in CALLS for kind in kinds
    }


def count_one(
    lay: Callable[[nn.Module], nn.Module], is_ours: bool, kind: str, calls: str
) -> Counts:
    torch._dynamo.reset()
    counters.clear()
    model = lay(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1)))
    optimizer = OPTIMIZERS[kind](model.parameters())
    scaler: Any = (ShardedGradScaler if is_ours else torch.amp.GradScaler)(
        "cpu", init_scale=2.0**4, growth_interval=3
    )
    if is_ours:
        scaler.attach(model)

    def step(inputs: torch.Tensor) -> None:
        scaler.scale(model(inputs).square().mean()).backward()
        if calls == "unscale_, step" or (calls == "clip, step" and not is_ours):
            scaler.unscale_(optimizer)
        if calls == "clip, step" and is_ours:
            scaler.clip_grad_norm_(optimizer, 1.0)
        elif calls == "clip, step":
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    graphs = CompileCounterWithBackend("eager")
    first = 0
    compiled = torch.compile(step, backend=graphs)
    for i in range(NUM_ITERATIONS):
        compiled(torch.full((2, 4), math.inf if i == SKIPPED else 1.0))
        first = first or counters["frames"]["total"]
    late = counters["frames"]["total"] - first
    return Counts(sum(counters["graph_break"].values()), graphs.frame_count, late)
