"""How often the host waits for a number in one iteration.

Counted on two CPU ranks: every ``aten::_local_scalar_dense`` that the dispatcher sees (``item``,
``bool``, ``float``) and every ``tolist``, which goes past it. The third iteration counts, when all
is warm; gradients are good. Optimizers do nothing, because torch's own read their step counters.

Some of our reads exist only where the numbers already lie on the host. They are told apart by the
module that makes them, are listed in the note, and do not count:

* the message's words, where the state lives on the CPU; on an accelerator they are computed there,
* what a kernel asks of a gradient or factor on the CPU, and a policy of its own numbers,
* the finished iteration's page, which was copied to the host an iteration before it is read.

Whatever is not known to be of that kind counts. ``tests/gpu`` shows the same on a device, where a
read is an error.
"""

from __future__ import annotations

import collections
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from job import on_ranks
from parameters import FusedNoStep, NoStep, plain
from side_by_side import Row
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler as TorchShardedGradScaler
from torch.utils._python_dispatch import TorchDispatchMode

import shardscale
from shardscale import ShardedGradScaler

__all__ = ["rows"]

# Module of the library, or one function of it -> why its reads do not happen on an accelerator.
FREE = {
    "verdict": "the message, made and read by the host where the state lives there",
    "foreach": "a CPU kernel's own factor and sums",
    "base": "a number of the policy, which the host holds",
    "dynamic": "a number of the policy, which the host holds",
    "ledger.open": "the page of the iteration before",
    "sharded_grad_scaler": "torch's update on the CPU",
}
CALLS = ("step", "unscale_, step", "unscale_, clip, step")
LIBRARY = shardscale.__path__[0]


def rows() -> list[Row]:
    """One iteration with a fused optimizer, and with another."""
    theirs, ours = (on_ranks(count_reads, 2, is_ours)[0] for is_ours in (False, True))
    found = []
    for (kind, calls), reads in ours.items():
        goal = 0 if kind == "fused" else 1
        counted, free = split(reads)
        of_torch, free_of_torch = split(theirs[kind, calls])
        found.append(
            Row(
                f"host reads of {calls}, update; {kind} optimizer, 2 ranks",
                "",
                counted,
                of_torch,
                None,
                "",
                str(goal),
                counted <= goal,
                f"on the CPU alone, not counted: ours {free or 'none'}; "
                f"torch's {free_of_torch or 'none'}",
            )
        )
    return found


def split(reads: Mapping[tuple[str, str], int]) -> tuple[int, str]:
    """How many reads an accelerator would see, and in words those that it would not."""
    free: collections.Counter[str] = collections.Counter()
    counted = 0
    for (module, function), num in reads.items():
        why = FREE.get(module) or FREE.get(f"{module}.{function}")
        if why is None:
            counted += num
        else:
            free[why] += num
    return counted, ", ".join(f"{num} x {why}" for why, num in free.items())


def count_reads(
    rank: int, size: int, is_ours: bool
) -> dict[tuple[str, str], dict[tuple[str, str], int]]:
    """{(kind of optimizer, calls): {(module, function): reads}} of a third iteration."""
    found = {}
    for kind, optimizer_class in (("fused", FusedNoStep), ("other", NoStep)):
        for calls in CALLS:
            params = plain(4, 8)
            optimizer = optimizer_class(params)
            scaler: Any = (ShardedGradScaler if is_ours else TorchShardedGradScaler)(
                "cpu", init_scale=1.0
            )
            if is_ours:
                scaler.attach(torch.nn.ParameterList(params), copies=shardscale.distinct)
            for _ in range(3):
                with counting() as places:
                    scaler.scale(torch.ones(()))
                    if "unscale_" in calls and not (is_ours and "clip" in calls):
                        scaler.unscale_(optimizer)
                    if "clip" in calls and is_ours:
                        scaler.clip_grad_norm_(optimizer, 1.0)
                    elif "clip" in calls:
                        torch.nn.utils.clip_grad_norm_(params, 1.0)
                    scaler.step(optimizer)
                    scaler.update()
            found[kind, calls] = dict(places)
    return found


@contextmanager
def counting() -> Iterator[collections.Counter[tuple[str, str]]]:
    """Count host reads by the (module, function) of the library that asked, or of torch's class."""
    places: collections.Counter[tuple[str, str]] = collections.Counter()
    tolist = torch.Tensor.tolist

    def counted_tolist(tensor: torch.Tensor) -> Any:
        places[_asker()] += 1
        return tolist(tensor)

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func._opname == "_local_scalar_dense":
                places[_asker()] += 1
            return func(*args, **(kwargs or {}))

    torch.Tensor.tolist = counted_tolist
    try:
        with Reads():
            yield places
    finally:
        torch.Tensor.tolist = tolist


def _asker() -> tuple[str, str]:
    """The nearest function on the stack that belongs to the library, or to a scaler of torch's."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(LIBRARY) or path.endswith("grad_scaler.py"):
            return path.rsplit("/")[-1].removesuffix(".py"), frame.f_code.co_name
        frame = frame.f_back
    return "", ""
