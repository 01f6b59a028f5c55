"""What the ranks' facts say together: tables, and what is wrong in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from shardscale.doctor.codes import Code, Failure
from shardscale.doctor.facts import Device, Facts
from shardscale.doctor.interfaces import VARIABLES, trouble_with
from shardscale.doctor.mpi import trouble_with as mpi_trouble_with
from shardscale.doctor.sections import Judged, Section, by_value, who_said
from shardscale.owners import say_ranks

__all__ = ["judge", "judge_told"]

# Ranks that differ in these do not speak the same language.
_MUST_AGREE = ("shardscale", "torch", "NCCL")


def judge(facts: Mapping[int, Facts]) -> Judged:
    """Show what every rank thinks it is, and what it has.

    Hands on, by the name of each host, its first rank.
    """
    first_ranks: dict[str, int] = {}
    for rank in sorted(facts):
        first_ranks.setdefault(facts[rank].host, rank)
    return Judged(
        [
            Section("launcher", [_launcher(facts)]),
            Section("ranks", [_ranks_on(host, facts) for host in first_ranks]),
            Section("devices", list(_devices(facts, first_ranks))),
            Section("versions", _versions(facts)),
            Section("network", list(_network(facts, first_ranks))),
            Section("variables", list(_variables(facts))),
            Section("MPI", list(_mpi(facts))),
        ],
        list(_failures(facts)),
        hand_on=first_ranks,
    )


def judge_told(found: Mapping[int, Any]) -> Judged:
    """The same, of facts as they were sent."""
    return judge({rank: Facts.of_json(told) for rank, told in found.items()})


def _launcher(facts: Mapping[int, Facts]) -> tuple[str, ...]:
    source = by_value({rank: each.env.source for rank, each in facts.items()})
    why = by_value({rank: each.env.why for rank, each in facts.items()})
    met = by_value({rank: each.env.address or "no address" for rank, each in facts.items()})
    return source, f"{why}; the ranks met at {met}"


def _ranks_on(host: str, facts: Mapping[int, Facts]) -> tuple[str, ...]:
    here = {rank: each for rank, each in facts.items() if each.host == host}
    nodes = by_value({rank: f"node {f.env.node} of {f.env.num_nodes}" for rank, f in here.items()})
    sizes = by_value({rank: str(each.env.world_size) for rank, each in here.items()})
    local = say_ranks(each.env.local_rank for each in here.values())
    return (host, nodes, f"{say_ranks(here)} of {sizes}", f"local {local}")


def _devices(facts: Mapping[int, Facts], hosts: Mapping[str, int]) -> Iterator[tuple[str, ...]]:
    of_host = {rank: {each.name: each for each in facts[rank].devices} for rank in hosts.values()}
    for name in dict.fromkeys(name for devices in of_host.values() for name in devices):
        yield name, by_value({rank: _words(devices.get(name)) for rank, devices in of_host.items()})


def _words(device: Device | None) -> str:
    return f"{device.model}; {device.kernels} kernels" if device else "not there"


def _versions(facts: Mapping[int, Facts]) -> list[tuple[str, ...]]:
    first = next(iter(facts.values()))
    return [
        (name, by_value({rank: each.versions[name] for rank, each in facts.items()}))
        for name in first.versions
    ]


def _network(facts: Mapping[int, Facts], hosts: Mapping[str, int]) -> Iterator[tuple[str, ...]]:
    for host, rank in hosts.items():
        for each in facts[rank].interfaces:
            yield host, each.name, "up" if each.is_up else "down", ", ".join(each.addresses)


def _variables(facts: Mapping[int, Facts]) -> Iterator[tuple[str, ...]]:
    for name in VARIABLES:
        yield name, by_value({rank: f.variables.get(name, "not set") for rank, f in facts.items()})


def _mpi(facts: Mapping[int, Facts]) -> Iterator[tuple[str, ...]]:
    asked = {rank: each.mpi for rank, each in facts.items() if each.mpi is not None}
    if asked:
        launchers = {rank: ", ".join(mpi.launchers) or "none" for rank, mpi in asked.items()}
        libraries = {rank: mpi.library or "no mpi4py" for rank, mpi in asked.items()}
        plugins = {rank: mpi.plugins or "no srun" for rank, mpi in asked.items()}
        yield "mpirun", by_value(launchers)
        yield "mpi4py loads", by_value(libraries)
        yield "srun --mpi=list", by_value(plugins)


def _failures(facts: Mapping[int, Facts]) -> Iterator[Failure]:
    for name in VARIABLES:
        troubles = {
            rank: trouble_with(name, each.variables[name], each.interfaces, each.env.num_nodes)
            for rank, each in facts.items()
            if name in each.variables
        }
        yield from _failure(Code.INTERFACE, troubles)
    for name in _MUST_AGREE:
        versions = {rank: each.versions[name] for rank, each in facts.items()}
        if len(set(versions.values())) > 1:
            what = f"{name} is not the same everywhere: {by_value(versions)}. Install one version."
            yield Failure(Code.VERSIONS, what)
    troubles = {
        rank: mpi_trouble_with(each.mpi, each.env.source)
        for rank, each in facts.items()
        if each.mpi is not None
    }
    yield from _failure(Code.MPI, troubles)


def _failure(code: Code, troubles: Mapping[int, str | None]) -> Iterator[Failure]:
    said = {rank: trouble for rank, trouble in troubles.items() if trouble is not None}
    if said:
        yield Failure(code, who_said(said))
