"""The checks F1 to F10: a case, what is right on every rank, and the verdict on what they saw."""

from __future__ import annotations

import logging
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.amp import GradScaler
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler as TorchShardedGradScaler

from shardscale.doctor import cases
from shardscale.doctor.codes import Code, Failure
from shardscale.doctor.ground import Ground
from shardscale.doctor.sections import Judged, Section, by_value
from shardscale.owners import say_ranks
from shardscale.scaler import ShardedGradScaler

__all__ = ["Check", "CHECKS", "judge_ours", "judge_torchs", "see"]


class Check(NamedTuple):
    """One of ten ways to go wrong."""

    label: str
    promise: str
    case: cases.Case
    right: str
    """What every rank should see."""
    torchs: type[GradScaler]
    """Torch's class for such a job."""
    needs: int = 2
    """How many ranks it takes to go wrong."""


# The one that could leave torch's ranks waiting stands last.
CHECKS: Sequence[Check] = (
    Check(
        "F1",
        "a fused optimizer skips on all ranks or on none",
        cases.fused_step,
        "skipped, scale 2",
        TorchShardedGradScaler,
    ),
    Check(
        "F2",
        "Inf on every rank is one skip to a fused SGD",
        cases.inf_on_every_rank,
        "skipped, scale 2",
        TorchShardedGradScaler,
    ),
    Check(
        "F2b",
        "a fused Adam steps after unscale_",
        cases.fused_adam_after_unscale,
        "stepped, scale 4",
        TorchShardedGradScaler,
        needs=1,
    ),
    Check(
        "F3",
        "meshes of two shapes: all skip or none",
        cases.meshes_of_two_shapes,
        "skipped, scale 2",
        GradScaler,
    ),
    Check(
        "F4",
        "two dtypes on two axes are one all-reduce",
        cases.num_collectives,
        "sent 1",
        GradScaler,
    ),
    Check(
        "F4b",
        "a NaN on one replica stops the other",
        cases.nan_on_one_replica,
        "skipped, scale 2",
        GradScaler,
    ),
    Check(
        "F5",
        "plain and DTensor parameters share an optimizer",
        cases.plain_and_sharded,
        "stepped, scale 4",
        GradScaler,
        needs=1,
    ),
    Check(
        "F6",
        "pipeline stages keep one scale",
        cases.inf_in_the_last_stage,
        "skipped, scale 4",
        GradScaler,
    ),
    Check(
        "F8",
        "a float16 loss survives the default scale",
        cases.default_scale_of_a_float16_loss,
        "scaled 1.5 to 98304",
        TorchShardedGradScaler,
        needs=1,
    ),
    Check(
        "F9",
        "growth and backoff cannot be swapped by position",
        cases.order_of_arguments,
        "takes neither by position",
        TorchShardedGradScaler,
        needs=1,
    ),
    Check(
        "F10",
        "a good step is taken after many overflows",
        cases.many_overflows,
        "stepped",
        GradScaler,
        needs=1,
    ),
    Check(
        "F7",
        "a rank without gradients takes part",
        cases.rank_without_gradients,
        "stepped, scale 4",
        GradScaler,
    ),
)


def see(check: Check, scaler_class: type[GradScaler], ground: Ground) -> str:
    """Run the check's case with a class; whatever it raises is something seen.

    Collective: every rank of the ground must call.
    """
    if ground.device.type == "cuda":
        torch.cuda.set_device(ground.device)  # each thread has a current device of its own
    if ground.size < check.needs:
        return _too_few(check)
    with _quiet():
        try:
            return check.case(_maker(scaler_class, ground), ground)
        except Exception as error:  # noqa: BLE001 - a scaler under examination may raise anything
            text = textwrap.shorten(str(error), 110, placeholder=" ...")
            return f"raised {type(error).__name__}: {text}"


def judge_ours(check: Check, seen: Mapping[int, str]) -> Judged:
    """Our scaler has to be right on every rank."""
    words = _right(check, seen)
    if words:
        return Judged([_row("shardscale's scaler", check, words)])
    words = f"FAILED: {by_value(seen)}; right is: {check.right}"
    where = say_ranks(rank for rank, saw in seen.items() if saw != check.right)
    what = f"{check.label}, {check.promise}: wrong with shardscale's scaler on {where}."
    return Judged([_row("shardscale's scaler", check, words)], [Failure(Code.CHECK, what)])


def judge_torchs(check: Check, seen: Mapping[int, str]) -> Judged:
    """Torch's scaler is what it is: a defect of it is a fact."""
    words = _right(check, seen) or f"DEFECT: {by_value(seen)}"
    return Judged([_row("torch's scalers", check, words)])


def _right(check: Check, seen: Mapping[int, str]) -> str:
    """What to say where nothing is wrong; nothing where something is."""
    if all(saw == check.right for saw in seen.values()):
        return f"right: {check.right}"
    return _too_few(check) if all(saw == _too_few(check) for saw in seen.values()) else ""


def _too_few(check: Check) -> str:
    return f"needs {check.needs} ranks"


def _row(whose: str, check: Check, words: str) -> Section:
    return Section(whose, [(f"{check.label:4}{check.promise:48}", words)])


def _maker(scaler_class: type[GradScaler], ground: Ground) -> Callable[[float], GradScaler]:
    kind = ground.device.type
    if issubclass(scaler_class, ShardedGradScaler):
        return lambda scale: scaler_class(
            kind, init_scale=scale, process_group=ground.ours, timeout_s=ground.timeout_s
        )
    if issubclass(scaler_class, TorchShardedGradScaler):
        group = ground.line.get_group()
        return lambda scale: scaler_class(kind, init_scale=scale, process_group=group)
    return lambda scale: scaler_class(kind, init_scale=scale)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep skips and other things that are provoked here out of the user's log."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
