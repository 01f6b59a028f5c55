"""What each rank of a job writes about its steps, and whether the ranks wrote one history.

A rank appends a line to its own ``rank<R>.jsonl`` when a step is finished, after ``update()``::

    {"step": 3, "skipped": false, "scale": "0x1.0000000000000p+16", "digest": "9f86d081884c7d65"}
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Entry", "RankLog", "compare", "digest", "read"]


class Entry(NamedTuple):
    """One finished step, as one rank saw it."""

    step: int
    skipped: bool
    scale: str  # float.hex() of the scale after the step
    digest: str  # of this rank's own parameters after the step


class RankLog:
    """The log of one rank; a line is the kernel's before ``write`` returns, so no kill loses it."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._file = os.open(_path(folder, rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, step: int, *, skipped: bool, scale: float, digest: str) -> None:
        entry = Entry(step, skipped, scale.hex(), digest)
        os.write(self._file, (json.dumps(entry._asdict()) + "\n").encode())


def digest(parameters: Iterable[Tensor]) -> str:
    """A number for the bytes of the parameters, or of this rank's shards of them."""
    bytes_seen = hashlib.blake2b(digest_size=8)
    for parameter in parameters:
        local = getattr(parameter, "_local_tensor", parameter).detach().cpu()
        bytes_seen.update(local.reshape(-1).view(torch.uint8).numpy().tobytes())
    return bytes_seen.hexdigest()


def compare(
    folder: Path, num_ranks: int, *, killed: Collection[int] = (), replicated: bool = True
) -> list[str]:
    """What keeps the logs of a job from being one history; empty if nothing does.

    No two ranks hold different entries for one step. No log has a gap. The logs differ in length by
    at most the verdict under way when the job ended: one.

    Args:
        folder: Where ``rank0.jsonl`` and the others lie.
        num_ranks: How many ranks the job had.
        killed: The ranks that a signal ended. They may have left half of a last line, or no file if
            no step of theirs was finished.
        replicated: Every rank holds the same parameters, so the digests must be equal, too.
    """
    complaints = [f"{name} is of no rank of this job" for name in _strangers(folder, num_ranks)]
    logs: dict[int, list[Entry]] = {}
    for rank in range(num_ranks):
        if _path(folder, rank).exists():
            logs[rank], broken = read(folder, rank, was_killed=rank in killed)
            complaints += broken
        elif rank in killed:
            logs[rank] = []
        else:
            complaints.append(f"rank {rank} left no log, and was not killed before its first step")
    return complaints + _differences(logs, replicated) + _missing_steps(logs)


def read(folder: Path, rank: int, *, was_killed: bool = False) -> tuple[list[Entry], list[str]]:
    """The entries of one rank's log, and a complaint for each line that is none."""
    *lines, rest = _path(folder, rank).read_text(errors="replace").split("\n")
    if rest and not was_killed:
        lines.append(rest + " (no end of line)")
    entries, complaints = [], []
    for number, line in enumerate(lines, start=1):
        entry = _entry(line)
        if entry is None:
            complaints.append(f"rank {rank}: line {number} is broken: {line[:80]}")
        else:
            entries.append(entry)
    return entries, complaints


def _path(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.jsonl"


def _strangers(folder: Path, num_ranks: int) -> list[str]:
    expected = {_path(folder, rank).name for rank in range(num_ranks)}
    return sorted({path.name for path in folder.glob("rank*.jsonl")} - expected)


def _entry(line: str) -> Entry | None:
    try:
        entry = Entry(**json.loads(line))
        float.fromhex(entry.scale)
    except (TypeError, ValueError):
        return None
    kinds = (int, bool, str, str)
    return entry if all(type(x) is kind for x, kind in zip(entry, kinds, strict=True)) else None


def _differences(logs: dict[int, list[Entry]], replicated: bool) -> list[str]:
    """The steps for which two ranks hold different entries."""
    said: dict[int, dict[tuple[str, ...], list[int]]] = {}  # step -> what was said -> by whom
    for rank, entries in logs.items():
        for entry in entries:
            what = ["skipped" if entry.skipped else "stepped", f"scale {entry.scale}"]
            what += [f"parameters {entry.digest}"] * replicated
            said.setdefault(entry.step, {}).setdefault(tuple(what), []).append(rank)
    return [
        f"step {step}: "
        + "; ".join(f"ranks {ranks}: {', '.join(what)}" for what, ranks in sides.items())
        for step, sides in sorted(said.items())
        if len(sides) > 1
    ]


def _missing_steps(logs: dict[int, list[Entry]]) -> list[str]:
    """The gaps within the logs, and the ends that lie too far apart."""
    complaints = []
    first = min((entries[0].step for entries in logs.values() if entries), default=None)
    if first is None:
        return ["no rank has finished a step, so nothing was compared"]
    for rank, entries in logs.items():
        steps = [entry.step for entry in entries]
        if steps != list(range(first, first + len(steps))):
            complaints.append(f"rank {rank}: the steps are not {first} and so on, but {steps}")
    lengths = {rank: len(entries) for rank, entries in logs.items()}
    if max(lengths.values()) - min(lengths.values()) > 1:
        complaints.append(f"the logs differ by more than the verdict under way: steps {lengths}")
    return complaints
