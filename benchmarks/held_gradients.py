"""One set of gradients in memory, kept at the same level while all ways work on it in turns."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from gradient_sets import GradientSet
from torch import Tensor

from shardscale.kernels import check_, unscale_

__all__ = ["FACTOR", "HeldGradients", "takes_operator"]

# Gradients that are multiplied by it thousands of times stay what they are, but it is not exactly
# 1, for which a kernel may leave out the work.
FACTOR = 1 - 2.0**-20
ALIGN_BYTES = 512  # what torch's allocator for CUDA aligns to
BLOCK = 2**20
CLIP_TO = 0.98  # of the norm, so that active clipping always is


class HeldGradients:
    """Gradients of numbers between 0.5 and 1.5, far from what float16 overflows or loses.

    Args:
        gradients: Their sizes.
        dtype: Of all of them.
        device: Of all of them.
    """

    def __init__(
        self, gradients: GradientSet, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.dtype, self.device = dtype, torch.device(device)
        step = ALIGN_BYTES // dtype.itemsize
        begins, end = [], 0
        for shape in gradients.shapes:
            begins.append(end + gradients.shift)
            end += -(-(gradients.shift + math.prod(shape)) // step) * step
        # One buffer, in which each gradient lies as an allocation of its own would.
        self.flat = torch.empty(end, dtype=dtype, device=self.device)
        generator = torch.Generator().manual_seed(5)
        block = (torch.rand(BLOCK, generator=generator) + 0.5).to(self.device, dtype)
        for piece in self.flat.split(BLOCK):
            piece.copy_(block[: piece.numel()])
        self.grads = [
            self.flat[begin : begin + math.prod(shape)].view(shape)
            for begin, shape in zip(begins, gradients.shapes, strict=True)
        ]
        self.nbytes = gradients.numel * dtype.itemsize
        self._first_norm = self._norm = self.norm()

    def parameters(self) -> list[Tensor]:
        """New parameters of whatever numbers, with these very gradients."""
        params: list[Tensor] = []
        for g in self.grads:
            p = torch.nn.Parameter(torch.empty_like(g))
            p.grad = g
            params.append(p)
        return params

    def norm(self) -> float:
        """The L2 norm of all gradients."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        found_inf = torch.zeros((), device=self.device)
        check_(self.grads, torch.ones((), device=self.device), found_inf, total)
        return math.sqrt(total.item())

    def max_norm(self) -> float:
        """A norm that is surely smaller than theirs, by little; they are to be clipped to it."""
        self._norm *= CLIP_TO
        return self._norm

    def restore(self) -> None:
        """Multiply them back to where they began, if clipping has brought them down by half."""
        if self._norm < self._first_norm / 2:
            torch._foreach_mul_(self.grads, self._first_norm / self._norm)
            self._norm = self._first_norm

    def differs_from_torch(self) -> str:
        """What differs between ours and torch's in one ``unscale_``; empty if nothing does."""
        twin = self.flat.clone()
        twins = [twin.as_strided(g.shape, g.stride(), g.storage_offset()) for g in self.grads]
        factor = torch.tensor(1 / 3, device=self.device)
        found_inf, by_torch = (torch.zeros((), device=self.device) for _ in range(2))
        if takes_operator(self.dtype, self.device):
            torch._amp_foreach_non_finite_check_and_unscale_(twins, by_torch, factor)
        else:  # by its definition: float32 inside, rounded once
            for piece in pieces(twins):
                piece.copy_(piece.float().mul_(factor))
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        unscale_(self.grads, factor, found_inf, total)
        bits = {2: torch.int16, 4: torch.int32}[self.dtype.itemsize]
        found = []
        if not torch.equal(self.flat.view(bits), twin.view(bits)):
            found.append("bits of the gradients")
        squares = sum(piece.double().square().sum().item() for piece in pieces(twins))
        # float32 errs by 2^-24 at each addition, and no partial sum in it has more than hundreds.
        if not math.isclose(total.item(), squares, rel_tol=1e-5):
            found.append(f"sum of squares ({total.item():.9g}, should be {squares:.9g})")
        if found_inf.item() != by_torch.item() or not self._last_element_is_judged(factor):
            found.append("flag")
        torch._foreach_mul_(self.grads, 3.0)
        return ", ".join(found)

    def _last_element_is_judged(self, factor: Tensor) -> bool:
        last = self.grads[-1].view(-1)[-1]
        kept = last.clone()
        flags = []
        for kernel in (check_, unscale_):
            last.fill_(math.inf)
            found_inf = torch.zeros((), device=self.device)
            kernel(self.grads, factor, found_inf)
            flags.append(found_inf.item())
        torch._foreach_mul_(self.grads, 3.0)
        last.copy_(kept)
        return flags == [1.0, 1.0]


def pieces(tensors: list[Tensor]) -> Iterator[Tensor]:
    """All elements as short views, so that a wider copy of one is small."""
    for t in tensors:
        yield from t.view(-1).split(BLOCK)


def takes_operator(dtype: torch.dtype, device: torch.device | str) -> bool:
    """Whether torch's operator behind ``unscale_`` takes such gradients: on CUDA not bfloat16."""
    one = torch.ones((), device=device)
    grads = [torch.ones(1, dtype=dtype, device=device)]
    try:
        torch._amp_foreach_non_finite_check_and_unscale_(grads, torch.zeros_like(one), one)
    except RuntimeError:
        return False
    return True
