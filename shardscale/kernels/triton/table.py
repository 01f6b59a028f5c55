"""The table in a device's memory that says where a list of gradients lies.

What depends on the gradients' sizes alone, which elements each program takes, is built once and
cached. Where the gradients are is compared with what the device holds at every call, and sent only
when it has changed: always into new memory, so that no kernel that is still running, and no graph
that will be replayed, ever reads another list's addresses.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from operator import attrgetter
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from shardscale.errors import ConfigError, LayoutError, StageError
from shardscale.kernels import native

__all__ = ["BLOCKS", "Part", "Table", "find_table", "rows_of"]

BLOCKS = {torch.float16: 2048, torch.bfloat16: 2048, torch.float32: 2048, torch.float64: 1024}
"""Elements that a program takes at a time; a gradient of another dtype is not taken."""

# Segments begin at multiples of this within a gradient: whole sectors of memory.
_CUT_BYTES = 256
# For less no program is started; but a small gradient costs time, not bytes, and gets its own.
_PROGRAM_BYTES = 8192
# A program's offsets within a segment are 32 bits long.
_MOST_ELEMENTS = 2**30
_MOST_TABLES = 64
# Lists of the same sizes and dtypes, such as two networks of one shape, that keep their own tables.
_MOST_ALIKE = 4
_PROGRAMS_PER_PROCESSOR = 8
_DTYPE = attrgetter("dtype")
_DEVICE = attrgetter("device")

_Key = tuple[torch.device, bytes, bytes]
# The last to be used stands last, among the keys and for each of them.
_tables: OrderedDict[_Key, list[Table]] = OrderedDict()
# What a graph has captured it reads at every replay, and nobody says when the last one was.
_captured: dict[tuple[_Key, bytes], Table] = {}
_lock = Lock()


class Part(NamedTuple):
    """The gradients of one dtype, cut into segments."""

    dtype: torch.dtype
    segments: Tensor
    """(S, 4) int64: position in the list, first element, end, number of elements."""
    programs: Tensor
    """(P + 1,) int32: the first segment of each program."""

    @property
    def num_programs(self) -> int:
        """How many programs work at it."""
        return self.programs.numel() - 1


class Table(NamedTuple):
    """A list of gradients as the device finds it. It keeps none of them alive."""

    addresses: Tensor
    """(N,) int64."""
    held: bytes
    """The same on the host."""
    parts: tuple[Part, ...]
    """One for each dtype that has elements."""
    staging: _Staging | None
    """Where the host writes addresses; None if the device is the host."""
    uploaded: torch.cuda.Event | None
    """When ``addresses`` have arrived."""
    stream: torch.cuda.Stream | None
    """On which they were sent."""


def find_table(grads: Sequence[Tensor], device: torch.device) -> Table:
    """The table of these gradients, up to date and safe to use on the current stream.

    Args:
        grads: Dense gradients of the four dtypes, all on ``device``.
        device: Where the flag is; it must be the current one.

    Raises:
        ConfigError: Gradients are on another device.
        LayoutError: Two of them share memory, or one begins within an element.
        StageError: A graph is being captured, and no table holds these addresses.

    Sync: none; but where two lists were sent before this one and the first is still on its way, the
        host waits for it.
    """
    addresses, numels, dtypes = native.survey(grads) or _survey(grads)
    if not numels.strip(b"\0"):
        return Table(torch.empty(0, dtype=torch.int64, device=device), b"", (), None, None, None)
    with _lock:
        return _find(grads, (device, dtypes, numels), addresses)


def _survey(grads: Sequence[Tensor]) -> native.Survey:
    """What the C code finds in a tenth of the time."""
    return native.Survey(
        array("q", map(Tensor.data_ptr, grads)).tobytes(),
        array("q", map(Tensor.numel, grads)).tobytes(),
        bytes(map(list(BLOCKS).index, map(_DTYPE, grads))),
    )


def _find(grads: Sequence[Tensor], key: _Key, addresses: bytes) -> Table:
    device, _, numels = key
    if _is_capturing(device):
        return _find_captured(key, addresses)
    alike = _tables.setdefault(key, [])
    _tables.move_to_end(key)
    if len(_tables) > _MOST_TABLES:
        _tables.popitem(last=False)
    place = next((i for i, table in enumerate(alike) if table.held == addresses), None)
    if place is not None:
        table = alike.pop(place)
        _order(table)
    else:
        _refuse(grads, device, addresses, numels)
        if not alike:
            table = _build(grads, device, numels)
        else:
            table = alike.pop(0) if len(alike) == _MOST_ALIKE else alike[0]
            _order(table)
        table = _upload(table, addresses)
    alike.append(table)
    return table


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _find_captured(key: _Key, addresses: bytes) -> Table:
    known = [table for table in _tables.get(key, []) if table.held == addresses]
    table = known[0] if known else _captured.get((key, addresses))
    if table is None:
        raise StageError(
            "A CUDA graph is being captured, but its gradients lie where no iteration has found "
            "them before, and a replay reads their addresses from a table that must be filled "
            "beforehand. Run one iteration as usual first and keep the gradients in place: "
            "zero_grad(set_to_none=False), or static buffers for .grad."
        )
    _captured[key, addresses] = table
    return table


def _refuse(grads: Sequence[Tensor], device: torch.device, lie: bytes, numels: bytes) -> None:
    """Raise if the device cannot work at this list, or would do so twice at some of it."""
    if {*map(_DEVICE, grads)} != {device}:
        i = next(i for i, grad in enumerate(grads) if grad.device != device)
        raise ConfigError(
            f"Gradient {i} is on {grads[i].device}, but found_inf on {device}. Call once for each "
            "device, with a flag there."
        )
    itemsizes = np.array([g.itemsize for g in grads], np.int64)
    begins, sizes = _words(lie), _words(numels) * itemsizes
    filled = np.flatnonzero(sizes)
    for i in filled[begins[filled] == 0].tolist():
        raise LayoutError(f"Gradient {i} has elements, but no memory: it was freed.")
    for i in filled[begins[filled] % itemsizes[filled] != 0].tolist():
        raise LayoutError(
            f"Gradient {i} begins within an element, at address {begins[i]:#x}. Clone it."
        )
    order = filled[np.argsort(begins[filled], kind="stable")]
    overlaps = begins[order[1:]] < (begins + sizes)[order[:-1]]
    for i in np.flatnonzero(overlaps).tolist():
        one, other = sorted(order[i : i + 2].tolist())
        raise LayoutError(
            f"Gradients {one} and {other} share memory, which would be multiplied twice. Pass each "
            "gradient once, and clone those that are views of one another."
        )


def _build(grads: Sequence[Tensor], device: torch.device, numels: bytes) -> Table:
    """A table without addresses."""
    dtypes, counts = list(map(_DTYPE, grads)), _words(numels)
    parts = []
    for dtype in dict.fromkeys(dtypes):
        positions = np.array([i for i, d in enumerate(dtypes) if d == dtype], np.int64)
        positions = positions[counts[positions] > 0]
        if len(positions):
            rows, programs = rows_of(
                positions, counts[positions], dtype.itemsize, _most_programs(device)
            )
            parts.append(Part(dtype, _send(rows, device), _send(programs, device)))
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    staging = _Staging(len(grads)) if device.type == "cuda" else None
    return Table(nothing, b"", tuple(parts), staging, None, None)


def rows_of(
    positions: np.ndarray, numels: np.ndarray, itemsize: int, most_programs: int
) -> tuple[np.ndarray, np.ndarray]:
    """Cut gradients so that every program gets the same share of bytes.

    Args:
        positions: (N,) int64, of the gradients in their list.
        numels: (N,) int64, none of them 0.
        itemsize: Bytes per element.
        most_programs: How many programs the device is best given.

    Returns:
        (S, 4) int64 segments and (P + 1,) int32 programs, as in :class:`Part`.
    """
    per_cut = _CUT_BYTES // itemsize
    starts = np.concatenate([[0], np.cumsum(-(-numels // per_cut))])
    num_cuts = int(starts[-1])
    worth = max(len(numels), -(-num_cuts // (_PROGRAM_BYTES // _CUT_BYTES)))
    num_programs = min(most_programs, worth)
    num_programs = max(num_programs, -(-num_cuts // (_MOST_ELEMENTS // per_cut)))
    shares = np.arange(num_programs + 1) * num_cuts // num_programs
    borders = np.unique(np.concatenate([starts, shares]))
    which = np.searchsorted(starts, borders[:-1], side="right") - 1
    first = (borders[:-1] - starts[which]) * per_cut
    end = np.minimum((borders[1:] - starts[which]) * per_cut, numels[which])
    rows = np.stack([positions[which], first, end, numels[which]], axis=1)
    return rows, np.searchsorted(borders, shares).astype(np.int32)


def _order(table: Table) -> None:
    """Make the current stream wait for what another one has sent, and memory wait for it.

    Also where new addresses are to be sent: the segments are still those of the first time.
    """
    if table.stream is None or table.uploaded is None:
        return
    stream = torch.cuda.current_stream(table.addresses.device)
    if stream != table.stream:
        stream.wait_event(table.uploaded)
        for tensor in (table.addresses, *(t for part in table.parts for t in part[1:])):
            tensor.record_stream(stream)


def _upload(table: Table, addresses: bytes) -> Table:
    """The table with other addresses, which are on their way on the current stream."""
    if table.staging is None:
        return table._replace(addresses=torch.from_numpy(_words(addresses)), held=addresses)
    device = table.addresses.device
    sent, uploaded = table.staging.send(_words(addresses), device)
    stream = torch.cuda.current_stream(device)
    return table._replace(addresses=sent, held=addresses, uploaded=uploaded, stream=stream)


class _Staging:
    """Two pinned buffers of the host, so that none is written while it is still being copied."""

    def __init__(self, num: int) -> None:
        self._buffers = [torch.empty(num, dtype=torch.int64, pin_memory=True) for _ in range(2)]
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def send(self, words: np.ndarray, device: torch.device) -> tuple[Tensor, torch.cuda.Event]:
        """Copies to the device, on the current stream, and the event of their arrival."""
        turn = self._turn = 1 - self._turn
        last = self._copied[turn]
        if last is not None:
            last.synchronize()
        self._buffers[turn].numpy()[:] = words
        sent = self._buffers[turn].to(device, non_blocking=True)
        arrived = self._copied[turn] = torch.cuda.Event()
        arrived.record()
        return sent, arrived


def _send(values: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(values)
    # torch gives pinned memory to nobody else before the copy is done.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _words(text: bytes) -> np.ndarray:
    return np.frombuffer(bytearray(text), np.int64)


def _most_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return _PROGRAMS_PER_PROCESSOR  # Triton's interpreter, which runs one after the other
    properties = torch.cuda.get_device_properties(device)
    return _PROGRAMS_PER_PROCESSOR * properties.multi_processor_count
