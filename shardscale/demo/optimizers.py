"""The optimizers the demo can train with, by the name of `--optimizer`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

__all__ = ["OPTIMIZERS"]

# The fused kernels decide for themselves whether to step, from the flag that
# the scaler hands them. SGD's and Adagrad's do not know FSDP2's parameters.
OPTIMIZERS: dict[str, Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, lr=3e-3, fused=True),
    "adamw-foreach": partial(torch.optim.AdamW, lr=3e-3, foreach=True),
    "adamw-loop": partial(torch.optim.AdamW, lr=3e-3, foreach=False),
    "adam": partial(torch.optim.Adam, lr=3e-3, fused=True),
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, foreach=True),
    "adagrad": partial(torch.optim.Adagrad, lr=2e-2, foreach=True),
}
