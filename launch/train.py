"""The program that every launcher starts: torchrun, srun, mpirun, or nobody.

    torchrun --nproc-per-node 4 launch/train.py --steps 100
    srun --ntasks-per-node 4 python launch/train.py --checkpoint runs/a

Each process finds out which rank it is and trains its part of the demo's model; rank 0 shows what
every rank ended with. Exit code on every rank: 0 if the ranks agree, 3 if they diverged, 2 for an
option or an environment that cannot be used, and 85 if they were told to stop before the end.
"""

from __future__ import annotations

import os
import sys

from shardscale import ConfigError, StopSignal
from shardscale.comm import check_mpi_size, resolve

# First of all: to import torch takes seconds, in which a signal would end the rank, and an
# environment that is wrong can be told at once.
try:
    stop = StopSignal(os.environ.get("SHARDSCALE_STOP_SIGNAL", "USR2"))
    resolve(os.environ)
    if "mpi4py" in sys.modules:  # which has started this program
        from mpi4py import MPI

        check_mpi_size(os.environ, MPI.COMM_WORLD.Get_size(), MPI.Get_library_version())
except ConfigError as error:
    print(f"launch/train.py: {error}", file=sys.stderr)
    sys.exit(2)

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import typer
from checkpoints import CheckpointError, load_newest, save
from steplog import RankLog

import shardscale
from shardscale.demo.data import share_digits
from shardscale.demo.flags import (
    Checkpoint,
    Comm,
    Inject,
    Json,
    Optimizer,
    SaveEvery,
    Scaler,
    StepLog,
    Steps,
    Verbose,
    Wrap,
)
from shardscale.demo.job import joined_group
from shardscale.demo.options import JobOptions, OptionError, check_json, check_options
from shardscale.demo.play import conclude, exit_code, make_console
from shardscale.demo.progress import show_progress
from shardscale.demo.results import Tick
from shardscale.demo.training import Training

STOPPED = 85


def main(
    wrap: Wrap = None,
    optimizer: Optimizer = None,
    scaler: Scaler = None,
    inject: Inject = None,
    steps: Steps = 150,
    json: Json = None,
    comm: Comm = "torch",
    checkpoint: Checkpoint = None,
    save_every: SaveEvery = 100,
    step_log: StepLog = None,
    verbose: Verbose = False,
) -> None:
    """Train this rank's part of the demo's model, whatever has launched it."""
    is_first = True  # until that is known, every rank says what is wrong
    try:
        with joined_group() as (env, device):
            is_first = env.rank == 0
            if is_first or verbose:
                print(f"launch/train.py: {env}", flush=True)
            options = check_options(
                ranks=env.world_size,
                wrap=wrap,
                optimizer=optimizer,
                scaler=scaler,
                steps=steps,
                inject=inject,
            )
            check_more(options, comm, checkpoint, save_every)
            # Only rank 0 writes; on another machine the folder need not exist.
            check_json(json if is_first else None)

            training = Training(options, share_digits(device), communicator(comm))
            if checkpoint:
                go_on(training, steps, checkpoint)
                if is_first and training.num_done:
                    end = ", which was the last" if training.num_done == steps else ""
                    print(
                        f"launch/train.py: goes on after step {training.num_done}{end}", flush=True
                    )
            log = RankLog(step_log, env.rank) if step_log else None
            console = make_console(quiet=not is_first)
            with show_progress(console, [options]) as show:
                for tick in train(training, steps, checkpoint, save_every):
                    if is_first:
                        show(0, tick)
                    if log:
                        log.write(tick.step, tick.scale, training.witness)
            if training.num_done < steps:
                saved = f"and saved in {checkpoint}" if checkpoint else "without --checkpoint"
                console.print(f"Told to stop: stopped after step {training.num_done}, {saved}.")
                code = STOPPED
            else:
                result = training.result()
                conclude(console, [(options, result)], json if is_first else None)
                code = exit_code((options, result))
            # The launcher ends all ranks as soon as one has left with a code other than 0. So none
            # leaves before rank 0 has spoken, and from then on no signal changes the code.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            stop.ignore()
            dist.barrier()
            if mpi := sys.modules.get("mpi4py.MPI"):
                mpi.Finalize()  # or `-m mpi4py` takes a code other than 0 for a broken rank
    except (ConfigError, OptionError, CheckpointError) as error:
        if is_first:
            print(f"launch/train.py: {error}", file=sys.stderr)
        code = 2
    raise typer.Exit(code)


def check_more(options: JobOptions, comm: str, checkpoint: Path | None, save_every: int) -> None:
    """Say which of the options that only this program has cannot be used."""
    if comm not in ("torch", "mpi"):
        raise OptionError(f"--comm is '{comm}', but must be torch or mpi.")
    if options.scaler == "torch" and (checkpoint or comm == "mpi"):
        raise OptionError("--checkpoint and --comm mpi need --scaler shardscale.")
    if save_every < 1:
        raise OptionError(f"--save-every is {save_every}, but must be at least 1.")


def communicator(comm: str) -> shardscale.Communicator | None:
    """What the scaler agrees over; None for torch.distributed."""
    if comm == "torch":
        return None
    try:
        from mpi4py import MPI
    except ModuleNotFoundError:
        raise OptionError(
            "--comm is 'mpi', but mpi4py is not here: pip install '.[mpi]', and an MPI."
        ) from None

    return shardscale.comm.MPIComm(MPI.COMM_WORLD)


def go_on(training: Training, steps: int, checkpoint: Path) -> None:
    """Go on from the newest checkpoint, unless it lies beyond the last step.

    Collective: every rank of the job must call.
    """
    num_done = load_newest(checkpoint, *training.parts)
    if num_done > steps:
        raise OptionError(
            f"--steps is {steps}, but the newest checkpoint in {checkpoint} is of step {num_done}. "
            "Ask for more steps, or name another folder to begin anew."
        )
    training.go_on_after(num_done)


def train(
    training: Training, steps: int, checkpoint: Path | None, save_every: int
) -> Iterator[Tick]:
    """Train to the end, or until the ranks are told to stop; save on the way.

    Collective: every rank of the job must go through it to its end.
    """
    told_to_stop = listen(training.scaler)
    stopped = False
    while training.num_done < steps and not stopped:
        yield training.step()
        # The same answer on every rank after the same update(): all save, and all leave.
        stopped = told_to_stop()
        is_over = stopped or training.num_done == steps
        if checkpoint and (is_over or training.num_done % save_every == 0):
            save(checkpoint, training.num_done, *training.parts)


def listen(scaler: torch.amp.GradScaler) -> Callable[[], bool]:
    """Have each verdict carry this rank's wish to stop; torch's scaler has none to carry it."""
    if isinstance(scaler, shardscale.ShardedGradScaler):
        return scaler.listen(stop).should_stop
    return lambda: False


if __name__ == "__main__":
    typer.run(main)
