"""Measure a verdict over MPI beside one over Gloo, between the same processes.

    launch/mpirun.sh -n 2 benchmarks/mpi_verdict.py [--quick] [--to FOLDER]

With more ranks than cores it measures how they take turns. Without ``--quick`` the result goes to
``benchmarks/results/launchers``.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

import record
import torch
import torch.distributed as dist
from job import slowest
from mpi4py import MPI
from side_by_side import Row, compare, in_turns

from shardscale import ShardedGradScaler, init_distributed
from shardscale.comm import Communicator, MPIComm, ProcessGroupComm

BLOCK = 50
NUM_ROUNDS, NUM_IF_QUICK = 200, 10
WHOLE = "unscale_(()): a whole verdict, nothing to judge"
BARE = "the sum of its two float64 alone"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds, nothing recorded")
    parser.add_argument("--to", type=Path, help="the folder to record in")
    chosen = parser.parse_args()

    torch.set_num_threads(1)
    world = MPI.COMM_WORLD
    init_distributed("gloo")
    num_rounds = NUM_IF_QUICK if chosen.quick else NUM_ROUNDS
    taken = world.gather(in_turns(ways(), num_rounds))
    dist.destroy_process_group()
    if world.rank == 0:
        show(rows(slowest(taken), world.size), num_rounds, chosen)


def ways() -> dict[tuple[str, str], Callable[[], float]]:
    """By what is measured and by the transport: a block of it, and the seconds of one."""
    comms = {"mpi": MPIComm(MPI.COMM_WORLD), "gloo": ProcessGroupComm(dist.group.WORLD)}
    # A block, because who waits longest in the last call over one comes late to the first over the
    # other.
    return {
        **{(WHOLE, name): whole(None if name == "gloo" else comms[name]) for name in comms},
        **{(BARE, name): bare(comm) for name, comm in comms.items()},
    }


def whole(comm: Communicator | None) -> Callable[[], float]:
    scaler = ShardedGradScaler("cpu", init_scale=1.0, growth_interval=10**9, comm=comm)

    def run() -> float:
        scaler.begin()
        started = time.perf_counter()
        for _ in range(BLOCK):
            scaler.unscale_(())
        seconds = (time.perf_counter() - started) / BLOCK
        scaler.update()
        return seconds

    return run


def bare(comm: Communicator) -> Callable[[], float]:
    message = torch.zeros(2, dtype=torch.float64)

    def run() -> float:
        started = time.perf_counter()
        for _ in range(BLOCK):
            comm.all_reduce_sum_(message)
        return (time.perf_counter() - started) / BLOCK

    return run


def rows(taken: dict[tuple[str, str], list[float]], size: int) -> list[Row]:
    num_cores = os.cpu_count() or 1
    note = "" if size <= num_cores else f"{size} ranks take turns on {num_cores} cores"
    return [
        compare(
            f"{what}, {size} ranks: MPI against Gloo",
            taken[what, "mpi"],
            taken[what, "gloo"],
            # How many times is not promised: it depends on the network and on the MPI.
            at_least=1,
            note=note,
        )
        for what in (WHOLE, BARE)
    ]


def show(found: list[Row], num_rounds: int, chosen: argparse.Namespace) -> None:
    vendor, version = MPI.get_vendor()
    name = f"{vendor} {'.'.join(map(str, version))}"
    print(f"\n## A verdict over {name}\n\n{record.table(found)}", flush=True)
    folder = chosen.to or (None if chosen.quick else record.RESULTS / "launchers")
    if folder is not None:
        env = record.environment(record.cpu_name(), mpi=name, threads=1, rounds=num_rounds)
        theme = f"verdict-over-{name.lower().replace(' ', '-')}"
        print(f"\nrecorded in {record.keep(theme, env, {'Verdicts': found}, folder)}")


if __name__ == "__main__":
    main()
