"""Triton's interpreter runs the kernels on the host and finds all that they promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels import cases

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(1800 if cases.FULL else 240)
def test_the_kernels_keep_their_promises_in_the_interpreter():
    """The report of the other process stands in this one's: it names each case that failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "tests/kernels/grid.py"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0, "cases failed; the report above names them"
    [num] = re.findall(r"^kernels: (\d+) checks$", done.stdout, re.MULTILINE)
    cases.checked(int(num))
