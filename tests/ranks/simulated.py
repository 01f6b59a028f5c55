"""Jobs of a thousand ranks and more in one process, by three private modules of torch.

They leave global state behind, so what calls them runs in a process of its own, as a case on one
rank does. torch is pinned where it matters; if one of these modules goes, the tests that need it
fail and are not skipped.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._local_tensor import LocalTensor, LocalTensorMode
from torch.testing._internal.distributed import multi_threaded_pg as threaded
from torch.testing._internal.distributed.fake_pg import FakeStore

from shardscale.comm.process_group import ProcessGroupComm

__all__ = ["on_threads", "summed"]

T = TypeVar("T")

_STACK_BYTES = 2**19  # a thousand threads with the usual 8 MiB each would reserve 8 GiB


def summed(messages: Sequence[Tensor]) -> Tensor:
    """The messages of all ranks, one a row, after the library's own all-reduce of them.

    The group is torch's fake one, which moves nothing, under LocalTensorMode: a LocalTensor holds
    the tensors of all ranks, every operator runs on each of them, and a collective, which the mode
    catches where c10d dispatches it, really adds them up.
    """
    size = len(messages)
    if not dist.is_initialized():
        dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    held = torch.stack(list(messages))
    of_rank = dict(enumerate(held.unbind()))  # views: what a rank receives stands in its row
    with LocalTensorMode(size):
        ProcessGroupComm(dist.group.WORLD).all_reduce_sum_(LocalTensor(of_rank))
    return held


def on_threads(fn: Callable[[ProcessGroupComm], T], size: int) -> list[T | BaseException]:
    """What ``fn`` returned or raised on each of ``size`` threads of one threaded process group.

    Each thread is a rank with a default group, a store and collectives like those of a process;
    where the scaler is told of its group by ``comm=``, nothing of it knows the difference. (Without
    that, scalers are numbered in the order in which one process makes them.)
    """
    store = dist.HashStore()
    outcomes: list[T | BaseException] = [RuntimeError("never ran")] * size

    def be_rank(rank: int) -> None:
        # Names of groups would otherwise be one table for all threads, and the ranks never meet.
        torch._C._distributed_c10d._set_thread_isolation_mode(True)
        try:
            dist.init_process_group("threaded", rank=rank, world_size=size, store=store)
            outcomes[rank] = fn(ProcessGroupComm(dist.group.WORLD))
        except BaseException as error:
            outcomes[rank] = error
            threaded.ProcessLocalGroup.exception_handle(error)  # the others wait for ever otherwise

    before = threading.stack_size(_STACK_BYTES)
    threaded._install_threaded_pg()
    threads = [threading.Thread(target=be_rank, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    threaded._uninstall_threaded_pg()
    threading.stack_size(before)
    return outcomes
