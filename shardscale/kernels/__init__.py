"""Measure and multiply local gradient shards; nothing here knows of ranks.

Backends share one signature: ``native`` (C, on the host), ``triton`` (CUDA and ROCm), ``foreach``
(torch's own operators, for everything else) and ``reference`` (one tensor at a time, obvious, the
oracle of every kernel test). ``dispatch`` chooses.
"""

from shardscale.kernels import operators as _operators  # noqa: F401 - compiled code finds them
from shardscale.kernels.dispatch import backend_name, check_, count, is_dense, scale_, unscale_
from shardscale.kernels.inverse import inverse_scale
from shardscale.kernels.native import Gathered, gather

__all__ = [
    "backend_name",
    "check_",
    "count",
    "gather",
    "Gathered",
    "inverse_scale",
    "is_dense",
    "scale_",
    "unscale_",
]
