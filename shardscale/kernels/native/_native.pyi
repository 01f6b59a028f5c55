from collections.abc import Callable, Iterable

from torch import Tensor
from torch.distributed.tensor import DTensor

def unscale_(
    grads: Iterable[Tensor],
    inv_scale: Tensor,
    found_inf: Tensor,
    sum_squares: Tensor | None,
    num_threads: int | Callable[[], int],
    /,
) -> bool:
    """Multiply each gradient in place and judge it, as ``kernels.reference.unscale_`` does.

    Args:
        grads: Gradients on the host, no two of which overlap.
        inv_scale: () float32, on the host like all that follow.
        found_inf: () float32; becomes 1.0 if anything is not finite, is left alone otherwise.
        sum_squares: () float64; the sum of the squared products, rounded as stored, is added. Its
            bits depend on the sizes and the values alone.
        num_threads: At most so many work at once, the caller among them; a function is asked for
            the number only where there is enough to do.

    Returns:
        Whether it is done; if not, nothing has been touched.
    """

def check_(
    grads: Iterable[Tensor],
    inv_scale: Tensor,
    found_inf: Tensor,
    sum_squares: Tensor | None,
    num_threads: int | Callable[[], int],
    /,
) -> bool:
    """Judge as :func:`unscale_` does and sum the squares of unrounded products; write no gradient.

    Products are float32 for the dtypes of 16 and 32 bit, float64 for float64.
    """

def scale_(
    grads: Iterable[Tensor], factor: Tensor, num_threads: int | Callable[[], int], /
) -> bool:
    """Multiply each gradient by ``factor``, () float32; exactly 1 returns before any is read."""

def count(
    grads: Iterable[Tensor], num_threads: int | Callable[[], int], /
) -> list[tuple[int, int, float]] | None:
    """Of each gradient the number of Inf, that of NaN, and the largest magnitude.

    The magnitude is Inf if there is an Inf, and NaN if there is a NaN.
    """

def gather(params: Iterable[Tensor], /) -> tuple[list[Tensor], list[Tensor], list[DTensor]] | None:
    """The parameters that have a gradient, and the local part of each gradient.

    The third list has of all parameters the first one on each mesh that requires a gradient.

    Returns:
        None if anything is unusual: a type, dtype or device that is not known, a gradient that is
        not contiguous or has no memory, a distributed one with another ``_spec`` than its
        parameter, or two that overlap. No memory is looked at, so it is right for a GPU too.
    """

def survey(grads: Iterable[Tensor], /) -> tuple[bytes, bytes, bytes] | None:
    """Of each gradient the address and the number of elements, int64, and a byte for its dtype.

    Returns:
        None unless all are dense, of one device, and float16 (0), bfloat16 (1), float32 (2) or
        float64 (3).
    """

def init(tensor_type: type, parameter_type: type, dtensor_type: type, capsule: object, /) -> None:
    """Learn the types, and from torch's capsule how to read a tensor; until then none is read.

    Raises:
        ValueError: The capsule offers no table of DLPack 1.
    """

def instruction_set() -> str:
    """The instruction set in use."""

def instruction_sets() -> list[str]:
    """Those that this processor has, the fastest first; the first is used."""

def use_instruction_set(name: str, /) -> None:
    """Use another one from now on, in the whole process.

    Raises:
        ValueError: This processor does not have it.
    """
