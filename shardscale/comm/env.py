"""Who this process is in its job, from the variables of whatever launched it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from shardscale.comm import slurm
from shardscale.comm.variables import hostname, index, is_loopback, number, port
from shardscale.errors import ConfigError

__all__ = ["RankEnv", "check_mpi_size", "resolve"]


class RankEnv(NamedTuple):
    """One rank's place in its job, and how that is known."""

    rank: int
    world_size: int
    local_rank: int
    """Number among the ranks of this node."""
    local_world_size: int
    node: int
    """Number of this node. Under mpirun, before the ranks have met: as if all nodes had as many."""
    num_nodes: int
    source: str
    """``torchrun``, ``slurm``, ``openmpi``, ``mpich``, ``pmix`` or ``alone``."""
    why: str
    """Which source won, and from which variables."""
    address: str | None = None
    """``host:port`` at which the ranks meet; None where it is not known before they talk."""

    def __str__(self) -> str:
        """The line for a program to print."""
        where = f"; rendezvous {self.address}" if self.address else ""
        return (
            f"rank {self.rank} of {self.world_size} (local {self.local_rank} of "
            f"{self.local_world_size}, node {self.node} of {self.num_nodes}) by {self.source}: "
            f"{self.why}{where}"
        )


class _Names(NamedTuple):
    """The variables by which a launcher tells a rank its place."""

    rank: str
    world_size: str
    local_rank: str
    local_world_size: str


