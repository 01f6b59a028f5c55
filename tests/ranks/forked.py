"""What a rank does from the fork to its end: files, group, case, result."""

from __future__ import annotations

import ctypes
import datetime
import faulthandler
import operator
import os
import pathlib
import pickle
import random
import signal
import socket
import sys
import traceback
from multiprocessing import connection

import numpy
import torch
import torch.distributed as dist

from tests.ranks import rank as rank_module
from tests.ranks.counting import CountingStore
from tests.ranks.report import Request

__all__ = ["be_rank"]


def be_rank(
    request: Request,
    rank: int,
    listener: socket.socket | None,
    results: connection.Connection,
    go: connection.Connection,
) -> None:
    """Run the case and send what came of it; the caller ends the process."""
    _die_with_parent()
    _open_files(request, rank)
    try:
        reply = (pickle.dumps(_run(request, rank, listener)), None)
    except BaseException:
        reply = (None, traceback.format_exc())
    results.send_bytes(pickle.dumps(reply))
    # Nobody leaves before all have finished: who left early would look like a failure to the rest.
    try:
        go.recv_bytes()
    except EOFError:
        pass
    sys.stdout.flush()
    sys.stderr.flush()


def _run(request: Request, rank: int, listener: socket.socket | None) -> object:
    torch.manual_seed(0)
    numpy.random.seed(0)
    random.seed(0)
    kwargs = pickle.loads(request.kwargs)
    case = operator.attrgetter(request.qualname)(sys.modules[request.module])
    if request.backend is not None:
        store = rank_module._here.store = _make_store(request, rank, listener)
        dist.init_process_group(
            request.backend,
            store=store,
            rank=rank,
            world_size=request.size,
            timeout=datetime.timedelta(seconds=request.group_timeout_s),
        )
    return case(rank, request.size, **kwargs)


def _make_store(request: Request, rank: int, listener: socket.socket | None) -> dist.Store:
    if listener is not None:
        # The port is bound and listening since before the fork: nobody can take it, nobody can come
        # too early.
        timeout = datetime.timedelta(seconds=request.group_timeout_s)
        port = listener.getsockname()[1]
        fd = listener.detach()
        if rank != 0:
            os.close(fd)
        options = {"is_master": True, "master_listen_fd": fd} if rank == 0 else {"is_master": False}
        return dist.TCPStore(
            "127.0.0.1", port, request.size, timeout=timeout, wait_for_workers=False, **options
        )
    file_store = dist.FileStore(os.path.join(request.directory, "store"), request.size)
    return CountingStore(file_store) if request.store == "counting" else file_store


def _open_files(request: Request, rank: int) -> None:
    base = os.path.join(request.directory, f"rank{rank}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    out = os.open(base + ".out", flags)
    os.dup2(out, 1)
    os.dup2(out, 2)
    rank_module._here.log_fd = os.open(base + ".log", flags)
    rank_module._here.directory = pathlib.Path(request.directory)
    stack = os.open(base + ".stack", flags)
    faulthandler.enable(out)
    faulthandler.register(signal.SIGUSR1, stack, all_threads=True)


def _die_with_parent() -> None:
    """On Linux a rank ends with the server, even if the server is killed outright."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
