"""What ranks do under mpirun, all cases in one start: ``-m tests.cluster.mpi_cases REPORT``.

Every case gets ``MPI.COMM_WORLD`` and makes its own communicators from it; there is no process
group. What it returned on each rank, in rank order, is what ``test_mpi.py`` judges.
"""

from __future__ import annotations

import copy
import json
import math
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI

from shardscale import ShardedGradScaler, distinct, init_distributed
from shardscale.comm import MPIComm, mpi_talk
from tests.comm_contract import keep_contract
from tests.ranks.rank import outcome

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PATIENCE_S = 20.0  # for what must come; far less than the limit of the job
SHORT_S = 0.3  # for what will not
GRACE_S = 1.0


def contract(world: MPI.Intracomm) -> Any:
    return keep_contract(MPIComm(world))


# ------------------------------------------------------------------------------------- the scaler


def make(comm: MPIComm | None, dtype=torch.float32, numel=3, **options):
    parameter = torch.nn.Parameter(torch.ones(numel, dtype=dtype))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    return parameter, optimizer, ShardedGradScaler("cpu", init_scale=8.0, comm=comm, **options)


def iterate(parameter, optimizer, scaler, grad: float | None = 1.0) -> None:
    scaler.scale(torch.ones(()))
    if grad is not None:
        parameter.grad = torch.full_like(parameter, scaler.get_scale() * grad)
    scaler.step(optimizer)
    scaler.update()


def raised(job: Callable[[], Any], parameter: torch.Tensor) -> tuple[str | None, str, list[float]]:
    """What a job raised, and where the parameter is after that."""
    found = outcome(job)
    return found.error, found.message, parameter.tolist()


def nan_on_one(world: MPI.Intracomm) -> Any:
    """The last rank's gradient is NaN in the first step, all are good in the second."""
    found = {}
    for dtype in DTYPES:
        p, optimizer, scaler = make(MPIComm(world), dtype)
        is_bad = world.rank == world.size - 1
        iterate(p, optimizer, scaler, math.nan if is_bad else 1.0)
        after_bad = (p.tolist(), scaler.get_scale())
        iterate(p, optimizer, scaler)
        found[str(dtype)] = (after_bad, p.tolist(), scaler.get_scale())
    return found


def without_gradients(world: MPI.Intracomm) -> Any:
    """The last rank has an optimizer but no gradient, the first has no optimizer."""
    p, optimizer, scaler = make(MPIComm(world))
    for grad in (1.0, math.inf):
        if world.rank == 0:
            scaler.begin()
            scaler.step(())
            scaler.update()
        else:
            iterate(p, optimizer, scaler, None if world.rank == world.size - 1 else grad)
    # The second step is good where nobody but the first and the last rank was asked.
    return p.tolist(), scaler.get_scale()


def norm(world: MPI.Intracomm) -> Any:
    """A vector is cut among the ranks, so that the last one has nothing of it."""
    whole = torch.arange(1.0, 12.0)
    pieces = [*whole.chunk(world.size - 1), whole[:0]]
    parameter = torch.nn.Parameter(torch.zeros_like(pieces[world.rank]))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scaler = ShardedGradScaler("cpu", init_scale=4.0, comm=MPIComm(world))
    scaler.attach(torch.nn.ParameterList([parameter]), copies=distinct)
    scaler.scale(torch.ones(()))
    parameter.grad = pieces[world.rank] * 4.0
    found = scaler.clip_grad_norm_(optimizer, 1.0)
    scaler.step(optimizer)
    return found.item(), parameter.tolist()


def state(world: MPI.Intracomm) -> Any:
    """Each step overflows on another rank, or on none."""
    p, optimizer, scaler = make(MPIComm(world), growth_interval=2)
    for step in range(12):
        iterate(p, optimizer, scaler, math.inf if step % 5 == world.rank else 1.0)
    return scaler.state_dict(), p.tolist()


def disagreement(world: MPI.Intracomm) -> Any:
    """The first rank clips by another norm, then clips where the others step."""
    is_first = world.rank == 0
    found = []
    for sync in (True, False):
        p, optimizer, scaler = make(MPIComm(world), sync=sync)
        scaler.attach(torch.nn.ParameterList([p]), copies=distinct)
        scaler.scale(torch.ones(()))
        p.grad = torch.ones_like(p)

        def clip_apart(scaler=scaler, optimizer=optimizer) -> None:
            scaler.clip_grad_norm_(optimizer, 1.0 if is_first else 2.0)
            scaler.step(optimizer)

        found.append(raised(clip_apart, p))

    p, optimizer, scaler = make(MPIComm(world), sync=True)
    scaler.attach(torch.nn.ParameterList([p]), copies=distinct)
    scaler.scale(torch.ones(()))
    p.grad = torch.ones_like(p)
    call = scaler.clip_grad_norm_ if is_first else scaler.step
    found.append(raised(lambda: call(optimizer, *[1.0] * is_first), p))
    return found


