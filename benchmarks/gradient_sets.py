"""The sets of gradients that kernels are measured on: only their sizes, no tensor yet."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from typing import NamedTuple

__all__ = ["SETS", "SWEEP_BYTES", "GradientSet", "single"]

KIB, MIB = 2**10, 2**20
# Single gradients for the plot: 4 KiB, 16 KiB, ... 1 GiB.
SWEEP_BYTES = [4 * KIB * 4**i for i in range(10)]


class GradientSet(NamedTuple):
    """Gradients that are unscaled together."""

    name: str
    shapes: list[tuple[int, ...]]
    shift: int = 0
    """How many elements after an aligned address each of them begins."""

    @property
    def numel(self) -> int:
        return sum(map(math.prod, self.shapes))


def llama(max_numel: int) -> GradientSet:
    """One rank's shards of Llama-3-8B as FSDP2 cuts them: 8 ways, or more where memory is short.

    Source: the configuration of Meta-Llama-3-8B: 32 layers, hidden size 4096, feed-forward size
        14336, 8 heads of 128 for keys and values, 128256 tokens; embedding and output not tied.
    """
    hidden, inner, keys, tokens = 4096, 14336, 1024, 128256
    layer = [
        *[(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)],  # attention
        *[(inner, hidden), (inner, hidden), (hidden, inner)],  # feed-forward
        *[(hidden,), (hidden,)],  # the two norms
    ]
    whole = [(tokens, hidden), *layer * 32, (hidden,), (tokens, hidden)]
    for num_ways in itertools.takewhile(lambda n: n <= hidden, (8 * 2**i for i in range(10))):
        shards = [(math.ceil(shape[0] / num_ways), *shape[1:]) for shape in whole]
        cut = GradientSet(f"Llama-3-8B cut {num_ways} ways", shards)
        if cut.numel <= max_numel:
            break
    return cut


def many_small(max_numel: int) -> GradientSet:
    """3,000 gradients of 4 Ki elements."""
    numel = min(4 * KIB, max_numel // 3000)
    return GradientSet(f"3000 gradients of {numel} elements", [(numel,)] * 3000)


def uneven(max_numel: int) -> GradientSet:
    """Sizes of 1 to 10^8 elements, even on a logarithmic scale; about 10^9 elements in all."""
    room = min(10**9, max_numel)
    largest = min(10**8, room // 4)
    generator = random.Random(8)
    numels: list[int] = [1, largest]
    while True:
        numel = round(largest ** generator.random())
        if sum(numels) + numel > room:
            break
        numels.append(numel)
    return GradientSet("uneven sizes, 1 to 1e8 elements", [(numel,) for numel in numels])


def odd(max_numel: int) -> GradientSet:
    """No size is a multiple of 4 and no address one of 16: whole vectors fit nowhere by luck."""
    room = min(2**29, max_numel)
    numel = min(4 * MIB, room // 8) + 1
    numel += (1 - numel) % 4
    num = max(1, room // (numel + 4))
    return GradientSet("odd sizes, one element off alignment", [(numel,)] * num, shift=1)


def huge(max_numel: int) -> GradientSet:
    """One gradient of 2^29 elements."""
    return GradientSet("one huge gradient", [(min(2**29, max_numel),)])


def single(nbytes: int, itemsize: int) -> GradientSet:
    """One gradient of so many bytes."""
    return GradientSet(f"one gradient of {nbytes // KIB} KiB", [(nbytes // itemsize,)])


# Word for the command line -> the set, with no more elements than its argument says where it can.
# The most telling ones come first.
SETS: dict[str, Callable[[int], GradientSet]] = {
    "llama": llama,
    "many_small": many_small,
    "odd": odd,
    "uneven": uneven,
    "huge": huge,
}
