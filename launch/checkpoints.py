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

import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from shardscale import ShardedGradScaler

__all__ = ["CheckpointError", "load_newest", "save"]

_NAME = re.compile(r"step-(\d+)(?:\.(\d+))?")
_UNFINISHED = (".partial", ".old")

T = TypeVar("T")


class CheckpointError(RuntimeError):
    """The folder or what is in it cannot be used; every rank raises it."""


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

    Wherever the job is killed, the newest complete checkpoint is this one or the one before. Steps
    only grow: to save one that is lower than the newest would be in vain, as it is the newest that
    is loaded. One that is saved again lies beside the one before, as ``step-00000400.1``, which
    counts as newer.

    Args:
        folder: Where the checkpoints lie; made if need be.
        step: How many steps the job has finished.
        model: Wrapped as it is trained; likewise when it is loaded.
        optimizer: Of its parameters; one or several.
        scaler: After ``update()``.
        keep: How many complete checkpoints to leave, the new one among them; at least 1.

    Raises:
        CheckpointError: on every rank: ``keep`` is below 1 or ``step`` below 0, the folder has a
            complete checkpoint of a later step, a rank could not write or wrote elsewhere, or rank
            0 could not tidy up or rename.

    Collective: every rank of the job must call.
    """
    partial = Path(folder) / f"step-{step:08d}.partial"
    _on_rank_0(lambda: _prepare(Path(folder), step, keep))
    model_state, optimizer_state = get_state_dict(model, optimizer)
    parts = {"model": model_state, "optimizer": optimizer_state, "scaler": scaler}
    with _in_a_sentence(f"{partial} could not be saved", "Make room, or name another folder."):
        metadata = dcp.save(parts, checkpoint_id=partial)
    _on_rank_0(lambda: _publish(partial, step, keep, metadata))


def load_newest(
    folder: str | Path,
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    scaler: ShardedGradScaler,
) -> int:
    """Load the newest complete checkpoint, if there is one.

    What has the name of a checkpoint but is none is passed over, with a warning on rank 0.

    Args:
        folder: Where :func:`save` put it.
        model: Wrapped as it was saved; over any number of ranks.
        optimizer: Of its parameters, of the same kinds as those that were saved.
        scaler: With a policy of the same kind.

    Returns:
        How many steps are finished, so the number of the step to go on with. 0 if there is none:
        then nothing was changed.

    Raises:
        CheckpointError: on every rank: rank 0 could not look into the folder, or the newest
            checkpoint is broken or of another model or optimizer; then what was read before that
            stays in the parameters. A folder that does not exist is no error; it has no checkpoint.

    Collective: every rank of the job must call.
    """
    # All take what one of them has found: a network's file system may show them different lists.
    newest = _on_rank_0(lambda: _newest(Path(folder)))
    if newest is None:
        return 0
    model_state, optimizer_state = get_state_dict(model, optimizer)
    parts = {"model": model_state, "optimizer": optimizer_state, "scaler": scaler}
    cure = (
        "Load it into a job like the one that saved it, or name another folder. If its files are "
        "broken, move it away, and the one before it is loaded."
    )
    with _in_a_sentence(f"{newest.path} could not be loaded", cure):
        dcp.load(parts, checkpoint_id=newest.path)
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    return newest.step


class _Found(NamedTuple):
    """What has the name of a checkpoint; of two, the newer one is the greater."""

    step: int
    again: int  # how many times the step had been saved before
    path: Path

    def is_complete(self) -> bool:
        """Whether it is a checkpoint; its metadata is written last."""
        try:
            (self.path / ".metadata").stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True


def _newest(folder: Path) -> _Found | None:
    for found in reversed(_named(folder)):
        if found.is_complete():
            return found
        warnings.warn(f"{found.path} is no checkpoint: it has no file .metadata", stacklevel=2)
    return None


def _named(folder: Path) -> list[_Found]:
    """What has the name of a checkpoint, oldest first."""
    try:
        # Not glob, for which a folder that cannot be read is an empty one.
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(
            f"the folder of checkpoints cannot be read: {error}. Name one that all ranks can read "
            "and write, or that does not exist yet."
        ) from error
    matches = [match for name in names if (match := _NAME.fullmatch(name))]
    return sorted(_Found(int(m[1]), int(m[2] or 0), folder / m[0]) for m in matches)


def _prepare(folder: Path, step: int, keep: int) -> None:
    """Make the folder, and delete what earlier jobs were killed in the middle of."""
    for name, number, low in (("keep", keep, 1), ("step", step, 0)):
        if number < low:
            raise CheckpointError(f"{name} is {number}, but must be at least {low}.")
    newest = _newest(folder)
    if newest and newest.step > step:
        raise CheckpointError(
            f"step {step} is to be saved, but {newest.path} is of a later one, with which the next "
            "job would go on. Go on from there with load_newest, or name another folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("step-*"):
        if path.suffix in _UNFINISHED:
            _delete(path)


def _publish(partial: Path, step: int, keep: int, metadata: Metadata) -> None:
    files = {info.relative_path for info in metadata.storage_data.values()}
    missing = sorted(name for name in files if not (partial / name).exists())
    if missing:
        raise CheckpointError(
            f"{partial} lacks {missing[0]}, which a rank has written elsewhere. Every rank must "
            "save the same step in one folder that all of them see."
        )
    # Beside what has that name: a kill between two renames would leave nothing of this step.
    taken = [found.again for found in _named(partial.parent) if found.step == step]
    partial.rename(partial.with_suffix(f".{max(taken) + 1}" if taken else ""))
    complete = [found for found in _named(partial.parent) if found.is_complete()]
    for found in complete[:-keep]:
        _delete(found.path)


def _delete(path: Path) -> None:
    try:
        if path.suffix not in _UNFINISHED:  # a folder half deleted must not look like a checkpoint
            path = path.rename(path.with_name(f"{path.name}.old"))
        shutil.rmtree(path)
    except OSError as error:  # no reason to end a job
        warnings.warn(f"{path} could not be deleted: {error}", stacklevel=2)


@contextmanager
def _in_a_sentence(what: str, cure: str) -> Iterator[None]:
    """Say of torch's error, which every rank gets with the tracebacks of all, what it comes to."""
    try:
        yield
    except CheckpointException as error:  # a BaseException
        rank, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
        raise CheckpointError(f"{what} (rank {rank}: {cause!r}). {cure}") from error


def _on_rank_0(do: Callable[[], T]) -> T:
    """What ``do`` returned on rank 0, on every rank; or an error that says what it raised.

    Collective: every rank of the job must call.
    """
    told: list[tuple[T | None, str | None]] = [(None, None)]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            told = [(do(), None)]
        except Exception as error:  # noqa: BLE001  # whatever it is, the others wait for it
            told = [(None, f"rank 0: {error}")]
    if dist.is_initialized():
        dist.broadcast_object_list(told, src=0)
    result, problem = told[0]
    if problem is not None:
        raise CheckpointError(problem)
    return result  # type: ignore[return-value]
