"""What a saved value can be, and how one is read that may be anything."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from shardscale.errors import ConfigError

__all__ = [
    "COUNT",
    "CURE",
    "INTEGER",
    "LARGE_COUNT",
    "NAME",
    "NUMBER",
    "PAIRS",
    "SCALE",
    "Kind",
    "as_plain",
    "read",
    "shown",
    "whole",
]

CURE = "Pass what a scaler's own state_dict() gave, with nothing in it changed."
_LONGEST_QUOTE = 200


class Kind(NamedTuple):
    """What a saved value can be: in words, and as a test of plain Python values."""

    words: str
    fits: Callable[[Any], bool]
    cure: str = CURE


def whole(low: int, high: int) -> Kind:
    """The integers from ``low`` to ``high``, no bool."""
    return Kind(f"an integer from {low} to {high}", lambda n: _is_int(n) and low <= n <= high)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    # Any int can be compared with a float, but not any can be made one.
    return (_is_int(value) or isinstance(value, float)) and abs(value) <= sys.float_info.max


def _are_pairs(value: Any) -> bool:
    """Whether ``dict`` makes a dictionary of it whose keys are strings."""
    if isinstance(value, Mapping):
        return all(isinstance(name, str) for name in value)
    return isinstance(value, tuple | list) and all(
        isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str)
        for pair in value
    )


SCALE = Kind(
    "a finite and positive number",
    lambda x: _is_finite(x) and x > 0,
    f"{CURE} Torch's scaler may have come down to 0; then set it to where the job shall go on.",
)
NUMBER = Kind("a finite number", _is_finite)
INTEGER = Kind("an integer of 64 bits", lambda n: _is_int(n) and -(2**63) <= n < 2**63)
COUNT = whole(0, 2**31 - 1)  # of the state's int32 tensors
LARGE_COUNT = whole(0, 2**53)  # of Python's; a file format that has only floats holds all of these
NAME = Kind("a name", lambda text: isinstance(text, str))
PAIRS = Kind("pairs of names and values", _are_pairs)


def read(saved: Mapping[str, Any], kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """Those of the values that are there, each as plain Python and of its kind.

    Raises:
        ConfigError: one is of another; says which, and what it is.

    Sync: reads tensors.
    """
    values = {name: as_plain(saved[name]) for name in kinds if name in saved}
    for name, value in values.items():
        if not kinds[name].fits(value):
            raise ConfigError(
                f"the state dict's {name} is {shown(value)}, but must be {kinds[name].words}. "
                f"{kinds[name].cure}"
            )
    return values


def as_plain(value: Any) -> Any:
    """A number as Python has it, where it is NumPy's or a tensor of one element; else as it is.

    Sync: reads a tensor.
    """
    # Of NumPy's kinds also spans of time count as integers.
    if isinstance(value, np.ndarray | np.generic) and value.size == 1 and value.dtype.kind in "iuf":
        return float(value.item()) if value.dtype.kind == "f" else value.item()
    # No subclass: to read a DTensor may take other ranks, and a load waits for nobody.
    if type(value) is Tensor:
        try:
            return value.item()
        except RuntimeError:  # it has several elements, or is on the meta device
            return value
    return value


def shown(value: object) -> str:
    """A value as an error can quote it, however long it is and whatever its ``repr`` does."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # noqa: BLE001 - an int may have more digits than Python writes, say
        return f"a {type(value).__name__} that cannot be written down"
    return text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]}..."
