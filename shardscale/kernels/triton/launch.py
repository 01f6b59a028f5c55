"""The entry points: look up the table of a list of gradients and start the kernels over it.

One launch for each dtype, whatever the number of gradients, and one more for all sums of squares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from shardscale.errors import ConfigError
from shardscale.kernels.triton.table import BLOCKS, Part, Table, find_table

__all__ = ["check_", "count", "scale_", "unscale_", "why_not"]

_NUM_WARPS = 4
# Whether products are fused with additions would by default differ between versions of Triton, and
# so would sums.
_OPTIONS = {"num_warps": _NUM_WARPS, "enable_fp_fusion": True}
_SUM_BLOCK = 1024


def unscale_(
    grads: Sequence[Tensor],
    inv_scale: Tensor,
    found_inf: Tensor,
    sum_squares: Tensor | None = None,
) -> None:
    """Multiply each gradient by ``inv_scale`` in place, looking for Inf and NaN on the way.

    Args:
        grads: Dense gradients on the flag's device, of any shape; dtypes may be mixed.
        inv_scale: () float32. Exactly 1 leaves every bit alone.
        found_inf: () float32; becomes 1.0 if an element is not finite, is left alone otherwise. The
            scaled input is judged; where ``inv_scale`` exceeds 1, the product too. An
            ``inv_scale`` of 0 or that is not finite counts as found: it would make every step zero.
        sum_squares: () float64; the sum of the squared products, rounded as stored, is added to it.

    Raises:
        ConfigError: Something is on another device than the flag.
        LayoutError: Two gradients share memory.
        StageError: A graph is being captured and the gradients lie where no call has found them.

    Sync: none.
    """
    _judge(grads, inv_scale, found_inf, sum_squares, write=True)


def check_(
    grads: Sequence[Tensor],
    inv_scale: Tensor,
    found_inf: Tensor,
    sum_squares: Tensor | None = None,
) -> None:
    """Judge gradients as :func:`unscale_` does, but leave them scaled.

    Args:
        grads: As for :func:`unscale_`.
        inv_scale: () float32, what they will be multiplied by.
        found_inf: () float32; becomes 1.0 if an element, or its product as stored, is not finite.
        sum_squares: () float64; the sum of the squared products, not rounded, is added to it.

    Raises:
        ConfigError, LayoutError, StageError: As :func:`unscale_`.

    Sync: none.
    """
    _judge(grads, inv_scale, found_inf, sum_squares, write=False)


def scale_(grads: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply each gradient by ``factor``, () float32, in place; exactly 1 leaves every bit alone.

    Raises:
        ConfigError, LayoutError, StageError: As :func:`unscale_`.

    Sync: none.
    """
    device = factor.device
    with _current(device):
        table = find_table(grads, device)
        for part in table.parts:
            _start("scale_kernel", table, part, (factor,))


def count(grads: Sequence[Tensor]) -> Tensor:
    """Count what is not finite.

    Args:
        grads: As for :func:`unscale_`, on one device.

    Returns:
        (N, 3) float64 on that device: of each gradient the number of its Infs, the number of its
        NaNs, and its largest magnitude: Inf if it holds an Inf, NaN if it holds a NaN.

    Raises:
        ConfigError, LayoutError, StageError: As :func:`unscale_`.

    Sync: none.
    """
    if not grads:
        return torch.zeros(0, 3, dtype=torch.float64, device="cpu")
    device = grads[0].device
    with _current(device):
        table = find_table(grads, device)
        counts = torch.zeros(len(grads), 3, dtype=torch.int64, device=device)
        for part in table.parts:
            _start("count_kernel", table, part, (counts,), LANES=_num_lanes(device))
        result = counts.double()
        result[:, 2] = counts[:, 2].view(torch.float64)
    return result


def why_not(device: torch.device) -> str | None:
    """Find out whether the kernels work on a device, by compiling one and running it.

    Not to be asked while a graph is being captured.

    Returns:
        None, or in words why they do not: Triton is not installed, finds no compiler, and so on.

    Sync: reads the results.
    """
    try:
        grads = [torch.full((3,), 3.0, dtype=dtype, device=device) for dtype in BLOCKS]
        half = torch.full((), 0.5, dtype=torch.float32, device=device)
        found_inf = torch.zeros((), dtype=torch.float32, device=device)
        sum_squares = torch.zeros((), dtype=torch.float64, device=device)
        unscale_(grads, half, found_inf, sum_squares)
        results = [*(x for g in grads for x in g.tolist()), found_inf.item(), sum_squares.item()]
    except Exception as error:  # noqa: BLE001 - whatever a compiler or driver raises means the same
        return f"Triton does not work there, {type(error).__name__}: {error}"
    if results != [1.5] * 12 + [0.0, 12 * 1.5**2]:
        return f"Triton's results are wrong there: {results}."
    return None


def _judge(
    grads: Sequence[Tensor],
    inv_scale: Tensor,
    found_inf: Tensor,
    sum_squares: Tensor | None,
    write: bool,
) -> None:
    device = found_inf.device
    _refuse_elsewhere(device, inv_scale=inv_scale, sum_squares=sum_squares)
    with _current(device):
        table = find_table(grads, device)
        if not table.parts:
            useful = (inv_scale > 0) & (inv_scale < math.inf)
            found_inf.copy_(torch.where(useful, found_inf, 1.0))
            return
        partials = None
        if sum_squares is not None:
            num_programs = sum(part.num_programs for part in table.parts)
            partials = torch.empty(num_programs, dtype=torch.float64, device=device)
        begin = 0
        for part in table.parts:
            mine = None if partials is None else partials[begin:]
            begin += part.num_programs
            _start(
                "unscale_kernel",
                table,
                part,
                (inv_scale, found_inf, mine),
                WRITE=write,
                SQUARES=mine is not None,
                LANES=_num_lanes(device),
            )
        if partials is not None:
            _source().sum_kernel[(1,)](
                partials, partials.numel(), sum_squares, BLOCK=_SUM_BLOCK, **_OPTIONS
            )


def _refuse_elsewhere(device: torch.device, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != device:
            raise ConfigError(
                f"{name} is on {tensor.device}, but found_inf on {device}. Move it there."
            )


def _start(
    kernel: str, table: Table, part: Part, tensors: tuple[Tensor | None, ...], **constants: Any
) -> None:
    """Launch a kernel over all gradients of one dtype, on the current stream."""
    from triton import knobs
    from triton import language as tl

    getattr(_source(), kernel)[(part.num_programs,)](
        table.addresses,
        part.segments,
        part.programs,
        *tensors,
        DTYPE=getattr(tl, str(part.dtype).removeprefix("torch.")),
        BLOCK=BLOCKS[part.dtype],
        BY_HAND=knobs.runtime.interpret,
        **constants,
        **_OPTIONS,
    )


def _source() -> ModuleType:
    from shardscale.kernels.triton import source  # imports Triton, which not everybody has

    return source


def _num_lanes(device: torch.device) -> int:
    warp = torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32
    return _NUM_WARPS * warp


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return nullcontext()
