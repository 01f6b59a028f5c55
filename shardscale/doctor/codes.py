"""How the doctor ends: one exit code for each kind of failure."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

__all__ = ["Code", "Failure"]


class Code(IntEnum):
    """The process's exit code; 1 is left to Python, for an error of the doctor itself."""

    WELL = 0
    USAGE = 2
    ENVIRONMENT = 3
    MISSING = 4
    INTERFACE = 5
    VERSIONS = 6
    MPI = 7
    NAMES = 8
    GROUP = 9
    ALL_REDUCE = 10
    CHECK = 11


class Failure(NamedTuple):
    """Something that is wrong with the job, as one sentence or more."""

    code: Code
    what: str