_TORCH = _Names("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_OPENMPI = _Names(
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
)
_HYDRA = _Names("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
# PMIx itself has a variable for the rank alone.
_PMIX = _TORCH._replace(rank="PMIX_RANK")
_SLURM = _Names("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
_NAMES = {
    "torchrun": _TORCH,
    "openmpi": _OPENMPI,
    "mpich": _HYDRA,
    "slurm": _SLURM,
    "pmix": _PMIX,
}
# Set by torchrun alone. Whoever sets the four names without it did so by hand.
_BY_TORCHRUN = "TORCHELASTIC_RUN_ID"


def resolve(environ: Mapping[str, str]) -> RankEnv:
    """Find out which launcher started this process, and as which rank.

    Launchers nest, and the inner one counts: torchrun inside a task of ``srun``; ``mpirun`` inside
    a SLURM job, whose daemons are tasks of a step. ``srun --mpi=pmi2`` and ``--mpi=pmix`` set the
    variables of both, which must agree. A batch script and a shell in an allocation are no rank.

    >>> environ = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    >>> print(resolve({**environ, "MASTER_ADDR": "n0", "MASTER_PORT": "29500"}))
    rank 3 of 4 (local 1 of 2, node 1 of 2) by torchrun: RANK and WORLD_SIZE are set; ...n0:29500

    Args:
        environ: Such as ``os.environ``. A variable that is set to nothing counts as not set.

    Raises:
        ConfigError: The variables contradict each other or cannot be meant; names variable, value
            and cure.
    """
    environ = {name: value for name, value in environ.items() if value}
    launched = _launched(environ)
    env = next(launched, None) or _alone(environ)
    if env.source == "torchrun" and _BY_TORCHRUN not in environ:
        _check_by_hand(env, next(launched, None))
    _check_fragments(env, environ)
    if "SLURM_JOB_ID" in environ and env.source not in ("slurm", "alone"):
        outer = f", which count before those of SLURM job {environ['SLURM_JOB_ID']}"
        env = env._replace(why=env.why + outer)
    return env._replace(address=_address(env, environ))


def check_mpi_size(environ: Mapping[str, str], size: int, library: str) -> None:
    """Refuse to run as several worlds of one, which is how MPI starts where its launcher is amiss.

    Args:
        environ: Such as ``os.environ``.
        size: That of ``MPI.COMM_WORLD``.
        library: What ``MPI.Get_library_version()`` says.

    Raises:
        ConfigError: The launcher started another number of ranks than MPI knows.
    """
    environ = {name: value for name, value in environ.items() if value}
    launched = _launched(environ)
    env = next(launched, None)
    if env is not None and env.source == "torchrun" and _BY_TORCHRUN not in environ:
        env = next(launched, env)  # the variables may be those that init_distributed has set
    if env is None or env.world_size == size:
        return
    is_openmpi = "Open MPI" in library
    cure = {
        "slurm": f"start with srun --mpi={'pmix' if is_openmpi else 'pmi2'}",
        "torchrun": "start with mpirun or srun, because torchrun starts no MPI",
    }.get(
        env.source,
        f"start with the mpirun of {'Open MPI' if is_openmpi else 'MPICH'}, which mpi4py uses here",
    )
    worlds = f", so these are {env.world_size} worlds of 1" if size == 1 else ""
    raise ConfigError(
        f"{_NAMES[env.source].world_size} is {env.world_size}, but MPI has {size} "
        f"rank{'s' if size > 1 else ''}{worlds}: {cure}."
    )


def _launched(environ: Mapping[str, str]) -> Iterator[RankEnv]:
    """What each launcher says that has told this process its whole place; the innermost first."""
    if _BY_TORCHRUN in environ:
        _require(environ, _TORCH)
    if _is_complete(environ, _TORCH):
        yield _by_torch(environ)
    for source, names in (("openmpi", _OPENMPI), ("mpich", _HYDRA)):
        if _is_complete(environ, names):
            yield _by_names(environ, source, names)
    if slurm.in_step(environ):
        place = slurm.task(environ)
        why = f"SLURM_PROCID and SLURM_NTASKS are set, in step {slurm.step(environ)}"
        yield RankEnv(*place, "slurm", why)
    if _is_complete(environ, _PMIX):
        yield _by_names(environ, "pmix", _PMIX)


def _is_complete(environ: Mapping[str, str], names: _Names) -> bool:
    return all(name in environ for name in names)


def _by_torch(environ: Mapping[str, str]) -> RankEnv:
    env = _by_names(environ, "torchrun", _TORCH)
    if "GROUP_RANK" not in environ or "GROUP_WORLD_SIZE" not in environ:
        return env
    num_nodes = number(environ, "GROUP_WORLD_SIZE", 1, env.world_size)
    node = index(environ, "GROUP_RANK", "GROUP_WORLD_SIZE", num_nodes)
    return env._replace(node=node, num_nodes=num_nodes)


def _by_names(environ: Mapping[str, str], source: str, names: _Names) -> RankEnv:
    world_size = number(environ, names.world_size, 1)
    rank = index(environ, names.rank, names.world_size, world_size)
    local_world_size = number(environ, names.local_world_size, 1, world_size)
    local_rank = index(environ, names.local_rank, names.local_world_size, local_world_size)
    return RankEnv(
        rank,
        world_size,
        local_rank,
        local_world_size,
        node=rank // local_world_size,
        num_nodes=-(-world_size // local_world_size),
        source=source,
        why=f"{names.rank} and {names.world_size} are set",
    )


def _alone(environ: Mapping[str, str]) -> RankEnv:
    if name := slurm.tasks_without_step(environ):
        raise ConfigError(
            f"{name} is {environ[name]}, but srun did not start this process (SLURM_STEP_ID is not "
            f"set): start it with srun, or alone by unsetting {name}."
        )
    for names in (_TORCH, _OPENMPI, _HYDRA, _PMIX):
        if any(name in environ for name in names):
            _require(environ, names)
    return RankEnv(0, 1, 0, 1, 0, 1, "alone", "no launcher has set its variables")


def _require(environ: Mapping[str, str], names: _Names) -> None:
    """Refuse a launcher's variables of which some are missing."""
    missing = [name for name in names if name not in environ]
    if missing:
        given = next((name for name in names if name in environ), _BY_TORCHRUN)
        raise ConfigError(
            f"{given} is {environ[given]!r}, but {missing[0]} is not set: set "
            f"{', '.join(_TORCH[:-1])} and {_TORCH[-1]} for each rank, as torchrun does, or unset "
            f"{given}."
        )


def _check_by_hand(env: RankEnv, outer: RankEnv | None) -> None:
    """Refuse variables that were set by hand for some other process than this one.

    A program that starts ranks itself, inside each task of ``srun``, has a larger world than the
    step. Set in a batch script, they would make every task the same rank.
    """
    if outer is None or outer.world_size < env.world_size:
        return
    if (outer.rank, outer.world_size) != (env.rank, env.world_size):
        names = _NAMES[outer.source]
        raise ConfigError(
            f"RANK is {env.rank} and WORLD_SIZE {env.world_size}, but {names.rank} is {outer.rank} "
            f"and {names.world_size} {outer.world_size}: unset RANK and WORLD_SIZE, or set them "
            "for each rank."
        )


def _check_fragments(env: RankEnv, environ: Mapping[str, str]) -> None:
    """Refuse single variables of another launcher that contradict the one that counts.

    Not those of an outer launcher: around ``mpirun`` a step's, whose tasks are its daemons; around
    torchrun anything.
    """
    rivals = {
        "openmpi": [_TORCH, *([_HYDRA] if _is_complete(environ, _HYDRA) else [])],
        "mpich": [_TORCH],
        "slurm": [_TORCH, _HYDRA, _PMIX],
        "pmix": [_TORCH],
    }
    for names in rivals.get(env.source, []):
        for field, name in names._asdict().items():
            expected = getattr(env, field)
            if name in environ and number(environ, name, 0) != expected:
                raise ConfigError(
                    f"{name} is {environ[name]}, but by {getattr(_NAMES[env.source], field)} it is "
                    f"{expected}: unset {name}, or start the program with one launcher only."
                )


def _address(env: RankEnv, environ: Mapping[str, str]) -> str | None:
    """Where the ranks meet, as far as variables tell."""
    if env.source == "alone":
        return None
    host = hostname(environ, "MASTER_ADDR") if "MASTER_ADDR" in environ else ""
    # Agents of torchrun have met already, so that address has worked: they share a machine.
    if env.num_nodes > 1 and is_loopback(host) and _BY_TORCHRUN not in environ:
        raise ConfigError(
            f"MASTER_ADDR is {host!r}, by which each host means itself, but there are "
            f"{env.num_nodes} hosts: set it to the address at which all of them reach rank 0's, or "
            "unset it."
        )
    at = port(environ, "MASTER_PORT") if "MASTER_PORT" in environ else 0
    if env.source == "slurm" and not (host and at):
        first, usual = slurm.meeting_point(environ)
        if not host and env.rank == 0 and env.node != 0:
            raise ConfigError(
                f"SLURM_PROCID is 0, but SLURM_NODEID is {env.node}, so the first host of the node "
                f"list, {first}, is not rank 0's: set MASTER_ADDR to the name of this one."
            )
        host, at = host or first, at or usual
    if env.source == "torchrun" and not (host and at):
        missing = "MASTER_PORT" if host else "MASTER_ADDR"
        raise ConfigError(
            f"RANK is {env.rank}, but {missing} is not set: set it to where rank 0 listens, as "
            "torchrun does."
        )
    return f"{host}:{at}" if host and at else None
