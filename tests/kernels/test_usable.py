"""Where the kernels cannot work they say why, and nobody pays for Triton who does not use it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from shardscale.kernels import triton as kernels
from shardscale.kernels.triton import launch

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def test_importing_the_package_does_not_import_triton():
    code = "import sys, shardscale.kernels.triton; sys.exit('triton' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment).returncode == 0


def test_a_missing_triton_is_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "triton" in kernels.why_not(CPU)


def test_a_device_that_triton_does_not_know_is_a_reason():
    """The host, unless Triton is told to interpret."""
    assert kernels.why_not(CPU) is not None


def test_wrong_results_are_a_reason(monkeypatch):
    monkeypatch.setattr(launch, "unscale_", lambda *args: None)
    assert kernels.why_not(CPU) == (
        "Triton's results are wrong there: "
        "[3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 0.0, 0.0]."
    )
