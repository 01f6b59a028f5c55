"""A pytest plugin that tests the shardscale in the folder named by COPY, or nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import shardscale


def pytest_sessionstart(session: pytest.Session) -> None:
    copy = Path(os.environ["COPY"]).resolve()
    tested = Path(shardscale.__file__).resolve()
    # The checkout is installed in .venv, too, and would pass in place of a wheel that is broken.
    if copy not in tested.parents:
        pytest.exit(f"{tested} would be tested, which does not lie in {copy}", returncode=5)
