"""The kernels' promises in Triton's interpreter; ``test_interpreter.py`` runs them.

    python -m pytest tests/kernels/grid.py

In a process of their own, because Triton must be told before it is imported.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest

from tests.kernels.cases import *  # noqa: F403 - pytest finds tests by the names of a module

os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def device() -> Iterator[str]:
    # The interpreter computes with numpy, which warns where a GPU says Inf or NaN.
    with np.errstate(all="ignore"):
        yield "cpu"
