"""Where the ranks of a job meet: a store that rank 0 or its launcher hosts and all others reach."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Mapping
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from shardscale.comm import slurm
from shardscale.comm.env import RankEnv
from shardscale.comm.mpi_rendezvous import meet_over_mpi
from shardscale.comm.patience import within
from shardscale.comm.sockets import listen
from shardscale.comm.variables import is_loopback
from shardscale.errors import ConfigError, MissingRankError

__all__ = ["meet"]

logger = logging.getLogger(__name__)

_QUIET_S = 10.0  # a wait that lasts longer is talked about
# Kept as long as the process lives. Groups may be made again, and a rank that comes early must not
# reach the store of the group before, about to close; nor must its port be taken meanwhile.
_hosted: dict[str | None, TCPStore] = {}


def meet(env: RankEnv, environ: Mapping[str, str], timeout_s: float) -> tuple[RankEnv, Store]:
    """Open the store of a job.

    Returns:
        The rank's place with its ``address``, and the store.

    Raises:
        ConfigError: The address is not one at which the ranks can meet, or its port is taken.
        MissingRankError: Nothing answered there in time.

    Collective: every rank of the job must call.
    """
    started = time.monotonic()
    hosts_it = env.rank == 0 and not _is_hosted_by_agent(environ)
    listener = None
    if env.source == "alone":
        listener = listen("127.0.0.1", 0)
        env = env._replace(address=f"127.0.0.1:{listener.getsockname()[1]}")
    elif env.address is None:
        env, listener = meet_over_mpi(env, environ, timeout_s)
    elif hosts_it and env.address not in _hosted:
        listener = listen(*_split(env))
    if not hosts_it:
        _check_master(env, environ)
        _reach(env, timeout_s)
    store = _open(env, hosts_it, listener, max(1.0, started + timeout_s - time.monotonic()))
    # Should the port be another job's after all, nothing of ours may reach that one. Under mpirun
    # it cannot be, and SLURM's variables differ between its ranks.
    job = slurm.step(environ) if env.source == "slurm" else ""
    return env, PrefixStore(f"shardscale/{job}", store)


def _is_hosted_by_agent(environ: Mapping[str, str]) -> bool:
    return environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _split(env: RankEnv) -> tuple[str, int]:
    assert env.address is not None
    host, _, port = env.address.rpartition(":")
    return host, int(port)


def _check_master(env: RankEnv, environ: Mapping[str, str]) -> None:
    """Refuse a host that means this machine here, where it should mean another one."""
    host, port = _split(env)
    if env.node == 0 or "MASTER_ADDR" not in environ or not _is_this_machine(host):
        return
    if _is_hosted_by_agent(environ):
        # The agent hosts the store since before this rank was started: it is there, or never.
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError:
            pass
    elif host in (socket.gethostname(), socket.getfqdn()):
        return  # several nodes on one machine
    raise ConfigError(
        f"MASTER_ADDR is {host!r}, which is a loopback address on {socket.gethostname()}, but rank "
        f"{env.rank} is on node {env.node} of {env.num_nodes} and must reach node 0 by it: set it "
        "to that host's address, with torchrun by --local-addr on node 0, or mend /etc/hosts."
    )


def _is_this_machine(host: str) -> bool:
    try:
        return all(is_loopback(str(info[4][0])) for info in socket.getaddrinfo(host, None))
    except OSError:
        return False


def _reach(env: RankEnv, timeout_s: float) -> None:
    """Wait until something listens at the address.

    torch's client would wait as well, but for up to twice as long, and with a stack trace for every
    attempt.
    """
    host, port = _split(env)
    started = time.monotonic()
    pause, quiet_s = 0.01, _QUIET_S
    while True:
        remaining = started + timeout_s - time.monotonic()
        try:
            socket.create_connection((host, port), timeout=max(0.1, min(5.0, remaining))).close()
            return
        except OSError as error:
            problem = error
        passed = time.monotonic() - started
        if passed + pause > timeout_s:
            raise MissingRankError(_unreached(env, f"within {timeout_s:g} s", problem)) from problem
        if passed > quiet_s:
            quiet_s *= 2
            logger.warning("%s", _unreached(env, "yet", problem))
        time.sleep(pause)
        pause = min(1.0, 1.5 * pause)


def _unreached(env: RankEnv, when: str, problem: Exception) -> str:
    host, port = _split(env)
    return (
        f"rank {env.rank} of {env.world_size}, on {socket.gethostname()}, has not reached rank 0 "
        f"at host {host}, port {port} {when} ({problem}). Check that rank 0 has not failed, that "
        f"{host} means its host here, too, and that no firewall closes the port; MASTER_ADDR and "
        "MASTER_PORT override both."
    )


def _open(
    env: RankEnv, hosts_it: bool, listener: socket.socket | None, timeout_s: float
) -> TCPStore:
    host, port = _split(env)

    def connect() -> TCPStore:
        return TCPStore(
            host,
            port,
            env.world_size,
            is_master=hosts_it,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,  # the roll call does, and says who is missing
            multi_tenant=True,  # in this process a second store at this address is the same one
            master_listen_fd=None if listener is None else listener.detach(),
        )

    try:
        store = within(timeout_s, connect)
    except (RuntimeError, TimeoutError) as error:
        raise MissingRankError(
            f"rank {env.rank} of {env.world_size}: what listens at host {host}, port {port}, does "
            f"not answer as a store ({str(error).splitlines()[0]}). It may be another program: set "
            "MASTER_PORT to a free port of that host."
        ) from error
    if hosts_it:
        _hosted[env.address] = store
    return store
