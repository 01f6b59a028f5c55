"""How the scale moves from one iteration to the next: frozen values with a pure ``next_state``."""

from shardscale.policy.base import LARGEST_SCALE, SMALLEST_SCALE, ScalePolicy
from shardscale.policy.constant import ConstantScale
from shardscale.policy.dynamic import DynamicScale

__all__ = ["ConstantScale", "DynamicScale", "LARGEST_SCALE", "ScalePolicy", "SMALLEST_SCALE"]
