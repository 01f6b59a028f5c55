"""What the kernels in C must give, bit for bit, by numpy and torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from tests.unit.test_kernels import INTEGER, assert_same

UNIT_BYTES = 2**18
NUM_LANES = 32
GUARD = 96  # elements on each side that nobody may touch


def sum_of_squares(products: Sequence[Tensor], itemsizes: Sequence[int]) -> float:
    """Element i of a unit is squared into lane i mod 32 in float64; lanes and units go in order.

    Units are cut by the size of a gradient's element, which a product's may exceed.
    """
    total = np.float64(0)
    for product, itemsize in zip(products, itemsizes, strict=True):
        values = product.reshape(-1).double().numpy()
        with np.errstate(over="ignore"):
            squares = values * values
        room = UNIT_BYTES // itemsize
        for start in range(0, len(squares), room):
            unit = squares[start : start + room]
            rows = -(-len(unit) // NUM_LANES)
            padded = np.zeros(rows * NUM_LANES)
            padded[: len(unit)] = unit
            with np.errstate(invalid="ignore", over="ignore"):
                lanes = np.add.accumulate(padded.reshape(rows, NUM_LANES), axis=0)[-1]
                while len(lanes) > 1:
                    lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
                total += lanes[0]
    return float(total)


def product_of(grad: Tensor, factor: Tensor) -> Tensor:
    """What is squared if nothing is written: not rounded to 16 bit."""
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    return grad.to(wide) * factor.to(wide)


def random_bits(dtype: torch.dtype, numel: int, seed: int = 0) -> Tensor:
    """Any bit pattern is as likely as any other: all kinds of NaN, denormals, both Inf."""
    rng = torch.Generator().manual_seed(seed)
    words = torch.randint(0, 256, (numel * dtype.itemsize,), generator=rng, dtype=torch.uint8)
    return words.view(dtype)


def usual_values(dtype: torch.dtype, numel: int, seed: int = 0) -> Tensor:
    """Values of several magnitudes, all finite."""
    rng = torch.Generator().manual_seed(seed)
    values = torch.randn(numel, generator=rng, dtype=torch.float64)
    return (values * 10.0 ** torch.randint(-6, 4, (numel,), generator=rng)).to(dtype)


class Guarded:
    """Values in the middle of memory whose other elements are NaN of one bit pattern."""

    def __init__(self, values: Tensor, offset: int = 0) -> None:
        numel = values.numel()
        self.whole = torch.full((numel + offset + 2 * GUARD,), -1, dtype=INTEGER[values.itemsize])
        self.place = slice(GUARD + offset, GUARD + offset + numel)
        self.inside = self.whole.view(values.dtype)[self.place]
        self.inside.copy_(values.view(-1))

    def assert_holds(self, values: Tensor) -> None:
        assert_same(self.inside, values.view(-1))
        outside = torch.ones(len(self.whole), dtype=torch.bool)
        outside[self.place] = False
        assert (self.whole[outside] == -1).all(), "memory beside the tensor was touched"


def any_two_overlap(pieces: Sequence[tuple[int, int]]) -> bool:
    """By looking at each pair of (start, length)."""
    return any(a < b + m and b < a + n for (a, n), (b, m) in combinations(pieces, 2) if n and m)
