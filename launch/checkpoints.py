"""Checkpoints of a job: saved as a whole or not at all, and the newest one found again.

Each is a folder of torch.distributed.checkpoint, so a job of another size can load it::

    runs/a/step-00000400
    runs/a/step-00000600
    runs/a/step-00000800.partial    # a save that never ended; no one loads it

A program saves now and then, and begins by loading::

    step = load_newest("runs/a", model, optimizer, scaler)    # 0 if there is none
    while step < last_step:
        train_one_step()
        step += 1
        if step % 200 == 0:
            save("runs/a", step, model, optimizer, scaler)

The folder must be one that all ranks see, and belong to this job alone.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from shardscale import ShardedGradScaler

__all__ = ["load_newest", "save"]

_NAME = re.compile(r"step-(\d+)")
_UNFINISHED = (".partial", ".old")

T = TypeVar("T")


def save(
    folder: str | Path,
    step: int,
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    scaler: ShardedGradScaler,
    *,
    keep: int = 2,
) -> None:
    """Save the job as it is between two steps; once this returns, the checkpoint is complete.

    Wherever the job is killed, the newest complete checkpoint is this one or the one before.

    Args:
        folder: Where the checkpoints lie; made if need be.
        step: How many steps the job has finished.
        model: Wrapped as it is trained; likewise when it is loaded.
        optimizer: Of its parameters; one or several.
        scaler: After ``update()``.
        keep: How many complete checkpoints to leave, the new one among them; at least 1.

    Raises:
        RuntimeError: rank 0 could not tidy up or rename, on every rank.

    Collective: every rank of the job must call.
    """
    whole = Path(folder) / f"step-{step:08d}"
    partial = whole.with_suffix(".partial")
    _on_rank_0(lambda: _sweep(Path(folder)))
    model_state, optimizer_state = get_state_dict(model, optimizer)
    parts = {"model": model_state, "optimizer": optimizer_state, "scaler": scaler}
    dcp.save(parts, checkpoint_id=partial)
    _on_rank_0(lambda: _publish(partial, whole, keep))


def load_newest(
    folder: str | Path,
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    scaler: ShardedGradScaler,
) -> int:
    """Load the newest complete checkpoint, if there is one.

    Args:
        folder: Where :func:`save` put it.
        model: Wrapped as it was saved; over any number of ranks.
        optimizer: Of its parameters, of the same kinds as those that were saved.
        scaler: With a policy of the same kind.

    Returns:
        How many steps are finished, so the number of the step to go on with. 0 if there is none:
        then nothing was changed.

    Raises:
        RuntimeError: rank 0 could not look into the folder, on every rank.

    Collective: every rank of the job must call.
    """
    # All take what one of them has found: a network's file system may show them different lists.
    newest = _on_rank_0(lambda: max(_complete(Path(folder)), default=None))
    if newest is None:
        return 0
    step, path = newest
    model_state, optimizer_state = get_state_dict(model, optimizer)
    parts = {"model": model_state, "optimizer": optimizer_state, "scaler": scaler}
    dcp.load(parts, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    return step


def _complete(folder: Path) -> list[tuple[int, Path]]:
    """The complete checkpoints of a folder, oldest first."""
    matches = [(_NAME.fullmatch(path.name), path) for path in folder.glob("step-*")]
    return sorted((int(match[1]), path) for match, path in matches if match)


def _publish(partial: Path, whole: Path, keep: int) -> None:
    if whole.exists():  # saved twice at one step, as by a job that is stopped where it began
        _delete(whole)
    partial.rename(whole)
    for _, path in _complete(whole.parent)[:-keep]:
        _delete(path)


def _sweep(folder: Path) -> None:
    """Delete what earlier jobs were killed in the middle of."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.glob("step-*")):  # .old first: others may have to take its name
        if path.suffix in _UNFINISHED:
            _delete(path)


def _delete(path: Path) -> None:
    try:
        # Renamed first: a folder half deleted must not look like a checkpoint.
        shutil.rmtree(path.rename(path.with_suffix(".old")))
    except OSError as error:  # no reason to end a job
        warnings.warn(f"{path} could not be deleted: {error}", stacklevel=2)


def _on_rank_0(do: Callable[[], T]) -> T:
    """What ``do`` returned on rank 0, on every rank; or an error that says what it raised.

    Collective: every rank of the job must call.
    """
    told: list[tuple[T | None, str | None]] = [(None, None)]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            told = [(do(), None)]
        except OSError as error:
            told = [(None, f"rank 0: {error}")]
    if dist.is_initialized():
        dist.broadcast_object_list(told, src=0)
    result, problem = told[0]
    if problem is not None:
        raise RuntimeError(problem)
    return result  # type: ignore[return-value]
