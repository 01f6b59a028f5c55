"""A loss scaler for sharded training: one small all-reduce, the same verdict on every rank."""

from shardscale.bring_up import init_distributed
from shardscale.comm import Communicator, RankEnv
from shardscale.errors import (
    ConfigError,
    DisagreementError,
    LayoutError,
    MissingRankError,
    ShardScaleError,
    StageError,
    StateError,
)
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
    "Verdict",
]

__version__ = "0.1.0"
