"""Count what goes over the wire: collectives below torch.distributed, requests to the store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Counted", "count_collectives", "CountingStore"]

_NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")
_NOT_SENT = ("wait_tensor", "_wrap_tensor_autograd")


class Counted:
    """What a ``count_collectives`` block has seen; final once the block is left."""

    def __init__(self) -> None:
        self.ops: list[str] = []
        """Operators as the dispatcher saw them, ``c10d.allreduce_`` for example, oldest first; this
        thread only."""
        self.launched = 0
        """How far the sequence numbers of all groups moved: any thread, and calls past the
        dispatcher too."""

    @property
    def num(self) -> int:
        """Number of collectives. Neither way of counting can see too few without the other seeing
        more."""
        return max(len(self.ops), self.launched)


@contextmanager
def count_collectives() -> Iterator[Counted]:
    """Count the collectives that this rank takes part in, in any group, whoever launches them.

    Two independent counts are kept. The dispatch mode names the operators, and sees functional and
    coalesced ones; a call on a backend object goes past it, and so does one from another thread.
    The backend numbers every operation it starts, but not each kind on each backend; Gloo counts a
    ``monitored_barrier`` twice.
    """
    counted = Counted()
    before = _sequence_numbers()
    with _Recorder(counted.ops):
        try:
            yield counted
        finally:
            after = _sequence_numbers()
            counted.launched = sum(number - before.get(key, 0) for key, number in after.items())


class _Recorder(TorchDispatchMode):
    def __init__(self, ops: list[str]) -> None:
        super().__init__()
        self._ops = ops

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in _NAMESPACES and func._opname not in _NOT_SENT:
            self._ops.append(f"{func.namespace}.{func._opname}")
        return func(*args, **(kwargs or {}))


def _sequence_numbers() -> dict[tuple[str, int], int]:
    """Operations started so far, by group name and by backend within the group."""
    numbers = {}
    for group in dist.distributed_c10d._world.pg_map:
        backends = {id(b): b for b in map(group._get_backend, group._device_types)}
        for index, backend in enumerate(backends.values()):
            numbers[group.group_name, index] = backend._get_sequence_number_for_group()
    return numbers


class CountingStore(dist.Store):
    """A store that keeps a list of everything asked of it, and asks the store it is made with."""

    def __init__(self, inner: dist.Store) -> None:
        super().__init__()
        self._inner = inner
        self.requests: list[tuple[str, str]] = []
        """(method, key), oldest first; a request for several keys is entered once for each."""

    def set(self, key, value):
        self.requests.append(("set", key))
        return self._inner.set(key, value)

    def get(self, key):
        self.requests.append(("get", key))
        return self._inner.get(key)

    def add(self, key, amount):
        self.requests.append(("add", key))
        return self._inner.add(key, amount)

    def append(self, key, value):
        self.requests.append(("append", key))
        return self._inner.append(key, value)

    def compare_set(self, key, expected, desired):
        self.requests.append(("compare_set", key))
        return self._inner.compare_set(key, expected, desired)

    def delete_key(self, key):
        self.requests.append(("delete_key", key))
        return self._inner.delete_key(key)

    def check(self, keys):
        self.requests.extend(("check", key) for key in keys)
        return self._inner.check(keys)

    def wait(self, keys, *timeout):
        self.requests.extend(("wait", key) for key in keys)
        return self._inner.wait(keys, *timeout)

    def multi_get(self, keys):
        self.requests.extend(("multi_get", key) for key in keys)
        return self._inner.multi_get(keys)

    def multi_set(self, keys, values):
        self.requests.extend(("multi_set", key) for key in keys)
        return self._inner.multi_set(keys, values)

    def num_keys(self):
        self.requests.append(("num_keys", ""))
        return self._inner.num_keys()

    def has_extended_api(self):
        return self._inner.has_extended_api()

    def set_timeout(self, timeout):
        return self._inner.set_timeout(timeout)

    def clone(self):
        return self
