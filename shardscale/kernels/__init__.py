"""Measure and multiply local gradient shards; nothing here knows of ranks.

Two backends share one signature: ``foreach`` (the default, on every device) and ``reference`` (one
tensor at a time, obvious, the oracle of every kernel test).
"""

from shardscale.kernels.foreach import check_, scale_, unscale_
from shardscale.kernels.inverse import inverse_scale

__all__ = ["check_", "inverse_scale", "NAME", "scale_", "unscale_"]

NAME = "foreach"
