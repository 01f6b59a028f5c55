"""Starts the ranks of a job as processes of this machine, through torchrun's elastic launcher."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import Pipe, active_children
from multiprocessing.connection import Connection
from threading import Thread
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from shardscale.demo.data import share_digits
from shardscale.demo.job import TIMEOUT_S, joined_group, train
from shardscale.demo.options import JobOptions
from shardscale.demo.progress import OnTick
from shardscale.demo.results import JobResult, Tick

__all__ = ["RankError", "default_ranks", "launch", "start_jobs"]


class RankError(RuntimeError):
    """A rank ended with an error; the text is its traceback, or the signal that killed it."""


def default_ranks() -> int:
    """Return one rank per GPU where this machine has several, else four."""
    num_gpus = torch.cuda.device_count()
    return num_gpus if num_gpus >= 2 else 4


def start_jobs(jobs: Sequence[JobOptions], on_tick: OnTick) -> list[JobResult]:
    """Train on new processes of this machine, one job after the other.

    Args:
        jobs: What to train; all ask for the same number of ranks.
        on_tick: Called here, from another thread, with each step that rank 0 reports.

    Returns:
        What the ranks of each job ended with.

    Raises:
        RankError: A rank failed; the others have been ended.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the ranks have been ended.
    """
    with _ticks_to(on_tick) as writer:
        results = launch(jobs[0].ranks, _rank_main, tuple(jobs), writer)
    first: list[JobResult] = results[0]
    return first


def launch(ranks: int, entry: Callable[..., Any], *args: object) -> dict[int, Any]:
    """Call a function on new ranks of this machine and return what it returned on each.

    Args:
        ranks: How many.
        entry: A function of a module, so that new processes find it by name.
        args: What to pass to it, the same on every rank.

    Raises:
        RankError: A rank failed; the others have been ended.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the ranks have been ended.
    """
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=f"shardscale-demo-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        rdzv_configs={"timeout": TIMEOUT_S},
        # Looking up the machine's own name can take many seconds or fail.
        local_addr="127.0.0.1",
        max_restarts=0,
        shutdown_timeout=5,
    )
    with _no_orphans(), _own_signal_handlers(), _quiet_logs():
        try:
            returned: dict[int, Any] = elastic_launch(config, entry)(*args)
        except ChildFailedError as error:
            raise RankError(_first_failure(error)) from None
        except SignalException as error:
            raise KeyboardInterrupt from error
    return returned


def _rank_main(jobs: Sequence[JobOptions], writer: Connection) -> list[JobResult]:
    with joined_group() as (_, device):
        digits = share_digits(device)
        return [
            train(job, digits, partial(_tell, writer, number)) for number, job in enumerate(jobs)
        ]


def _tell(writer: Connection, number: int, tick: Tick) -> None:
    writer.send((number, tick))


@contextmanager
def _ticks_to(on_tick: OnTick) -> Iterator[Connection]:
    """Yield a connection that ranks can write to; what arrives is passed to the function.

    A pipe, because it ends by itself: once every rank is gone and this process has closed its own
    copy, the reader sees the end of the file, even in the middle of a message.
    """
    reader, writer = Pipe(duplex=False)

    def read() -> None:
        # Closed however this ends: writing to a pipe that nobody reads is an
        # error on rank 0, while a full one would make it wait.
        with reader, suppress(EOFError):
            while True:
                on_tick(*reader.recv())

    thread = Thread(target=read, daemon=True)
    thread.start()
    try:
        yield writer
    finally:
        writer.close()
        thread.join(timeout=TIMEOUT_S)


@contextmanager
def _no_orphans() -> Iterator[None]:
    """Kill what is left of the processes started meanwhile.

    The launcher ends its ranks itself, but does not know them yet when a signal comes while it
    is starting them.
    """
    before = set(active_children())
    try:
        yield
    finally:
        for process in set(active_children()) - before:
            process.kill()
            process.join()


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Put back the signal handlers that the elastic launcher replaces for good."""
    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _quiet_logs() -> Iterator[None]:
    """Keep the launcher from logging the traceback that its error carries anyway."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _first_failure(error: ChildFailedError) -> str:
    rank, failure = error.get_first_failure()
    message: Any = failure.message
    if isinstance(message, dict):
        message = message.get("extraInfo", {}).get("py_callstack") or message.get("message")
    elif failure.exitcode > 0:
        message = f"it ended with exit code {failure.exitcode}."
    return f"rank {rank} failed: {message}".rstrip()
