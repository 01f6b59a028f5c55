"""An accelerator for a build of torch that has none: a device of its own, computed on the host.

It keeps the rules that bind a real one. Operators refuse tensors of another device; a copy to the
host that does not block has not arrived before somebody waits for it; and whatever makes the host
wait is counted. There is a transport for it, too, which refuses a message on any other device. What
is launched can be captured into a graph and replayed, as ``tests.ranks.graph`` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _create_work_from_future
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

__all__ = ["NAME", "TRANSPORT", "counted_waits", "install", "messages_seen", "recorded"]

NAME = "toy"
"""The device's type, once ``install`` was called."""
TRANSPORT = "toyccl"
"""The backend of ``torch.distributed`` whose messages live on it."""


class _Device:
    """Its memory and its only stream: one device a process."""

    def __init__(self) -> None:
        self.memory: dict[int, Tensor] = {}  # by the storage that stands for it
        self.under_way: list[tuple[Tensor, Tensor]] = []  # copies: where to, and what
        self.num_waits = 0
        self.messages: list[str] = []
        self.libraries: list[torch.library.Library] = []  # unregistered when they are collected
        self.recording: list[Callable[[], None]] | None = None  # while a graph is captured

    def wait(self) -> None:
        """What the host does to see the results of all that it has asked for."""
        self.refuse_capture("the host waits")
        self.num_waits += 1
        self.finish()

    def refuse_capture(self, what: str) -> None:
        """Only what stays on the device can be captured."""
        if self.recording is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {what}")

    def record(self, redo: Callable[[], Any], result: Any) -> None:
        """Have a replay put what ``redo`` gives where ``result`` lies."""
        if self.recording is None:
            return

        def replay() -> None:
            for old, new in zip(tree_iter(result), tree_iter(redo()), strict=True):
                if _is_here(old):
                    values = _values(old)
                    # An empty tensor that a later operator has resized holds nothing yet.
                    if values is not new and values.shape == new.shape:
                        values.copy_(new)

        self.recording.append(replay)

    def finish(self) -> None:
        """All copies have arrived."""
        for target, values in self.under_way:
            target.copy_(values)
        self.under_way = []


_device = _Device()


def install() -> None:
    """Make the device known to torch; for a rank's own process, which is soon over."""
    _setup_privateuseone_for_python_backend(NAME)
    fallback = torch.library.Library("_", "IMPL")
    fallback.fallback(_run, "PrivateUse1")
    operators = torch.library.Library("aten", "IMPL")
    operators.impl("_copy_from", _copy_from, "PrivateUse1")
    operators.impl("_to_copy", _to_copy, "PrivateUse1")
    operators.impl("_local_scalar_dense", _local_scalar_dense, "PrivateUse1")
    _device.libraries += [fallback, operators]
    torch.Event = _Event  # torch's own knows no device written in Python
    torch.get_device_module(NAME).is_current_stream_capturing = lambda: (
        _device.recording is not None
    )
    dist.Backend.register_backend(TRANSPORT, _Transport, devices=[NAME])


@contextmanager
def counted_waits() -> Iterator[list[int]]:
    """How often the host waited for the device within the block; one number, there afterwards."""
    before = _device.num_waits
    waits: list[int] = []
    yield waits
    waits.append(_device.num_waits - before)


@contextmanager
def recorded() -> Iterator[list[Callable[[], None]]]:
    """What is launched within the block, to be called one after the other by a replay.

    Nothing of it has happened afterwards: what was there before is as it was, and what was made
    inside holds rubbish until the first replay.
    """
    before = {key: (values, values.clone()) for key, values in _device.memory.items()}
    _device.recording = recording = []
    try:
        yield recording
    finally:
        _device.recording = None
        for key, values in _device.memory.items():
            if key not in before:
                values.fill_(float("nan") if values.is_floating_point() else 77)
        for values, saved in before.values():
            values.copy_(saved)


def messages_seen() -> list[str]:
    """The devices of all messages that the transport was given."""
    return _device.messages