def fault_of_one(world: MPI.Intracomm) -> Any:
    """The first rank has one parameter in two optimizers, and joins before it raises."""
    p, optimizer, scaler = make(MPIComm(world))
    twice = torch.optim.SGD([p], lr=0.5)
    scaler.scale(torch.ones(()))
    p.grad = torch.full_like(p, 8.0)
    optimizers = [optimizer, twice] if world.rank == 0 else [optimizer]
    return raised(lambda: scaler.step(optimizers), p)


def wish_to_stop(world: MPI.Intracomm) -> Any:
    """The last rank alone wishes it, in the third step."""
    p, optimizer, scaler = make(MPIComm(world))
    step = 0
    scaler.listen(lambda: step == 2 and world.rank == world.size - 1)
    found = []
    for step in range(4):  # noqa: B007 - the wish reads it
        iterate(p, optimizer, scaler)
        found.append(scaler.should_stop())
    return found


def read_late(world: MPI.Intracomm) -> Any:
    """They disagree in the first iteration. The first rank reads it at once, the others, whose
    optimizers are fused, wait in the next verdict by then."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=0.5, fused=world.rank > 0)
    scaler = ShardedGradScaler("cpu", init_scale=8.0, comm=MPIComm(world, PATIENCE_S))
    scaler.attach(torch.nn.ParameterList([parameter]), copies=distinct)

    def job() -> None:
        for _ in range(2):
            scaler.scale(torch.ones(()))
            parameter.grad = torch.full_like(parameter, 8.0)
            scaler.clip_grad_norm_(optimizer, 1.0 + world.rank)
            scaler.step(optimizer)
            scaler.update()

    started = time.monotonic()
    return *raised(job, parameter), time.monotonic() - started


def copies(world: MPI.Intracomm) -> Any:
    """A copy in the same process agrees in the same group; one out of a pickle has lost it."""
    p, optimizer, scaler = make(MPIComm(world))
    copied = copy.deepcopy(scaler)
    iterate(p, optimizer, copied, math.inf if world.rank == 0 else 1.0)
    unpickled = pickle.loads(pickle.dumps(scaler))
    lost = outcome(lambda: iterate(p, optimizer, unpickled))
    return copied.get_scale(), lost.error, lost.message


def two_scalers(world: MPI.Intracomm) -> Any:
    """On one communicator, with a patience of its own for one of them; ranks that mix them up."""
    comm = MPIComm(world)
    one = make(comm, sync=True)
    other = make(comm, sync=True, timeout_s=PATIENCE_S)
    iterate(*one)
    iterate(*other)
    mixed = outcome(lambda: iterate(*(one if world.rank == 0 else other)))
    return mixed.error, mixed.message


# ----------------------------------------------------------------------------- who does not come


def missing(world: MPI.Intracomm) -> Any:
    """The last rank comes to the third verdict when the others have given up; then all go on.

    The scaler's patience is short, the communicator's is not.
    """
    comm = MPIComm(world, PATIENCE_S)
    p, optimizer, scaler = make(comm, timeout_s=SHORT_S)
    iterate(p, optimizer, scaler)
    iterate(p, optimizer, scaler)
    is_late = world.rank == world.size - 1
    if is_late:
        world.Barrier()
    started = time.monotonic()
    found = outcome(lambda: iterate(p, optimizer, scaler))
    seconds = time.monotonic() - started
    if not is_late:
        world.Barrier()
    started = time.monotonic()
    again = outcome(lambda: comm.all_reduce_sum_(torch.zeros(2, dtype=torch.float64)))
    return {
        "error": found.error,
        "message": found.message,
        "host": MPI.Get_processor_name(),
        "seconds": seconds,
        "parameter": p.tolist(),
        "again": (again.error, again.message, time.monotonic() - started),
        "gathered": comm.all_gather_object(world.rank),
    }


def one_is_impatient(world: MPI.Intracomm) -> Any:
    """The first rank waits a moment, the others would wait long, the last one does not come."""
    comm = MPIComm(world, SHORT_S if world.rank == 0 else PATIENCE_S)
    if world.rank == world.size - 1:
        world.Barrier()
        return None
    started = time.monotonic()
    found = outcome(lambda: comm.all_reduce_sum_(torch.zeros(2, dtype=torch.float64)))
    seconds = time.monotonic() - started
    world.Barrier()
    return found.error, found.message, seconds


def interrupted(world: MPI.Intracomm) -> Any:
    """Something else ends the wait of the first rank, as Ctrl-C does; then it tries again."""
    comm = MPIComm(world, PATIENCE_S)
    if world.rank > 0:
        return None

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, SHORT_S)
    try:
        comm.all_reduce_sum_(torch.zeros(2, dtype=torch.float64))
    except KeyboardInterrupt:
        pass
    again = outcome(lambda: comm.all_reduce_sum_(torch.zeros(2, dtype=torch.float64)))
    return again.error, again.message


def not_made_by_all(world: MPI.Intracomm) -> Any:
    mine = world.Dup()  # the collective that is left under way stays on it
    is_late = world.rank == world.size - 1
    if is_late:
        world.Barrier()
    found = outcome(lambda: MPIComm(mine, SHORT_S) and None)
    if not is_late:
        world.Barrier()
    return found.error, found.message


# ------------------------------------------------------------------------- beside other traffic


def other_traffic(world: MPI.Intracomm) -> Any:
    """A collective and a message of the program are under way, and take nothing of ours."""
    comm = MPIComm(world, PATIENCE_S)
    told, summed = torch.zeros(1), torch.full((1,), float(world.rank))
    listening = world.Irecv(told, MPI.ANY_SOURCE, MPI.ANY_TAG)
    summing = world.Iallreduce(MPI.IN_PLACE, summed)
    ranks = torch.tensor([world.rank, 1.0], dtype=torch.float64)
    comm.all_reduce_sum_(ranks)
    gathered = comm.all_gather_object(world.rank)
    world.Send(torch.full((1,), float(world.rank)), (world.rank - 1) % world.size, tag=3)
    MPI.Request.Waitall([listening, summing])
    return {
        "verdict": ranks.tolist(),
        "gathered": gathered,
        "sum": summed.item(),
        "from the right": told.item(),
    }


def gather_on_a_thread(world: MPI.Intracomm) -> Any:
    """The first rank gathers on a thread while it waits for the others in MPI."""
    comm = MPIComm(world)
    gathered: list[object] = []

    def gather() -> None:
        gathered.extend(comm.all_gather_object(world.rank))

    if world.rank == 0:
        thread = threading.Thread(target=gather)
        thread.start()
        world.Barrier()
        thread.join(PATIENCE_S)
    else:
        gather()
        world.Barrier()
    return gathered


def large_objects(world: MPI.Intracomm) -> Any:
    """Too large to be sent before the other side is ready for them."""
    gathered = MPIComm(world).all_gather_object("x" * (world.rank + 1) * 2**20)
    return [len(text) for text in gathered]


def bring_up(world: MPI.Intracomm) -> Any:
    """torch.distributed with what mpirun tells, and both ways of agreeing beside each other."""
    env = init_distributed(timeout_s=PATIENCE_S)
    ranks = torch.tensor([float(env.rank)])
    dist.all_reduce(ranks)
    over_gloo, over_mpi = make(None), make(MPIComm(world))
    for job in (over_gloo, over_mpi):
        iterate(*job, math.nan if world.rank == 0 else 1.0)
    dist.destroy_process_group()
    return {
        "rank": (env.rank, env.world_size, world.rank),
        "source": env.source,
        "sum": ranks.item(),
        "scales": [scaler.get_scale() for _, _, scaler in (over_gloo, over_mpi)],
    }


# ----------------------------------------------------------------------------- what is refused


def refused(world: MPI.Intracomm) -> Any:
    is_last = world.rank == world.size - 1
    part = world.Split(MPI.UNDEFINED if is_last else 0)
    halves = world.Split(is_last)
    between = halves.Create_intercomm(0, world, 0 if is_last else world.size - 1)
    found = {
        "no member": outcome(lambda: MPIComm(part) and None),
        "an intercommunicator": outcome(lambda: MPIComm(between) and None),
        "no communicator": outcome(lambda: MPIComm(3) and None),
        "no time": outcome(lambda: MPIComm(world, math.nan) and None),
    }
    return {name: (each.error, each.message) for name, each in found.items()}


CASES: list[Callable[[MPI.Intracomm], Any]] = [
    contract,
    nan_on_one,
    without_gradients,
    norm,
    state,
    disagreement,
    fault_of_one,
    wish_to_stop,
    read_late,
    copies,
    two_scalers,
    other_traffic,
    gather_on_a_thread,
    large_objects,
    bring_up,
    refused,
]
# On three ranks only, for they wait in vain.
MORE_CASES: dict[int, list[Callable[[MPI.Intracomm], Any]]] = {
    3: [
        missing,
        one_is_impatient,
        interrupted,
        not_made_by_all,
    ],
}


def main(report: str) -> None:
    mpi_talk._GRACE_S = GRACE_S  # the usual one is for machines under load, not for a suite
    world = MPI.COMM_WORLD
    reports = {}
    for case in CASES + MORE_CASES.get(world.size, []):
        world.Barrier()
        started = time.monotonic()
        try:
            mine = case(world)
        except Exception:
            mine = {"raised": traceback.format_exc()}
        print(f"{case.__name__}: {time.monotonic() - started:.2f} s", flush=True)
        reports[case.__name__] = world.gather(mine)
    if world.rank == 0:
        Path(report).write_text(json.dumps(reports))


if __name__ == "__main__":
    main(sys.argv[1])
