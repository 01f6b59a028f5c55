"""The kernels in Triton, for CUDA and ROCm: one launch for all gradients of a dtype on a device.

The caller hands over dense gradients of one device, and asks :func:`why_not` once for each device;
torch's operators do the rest. Importing this package does not import Triton.
"""

from shardscale.kernels.triton.launch import check_, count, scale_, unscale_, why_not

__all__ = ["check_", "count", "scale_", "unscale_", "why_not"]
