"""A loss scaler for sharded training: one small all-reduce, the same verdict on every rank.

What needs torch is imported at its first use, so that a signal can be prepared for before that.
"""

import importlib
import typing

from shardscale.errors import (
    ConfigError,
    DisagreementError,
    LayoutError,
    MissingRankError,
    ShardScaleError,
    StageError,
    StateError,
)
from shardscale.preemption import StopSignal

if typing.TYPE_CHECKING:
    from shardscale.bring_up import init_distributed
    from shardscale.comm import Communicator, RankEnv
    from shardscale.gate import skip_on_device
    from shardscale.layouts import distinct
    from shardscale.policy import ConstantScale, DynamicScale, ScalePolicy
    from shardscale.records import Culprit, ScaleState, StepReport, Verdict
    from shardscale.scaler import ShardedGradScaler

__all__ = [
    "Communicator",
    "ConfigError",
    "ConstantScale",
    "Culprit",
    "DisagreementError",
    "distinct",
    "DynamicScale",
    "init_distributed",
    "LayoutError",
    "MissingRankError",
    "RankEnv",
    "ScalePolicy",
    "ScaleState",
    "ShardedGradScaler",
    "ShardScaleError",
    "skip_on_device",
    "StageError",
    "StateError",
    "StepReport",
    "StopSignal",
    "Verdict",
]

__version__ = "0.1.0"

_HOMES = {
    "Communicator": "comm",
    "ConstantScale": "policy",
    "Culprit": "records",
    "distinct": "layouts",
    "DynamicScale": "policy",
    "init_distributed": "bring_up",
    "RankEnv": "comm",
    "ScalePolicy": "policy",
    "ScaleState": "records",
    "ShardedGradScaler": "scaler",
    "skip_on_device": "gate",
    "StepReport": "records",
    "Verdict": "records",
}


if not typing.TYPE_CHECKING:  # to mypy every name would exist

    def __getattr__(name: str) -> object:
        """A public name from its module, or a module of the library; see PEP 562."""
        if name in _HOMES:
            value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
            globals()[name] = value  # found without this function from now on
            return value
        module = f"{__name__}.{name}"
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
