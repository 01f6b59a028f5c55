"""The seam between the scaler and whatever carries its two numbers between ranks.

What needs torch is imported at its first use: `resolve` looks at an environment before that.
"""

import importlib
import typing

from shardscale.comm.env import RankEnv, check_mpi_size, resolve

if typing.TYPE_CHECKING:
    from shardscale.comm.base import Communicator, Solo
    from shardscale.comm.bond import Bond
    from shardscale.comm.mpi import MPIComm
    from shardscale.comm.process_group import ProcessGroupComm

__all__ = [
    "Bond",
    "check_mpi_size",
    "Communicator",
    "MPIComm",
    "ProcessGroupComm",
    "RankEnv",
    "resolve",
    "Solo",
]

_HOMES = {
    "Bond": "bond",
    "Communicator": "base",
    "MPIComm": "mpi",
    "ProcessGroupComm": "process_group",
    "Solo": "base",
}


if not typing.TYPE_CHECKING:  # to mypy every name would exist

    def __getattr__(name: str) -> object:
        """A public name from its module; see PEP 562."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value  # found without this function from now on
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
