"""Brings up torch.distributed from whatever launched this process."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout
from torch.distributed.distributed_c10d import PrefixStore, Store

from shardscale.comm.base import require_time
from shardscale.comm.env import RankEnv, resolve
from shardscale.comm.incarnation import assemble
from shardscale.comm.patience import within
from shardscale.comm.rendezvous import meet
from shardscale.errors import MissingRankError, StageError

__all__ = ["come_together", "connect", "init_distributed"]

logger = logging.getLogger(__name__)

# What torch gives a store itself. Ranks of one job may start minutes apart, on nodes that still
# fetch a container or read torch from a slow file system; a wait is talked about after 10 s.
_TIMEOUT_S = 300.0
_GRACE_S = 2.0  # for what a rank asks the store when time is up
_CPU, _GPU = "gloo", "cpu:gloo,cuda:nccl"
# The variables that this module has set itself; they say nothing about who launched the process.
_ours: dict[str, str] = {}


def init_distributed(backend: str | None = None, *, timeout_s: float | None = None) -> RankEnv:
    """Bring up ``torch.distributed`` under torchrun, SLURM, Open MPI, MPICH, or alone.

    Nothing is to be exported for it: see :func:`shardscale.comm.resolve` for who wins where several
    launchers left variables. The ranks meet in a store: under torchrun that of its agent; under
    SLURM on the step's first host, at a port made from the numbers of job and step; under
    ``mpirun`` at an address and port that rank 0 holds already when it tells them over MPI.
    ``MASTER_ADDR`` and ``MASTER_PORT`` win where they are set, and with both of them ``mpirun``
    needs no mpi4py. A process that no launcher started becomes a group of one.

    Every rank logs ``str`` of what is returned, at level INFO: who it is, by which launcher, and
    the address. Besides the group it sets, for code that comes later: ``RANK``, ``WORLD_SIZE``,
    ``LOCAL_RANK``, ``LOCAL_WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT`` in ``os.environ``, and
    with NCCL the current CUDA device. Nothing else.

    Args:
        backend: As for ``torch.distributed.init_process_group``. None: ``"cpu:gloo,cuda:nccl"`` if
            every rank of the job has a GPU to itself, else ``"gloo"``; all ranks get the same.
        timeout_s: Seconds to wait for the others to come, and again to connect to them; 300 if not
            given. The timeout of the group itself stays torch's.

    Returns:
        This rank's place, with the ``address`` at which the ranks met.

    Raises:
        ConfigError: The environment is not one to start in; names variable, value and cure.
        MissingRankError: The others did not come or cannot be reached; names host and port, or the
            ranks.
        StageError: There is a group already. Whoever made it chose its backend and timeout.

    Collective: every rank of the job must call, once.
    """
    if dist.is_initialized():
        raise StageError(
            f"rank {dist.get_rank()} of {dist.get_world_size()}: torch.distributed is up already, "
            f"over {dist.get_backend()}. Call init_distributed instead of whatever did that; for "
            "this rank's place alone there is shardscale.comm.resolve(os.environ)."
        )
    require_time(timeout_s)
    patience_s = _TIMEOUT_S if timeout_s is None else timeout_s
    environ = {name: value for name, value in os.environ.items() if _ours.get(name) != value}
    env, store, backend = come_together(environ, backend, patience_s)
    connect(env, store, backend, patience_s)
    _publish(env)
    logger.info("%s", env)
    return env


def come_together(
    environ: Mapping[str, str], backend: str | None, patience_s: float
) -> tuple[RankEnv, Store, str]:
    """Meet all the other ranks of the job; nothing of torch's is set up yet.

    Args:
        environ: Such as ``os.environ``.
        backend: None: to be agreed on.
        patience_s: How long to wait for the others.

    Returns:
        This rank's place, a store that this life of the job has to itself, and the backend.

    Raises:
        ConfigError: The environment is not one to start in.
        MissingRankError: Not all came; names those who did not.

    Collective: every rank of the job must call.
    """
    deadline = time.monotonic() + patience_s
    env, store = meet(resolve(environ), environ, patience_s)
    gpu = _own_gpu(env) if backend is None else ""
    store, common = _assemble(env, store, gpu, max(1.0, deadline - time.monotonic()))
    return env, store, backend or common


def _own_gpu(env: RankEnv) -> str:
    """Which GPU this rank would use, by a name that no other one has; empty if there is none."""
    num = torch.cuda.device_count()
    return str(torch.cuda.get_device_properties(env.local_rank % num).uuid) if num else ""


def _common_backend(gpus: list[str]) -> str:
    return _GPU if all(gpus) and len(set(gpus)) == len(gpus) else _CPU


def _assemble(env: RankEnv, store: Store, gpu: str, patience_s: float) -> tuple[Store, str]:
    try:
        return within(
            patience_s + _GRACE_S,
            lambda: assemble(store, env.rank, env.world_size, patience_s, gpu, _common_backend),
        )
    except TimeoutError as error:
        if isinstance(error, MissingRankError):
            raise
        raise MissingRankError(
            f"rank {env.rank} of {env.world_size}: the store at {env.address} does not answer any "
            f"more ({error}). Look at rank 0's host, or at torchrun's agent there."
        ) from error


def connect(env: RankEnv, store: Store, backend: str, patience_s: float) -> None:
    """Make the group; the ranks are all there, but may not get through to each other.

    Raises:
        MissingRankError: They did not.

    Collective: every rank of the job must call.
    """
    if "nccl" in backend:
        torch.cuda.set_device(env.local_rank % max(1, torch.cuda.device_count()))
    # As torch does with a store of its own.
    store.set_timeout(default_pg_timeout)
    store = PrefixStore("default_pg", store)
    try:
        within(
            patience_s,
            lambda: dist.init_process_group(
                backend, store=store, rank=env.rank, world_size=env.world_size
            ),
        )
    except (RuntimeError, TimeoutError) as error:
        raise MissingRankError(
            f"rank {env.rank} of {env.world_size}, on {socket.gethostname()}: all ranks came, but "
            f"{backend} could not connect them ({str(error).splitlines()[0]}). A rank may have "
            "failed just now: look at the first error of the job. Or this host offers the others "
            "an address that they do not reach: set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to "
            f"the interface that leads to {env.address}."
        ) from error


def _publish(env: RankEnv) -> None:
    assert env.address is not None
    host, _, port = env.address.rpartition(":")
    variables = {
        "RANK": env.rank,
        "WORLD_SIZE": env.world_size,
        "LOCAL_RANK": env.local_rank,
        "LOCAL_WORLD_SIZE": env.local_world_size,
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
    }
    for name, value in variables.items():
        if os.environ.get(name) != str(value):
            os.environ[name] = _ours[name] = str(value)
