"""What one rank knows of itself and of its host, as plain data."""

from __future__ import annotations

import os
import platform
import socket
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Any, NamedTuple

import torch

import shardscale
from shardscale.comm.env import RankEnv
from shardscale.doctor.interfaces import VARIABLES, Interface, interfaces
from shardscale.doctor.mpi import MPI, mpi_of_this_host
from shardscale.kernels import backend_name

__all__ = ["Facts", "look_at_oneself"]

_NOT_THERE = "not installed"


class Device(NamedTuple):
    """One device that this process can see."""

    name: str
    model: str
    kernels: str
    """What gradients there are given to."""


class Facts(NamedTuple):
    """All of it; sent as JSON."""

    env: RankEnv
    host: str
    versions: dict[str, str]
    devices: list[Device]
    interfaces: list[Interface]
    variables: dict[str, str]
    """Those of ``VARIABLES`` that are set."""
    mpi: MPI | None
    """Asked for by one rank of each host."""

    def as_json(self) -> dict[str, Any]:
        """Records as maps, so that a reader finds what it looks for by name."""
        return self._asdict() | {
            "env": self.env._asdict(),
            "devices": [each._asdict() for each in self.devices],
            "interfaces": [each._asdict() for each in self.interfaces],
            "mpi": self.mpi and self.mpi._asdict(),
        }

    @classmethod
    def of_json(cls, told: dict[str, Any]) -> Facts:
        """The way back."""
        return cls(**told)._replace(
            env=RankEnv(**told["env"]),
            devices=[Device(**each) for each in told["devices"]],
            interfaces=[Interface(**each) for each in told["interfaces"]],
            mpi=told["mpi"] and MPI(**told["mpi"]),
        )


def look_at_oneself(env: RankEnv) -> Facts:
    """Collect the facts; nothing is sent."""
    return Facts(
        env=env,
        host=socket.gethostname(),
        versions=_versions(),
        devices=list(_devices()),
        interfaces=interfaces(),
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
        mpi=mpi_of_this_host() if env.local_rank == 0 else None,
    )


def _versions() -> dict[str, str]:
    has_nccl = torch.cuda.is_available() and torch.distributed.is_nccl_available()
    return {
        "shardscale": shardscale.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": _version_of("numpy"),
        "triton": _version_of("triton"),
        "mpi4py": _version_of("mpi4py"),
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if has_nccl else "not used",
    }


def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return _NOT_THERE


def _devices() -> Iterator[Device]:
    may_use = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    cores = f"{may_use} of {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    yield Device("cpu", cores, backend_name(torch.device("cpu")))
    for index in range(torch.cuda.device_count()):
        kernels = backend_name(torch.device("cuda", index))
        yield Device(f"cuda:{index}", torch.cuda.get_device_name(index), kernels)
