"""Under ``mpirun`` the ranks agree over MPI itself on the address of a store."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from shardscale.comm.env import RankEnv, check_mpi_size
from shardscale.comm.sockets import address_towards, listen
from shardscale.comm.variables import port
from shardscale.errors import ConfigError, MissingRankError

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["meet_over_mpi"]


def meet_over_mpi(
    env: RankEnv, environ: Mapping[str, str], timeout_s: float
) -> tuple[RankEnv, socket.socket | None]:
    """Let rank 0 listen at an address that all other ranks can reach, and tell it to them.

    Args:
        env: This rank's place as the variables tell it.
        environ: ``MASTER_ADDR`` and ``MASTER_PORT`` are taken, if set.
        timeout_s: How long to wait for ranks that do not come.

    Returns:
        The rank's place with its ``address`` and with the nodes as they are; on rank 0 the socket.

    Raises:
        ConfigError: On every rank: MPI has another world than its launcher, or rank 0 has no
            address or port. On one rank: mpi4py cannot be imported.
        MissingRankError: A rank has not called in time.

    Collective: every rank of MPI.COMM_WORLD must call.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # not installed, or installed without an MPI
        raise ConfigError(
            f"mpirun started this program ({env.why}), but mpi4py cannot be imported ({error}): "
            "install it with the MPI whose mpirun you use, or set MASTER_ADDR and MASTER_PORT to "
            "where rank 0 may listen, and MPI is not needed."
        ) from error
    world = MPI.COMM_WORLD
    check_mpi_size(environ, world.size, MPI.Get_library_version())
    _await_all(world, timeout_s)
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    places = world.allgather((node.bcast(world.rank), socket.gethostname()))
    node.Free()
    nodes = sorted({first for first, _ in places})  # each by the lowest rank on it
    listener, address, problem = None, None, None
    if world.rank == 0:
        # What rank 0 finds wrong all must raise, or the others would wait for its answer.
        try:
            listener, address = _listen(environ, [host for _, host in places])
        except ConfigError as error:
            problem = str(error)
    address, problem = world.bcast((address, problem))
    if problem:
        raise ConfigError(problem)
    at = nodes.index(places[world.rank][0])
    return env._replace(node=at, num_nodes=len(nodes), address=address), listener


def _await_all(world: MPI.Comm, timeout_s: float) -> None:
    """A barrier that gives up."""
    deadline = time.monotonic() + timeout_s
    barrier = world.Ibarrier()
    while not barrier.Test():
        if time.monotonic() > deadline:
            raise MissingRankError(
                f"rank {world.rank} of {world.size}, on {socket.gethostname()}: not all ranks have "
                f"called init_distributed within {timeout_s:g} s. Every rank must; start the "
                "program with python -m mpi4py, so that a rank that fails ends the others, too."
            )
        time.sleep(0.001)


def _listen(environ: Mapping[str, str], hosts: list[str]) -> tuple[socket.socket, str]:
    """On rank 0: the socket, and where the other hosts find it."""
    others = [host for host in dict.fromkeys(hosts) if host != socket.gethostname()]
    host = environ.get("MASTER_ADDR") or (address_towards(others) if others else "127.0.0.1")
    if host is None:
        raise ConfigError(
            f"{socket.gethostname()}, where rank 0 is, has no address that another host can reach, "
            f"and does not know {others[0]!r} by name: set MASTER_ADDR to its address, or mend "
            "/etc/hosts."
        )
    listener = listen(host, port(environ, "MASTER_PORT") if environ.get("MASTER_PORT") else 0)
    return listener, f"{host}:{listener.getsockname()[1]}"
