"""Warnings that point at the line of the caller's that they are about."""

from __future__ import annotations

import sys
import warnings

__all__ = ["warn_caller"]

# torch's wrapper around a method that is not traced stands between the two.
_INSIDE = ("shardscale", "torch")


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn of the innermost line that is neither the library's nor torch's."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _INSIDE:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
