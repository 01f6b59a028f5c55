"""CI takes no skipped test for a passed one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]

PASSING = "def test_a(): pass"
SKIPPED = "import pytest\n\n@pytest.mark.skip\ndef test_a(): pass"
SKIPPED_FILE = "import pytest\n\npytest.importorskip('no_such_module')"
NOT_RUN = "import pytest\n\n@pytest.mark.xfail(run=False)\ndef test_a(): pass"
SKIPPED_GPU = "import pytest\n\n@pytest.mark.gpu\n@pytest.mark.skip\ndef test_a(): pass"
EXPECTED_FAILURE = "import pytest\n\n@pytest.mark.xfail\ndef test_a(): assert False"


def run(folder: Path, **files: str) -> subprocess.CompletedProcess[str]:
    """Run ``files`` as a suite of their own, with the plugin that CI uses."""
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    for name, source in files.items():
        (folder / f"test_{name}.py").write_text(source + "\n")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no_silent_skips", "-p", "no:cacheprovider"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT / ".ci"), "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
    )


def test_skips_fail_the_run_and_are_named(tmp_path: Path):
    done = run(tmp_path, good=PASSING, one=SKIPPED, file=SKIPPED_FILE, unrun=NOT_RUN)
    assert done.returncode == 1, done.stdout
    named = done.stdout.split("skipped, but should have run")[1].split("\n=")[0]
    assert set(named.split()[1:]) == {
        "test_file.py",
        "test_one.py::test_a",
        "test_unrun.py::test_a",
    }
    assert "1 passed, 2 skipped, 1 xfailed" in done.stdout


def test_an_expected_failure_has_run_and_a_gpu_test_needs_a_gpu(tmp_path: Path):
    done = run(tmp_path, good=PASSING, expected=EXPECTED_FAILURE, gpu=SKIPPED_GPU)
    assert done.returncode == (1 if torch.cuda.is_available() else 0), done.stdout
