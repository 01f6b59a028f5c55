"""A training step around a scaler, compiled or not, and what became of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from shardscale import ShardedGradScaler

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "loop SGD": lambda params: torch.optim.SGD(params, lr=0.5, momentum=0.5, foreach=False),
    "foreach SGD": lambda params: torch.optim.SGD(params, lr=0.5, momentum=0.5, foreach=True),
    "fused SGD": lambda params: torch.optim.SGD(params, lr=0.5, momentum=0.5, fused=True),
    "foreach AdamW": lambda params: torch.optim.AdamW(params, lr=0.5, foreach=True),
    "fused AdamW": lambda params: torch.optim.AdamW(params, lr=0.5, fused=True),
}
CALLS = ("step", "unscale_", "clip")
NUM_ITERATIONS = 8
SKIPPED = 5  # and the scale grows at iterations 2 and 4


class Trained(NamedTuple):
    """Numbers to compare, and what the compiler did for them."""

    numbers: list[Any]  # losses, scales, then the parameters and the optimizer's state
    breaks: int
    graphs: list[torch.fx.GraphModule]
    late: int  # frames compiled, or tried, after the second iteration


def net() -> nn.Module:
    """Two outputs: a sum of two numbers is the same in any order, whoever orders it."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))


def new_scaler(scaler_class: type = ShardedGradScaler) -> Any:
    return scaler_class("cpu", init_scale=16.0, growth_interval=2)


def make_step(model: nn.Module, optimizer: Any, scaler: Any, calls: str) -> Callable[..., Tensor]:
    is_ours = isinstance(scaler, ShardedGradScaler)

    def step(inputs: Tensor) -> Tensor:
        loss = model(inputs).square().mean()
        scaler.scale(loss).backward()
        if calls == "clip" and is_ours:
            scaler.clip_grad_norm_(optimizer, 1.0)
        elif calls != "step":
            scaler.unscale_(optimizer)
        if calls == "clip" and not is_ours:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss

    return step


def inputs_of(iteration: int, overflows: bool = True) -> Tensor:
    is_bad = overflows and iteration == SKIPPED
    return torch.full((2, 4), math.inf if is_bad else 1.0 + iteration % 2)


def train(
    model: nn.Module,
    kind: str,
    calls: str,
    backend: str | None,
    scaler_class: type = ShardedGradScaler,
    overflows: bool = True,
) -> Trained:
    """Eight iterations; ``backend`` None: not compiled."""
    counters.clear()
    optimizer = OPTIMIZERS[kind](model.parameters())
    scaler = new_scaler(scaler_class)
    if isinstance(scaler, ShardedGradScaler):
        scaler.attach(model)
    step = make_step(model, optimizer, scaler, calls)
    counter = CompileCounterWithBackend(backend or "eager")
    if backend is not None:
        step = torch.compile(step, backend=counter)
    numbers: list[Any] = []
    early = 0
    for i in range(NUM_ITERATIONS):
        numbers += [step(inputs_of(i, overflows)).item(), scaler.get_scale()]
        early = counters["frames"]["total"] if i == 1 else early
    states = [value for state in optimizer.state.values() for value in state.values()]
    tensors = [local(t).detach().clone() for t in (*model.parameters(), *states)]
    late = counters["frames"]["total"] - early
    breaks = sum(counters["graph_break"].values())
    return Trained([*numbers, *tensors], breaks, counter.graphs, late)


def local(tensor: Tensor) -> Tensor:
    return getattr(tensor, "_local_tensor", tensor)


def same_bits(one: list[Any], other: list[Any]) -> bool:
    """Whether all numbers are equal, a NaN to a NaN."""
    pairs = zip(one, other, strict=True)
    return all(torch.equal(*(bits(number) for number in pair)) for pair in pairs)


def bits(number: Any) -> Tensor:
    return torch.as_tensor(number, dtype=torch.float64).nan_to_num(nan=-1.5e300)


def operators(graphs: list[torch.fx.GraphModule]) -> set[str]:
    """The names of all that the graphs call."""
    return {str(node.target) for g in graphs for node in g.graph.nodes if "call" in node.op}
