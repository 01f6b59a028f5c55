"""The kernels in Triton, for CUDA and ROCm: one launch for all gradients of a dtype on a device.

The caller hands over the gradients of one device that :func:`takes` accepts, and asks
:func:`is_usable` once for each device; torch's operators do the rest. Importing this package does
not import Triton.
"""

from shardscale.kernels.triton.launch import check_, count, is_usable, scale_, unscale_
from shardscale.kernels.triton.table import takes

__all__ = ["check_", "count", "is_usable", "scale_", "takes", "unscale_"]