class _Event:
    def __init__(self, device: str) -> None:
        assert device == NAME

    def record(self) -> None:
        """There is one stream, and it is never ahead of the host."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        _device.finish()  # no wait: it is asked for when the copies have long arrived


class _Transport(dist.ProcessGroup):
    """Adds up what lies on the device, and refuses everything else."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: Any) -> None:
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

    def allreduce(self, tensors: list[Tensor], options: Any) -> dist.Work:
        _device.messages += [t.device.type for t in tensors]
        if any(t.device.type != NAME for t in tensors):
            raise TypeError(f"{TRANSPORT} was given a message on {tensors[0].device}.")
        values = [_values(t) for t in tensors]
        if _device.recording is None:
            return self._gloo.allreduce(values, options)
        _device.recording.append(lambda: self._gloo.allreduce(values, options).wait())
        done: torch.futures.Future[Any] = torch.futures.Future()
        done.set_result(tensors)
        return _create_work_from_future(done)


def _is_here(x: Any) -> bool:
    return isinstance(x, Tensor) and x.device.type == NAME


def _values(tensor: Tensor) -> Tensor:
    values = _device.memory[tensor.untyped_storage()._cdata]
    if values.dtype != tensor.dtype:  # torch makes this kind of view without asking the device
        values = values.view(tensor.dtype)
    assert values.shape == tensor.shape
    return values


def _placed(values: Tensor) -> Tensor:
    tensor = torch._C._acc.create_empty_tensor(list(values.shape), values.dtype)
    _device.memory[tensor.untyped_storage()._cdata] = values
    return tensor


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Any operator, on the values; views share memory, and what was written to comes back."""
    known: dict[int, Tensor] = {}
    for t in tree_iter((args, kwargs)):
        # As on CUDA, a number may come along from the host.
        if isinstance(t, Tensor) and not _is_here(t) and (t.dim() or "amp" in str(op)):
            raise RuntimeError(f"{op} got tensors on {NAME} and on {t.device}.")

    def to_host(x: Any) -> Any:
        if isinstance(x, torch.device):
            return torch.device("cpu")
        if not _is_here(x):
            return x
        values = _values(x)
        known[id(values)] = x
        return values

    def from_host(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if id(x) not in known:
            return _placed(x)
        if known[id(x)].shape != x.shape:  # a result that the operator has resized
            known[id(x)].data = _placed(x)
        return known[id(x)]

    pairs = zip(op._schema.arguments, args, strict=False)
    if any(str(wanted.type) == "Tensor" and isinstance(x, int | float) for wanted, x in pairs):
        op = op.overloadpacket  # a number that stood for a tensor arrives as a number
    def run() -> Any:
        return op(*tree_map(to_host, args), **tree_map(to_host, kwargs))

    result = tree_map(from_host, run())
    _device.record(run, result)
    return result


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    if not _is_here(target):
        _device.wait()  # into memory that is not pinned, every copy blocks
    elif not _is_here(source):
        _device.refuse_capture("a copy from memory that is not pinned")
    source, values = (_values(t) if _is_here(t) else t for t in (source, target))
    values.copy_(source)
    _device.record(lambda: values.copy_(source), target)
    return target


def _to_copy(
    source: Tensor,
    *,
    dtype: torch.dtype | None = None,
    layout: Any = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    non_blocking: bool = False,
    memory_format: Any = None,
) -> Tensor:
    values = _values(source) if _is_here(source) else source
    values = values.to(dtype or source.dtype, copy=True)
    if device is None or device.type == NAME:
        if not _is_here(source):
            _device.refuse_capture("a copy from memory that is not pinned")
        placed = _placed(values)
        _device.record(lambda: _values(source).to(placed.dtype), placed)
        return placed
    _device.refuse_capture("a copy to the host")
    if not non_blocking:
        _device.wait()
        return values
    # Torch puts the result into pinned memory, which fills up behind the host's back.
    arriving = torch.full_like(values, 7e3)
    _device.under_way.append((arriving, values))
    return arriving


def _local_scalar_dense(tensor: Tensor) -> Any:
    _device.wait()
    return _values(tensor).item()
