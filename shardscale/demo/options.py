"""What the demo is asked to do, checked before any rank is started."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from shardscale.demo.model import parameter_names
from shardscale.demo.optimizers import OPTIMIZERS
from shardscale.demo.scalers import SCALERS
from shardscale.demo.wrap import WRAPS

__all__ = ["MAX_RANKS", "Injection", "JobOptions", "OptionError", "check_json", "check_options"]

# Up to here every rank owns a piece of the first layer under every wrapping,
# so that a change of its parameters can testify that it stepped.
MAX_RANKS = 16


class OptionError(ValueError):
    """An option that cannot be used; its text says what was found and what is allowed."""


class Injection(NamedTuple):
    """Where the overflow is put: the address of one gradient shard."""

    rank: int
    step: int
    param: str | None


class JobOptions(NamedTuple):
    """One training job, completely described; every rank gets the same."""

    ranks: int
    wrap: str
    optimizer: str
    scaler: str
    steps: int
    inject: Injection | None


def check_options(
    *,
    ranks: int,
    wrap: str | None,
    optimizer: str | None,
    scaler: str | None,
    steps: int,
    inject: str | None,
) -> JobOptions:
    """Turn the words of the command line into a job, or say which word is wrong.

    Args:
        ranks: Number of ranks.
        wrap: A name in ``WRAPS``; None for fsdp2.
        optimizer: A name in ``OPTIMIZERS``; None for adamw.
        scaler: A name in ``SCALERS``; None for shardscale.
        steps: Number of training steps.
        inject: ``RANK:STEP[:PARAM]`` or ``none``; None for rank 1, half-way.

    Raises:
        OptionError: For the first option that cannot be used.
    """
    if not 1 <= ranks <= MAX_RANKS:
        raise OptionError(f"--ranks is {ranks}, but must be between 1 and {MAX_RANKS}.")
    wrap = _one_of("--wrap", "fsdp2" if wrap is None else wrap, WRAPS)
    optimizer = _one_of("--optimizer", "adamw" if optimizer is None else optimizer, OPTIMIZERS)
    scaler = _one_of("--scaler", "shardscale" if scaler is None else scaler, SCALERS)
    if steps < 1:
        raise OptionError(f"--steps is {steps}, but must be at least 1.")
    return JobOptions(ranks, wrap, optimizer, scaler, steps, _parse_inject(inject, ranks, steps))


def check_json(path: Path | None) -> None:
    """Find out before the job runs that its result could not be written.

    Raises:
        OptionError: The folder does not exist or is closed, or the path is a folder itself.
    """
    if path is None:
        return
    if not path.parent.is_dir():
        raise OptionError(f"--json is '{path}', but the folder '{path.parent}' does not exist.")
    if path.is_dir():
        raise OptionError(f"--json is '{path}', which is a folder; name a file to write.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise OptionError(f"--json is '{path}', which this user may not write.")


def _one_of(option: str, name: str, allowed: Collection[str]) -> str:
    if name not in allowed:
        raise OptionError(f"{option} is '{name}', but must be one of {', '.join(allowed)}.")
    return name


def _parse_inject(text: str | None, ranks: int, steps: int) -> Injection | None:
    if text is None:
        return Injection(min(1, ranks - 1), (steps + 1) // 2, None)
    if text == "none":
        return None
    rank, _, rest = text.partition(":")
    step, _, param = rest.partition(":")
    if not (rank.isdecimal() and step.isdecimal()) or (text.count(":") == 2 and not param):
        raise OptionError(
            f"--inject is '{text}', but must be RANK:STEP or RANK:STEP:PARAM, as in 1:20, or none."
        )
    if int(rank) >= ranks:
        raise OptionError(
            f"--inject names rank {rank}, but the ranks of this job are 0 to {ranks - 1}."
        )
    if not 1 <= int(step) <= steps:
        raise OptionError(
            f"--inject names step {step}, but the steps of this job are 1 to {steps}."
        )
    if param and param not in parameter_names():
        raise OptionError(
            f"--inject names the parameter '{param}', but the model has "
            f"{', '.join(parameter_names())}."
        )
    return Injection(int(rank), int(step), param or None)
