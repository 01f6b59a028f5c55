"""What can go wrong, as one tree of exceptions.

::

    ShardScaleError
    ├── ConfigError         (ValueError, AssertionError)    a setting is out of range
    ├── StageError          (RuntimeError)                  calls in the wrong order
    ├── StateError          (AssertionError, RuntimeError)  a state that cannot be kept
    ├── LayoutError         (ValueError)                    a gradient that cannot be judged
    ├── DisagreementError   (RuntimeError)                  the ranks are not making the same call
    └── MissingRankError    (TimeoutError)                  ranks that others wait for did not come

Where torch raises a built-in exception for the same mistake, ours is of that type too and starts
with torch's text, so ``except`` clauses and matches written for torch keep working.
"""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "DisagreementError",
    "LayoutError",
    "MissingRankError",
    "ShardScaleError",
    "StageError",
    "StateError",
]


class ShardScaleError(Exception):
    """Base of every error that shardscale raises on purpose."""


class ConfigError(ShardScaleError, ValueError, AssertionError):
    """An argument or an environment variable has a value outside its allowed range."""


class StageError(ShardScaleError, RuntimeError):
    """A method was called at a point of the training step where it cannot be."""


class StateError(ShardScaleError, AssertionError, RuntimeError):
    """The scaler's state cannot be saved, loaded or updated as asked."""


class LayoutError(ShardScaleError, ValueError):
    """A gradient's layout, dtype or ownership is not one that can be judged."""


class DisagreementError(ShardScaleError, RuntimeError):
    """The ranks met in one all-reduce, but not for the same call or not in the same state."""


class MissingRankError(ShardScaleError, TimeoutError):
    """A verdict or a start did not complete, because at least one rank did not come to it."""
