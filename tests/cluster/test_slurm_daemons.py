"""The private Slurm of the tests is alone, and cleans up after a run that could not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.processes import left
from tests.cluster.slurm_daemons import FOLDER, SlurmBusyError, started, until, why_not

ROOT = Path(__file__).resolve().parents[2]
NAME = "killed"  # of the cluster, whose nodes are killed1, ...
OTHER_RUN = f"""
from tests.cluster.slurm_daemons import started
with started("{NAME}", 2, networks=True):
    print("up", flush=True)
    input()
"""


@pytest.fixture
def other_run() -> Iterator[subprocess.Popen[str]]:
    """Another test run, whose Slurm is up."""
    if reason := why_not():
        pytest.skip(reason)
    with subprocess.Popen(
        [sys.executable, "-c", OTHER_RUN],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        yield process
        process.communicate("\n", timeout=20)


def links() -> str:
    return subprocess.run(["ip", "link"], capture_output=True, text=True, check=True).stdout


def test_a_second_start_is_refused(other_run: subprocess.Popen[str]):
    with (
        pytest.raises(
            SlurmBusyError, match=f"another test run has its Slurm in {FOLDER}/{NAME} up"
        ),
        started(NAME, 1),
    ):
        pass
    assert (FOLDER / NAME / "slurm.conf").exists(), "the other one's folder is gone"


def test_what_a_killed_run_has_left_is_ended_by_the_next(other_run: subprocess.Popen[str]):
    name, value = (FOLDER / NAME / "mark").read_text().split("=")
    other_run.kill()
    other_run.wait()
    until(lambda: len(left({name: value})) >= 4, "munged, slurmctld and two slurmd", 10)
    assert f"{NAME}-bridge" in links()
    with started(NAME, 1) as daemons:
        assert left({name: value}) == {}
        until(lambda: len(left(daemons.mark)) >= 3, "munged, slurmctld and slurmd", 10)
    assert left(daemons.mark) == {}
    assert not (FOLDER / NAME).exists()
    assert NAME not in links()
    assert f"{NAME}1" not in Path("/etc/hosts").read_text()


def test_a_slurm_that_is_somebodys_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda program: f"/usr/bin/{program}")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm/of-this-cluster.conf")
    assert why_not() == "this machine has a Slurm already, which is left alone"


def test_what_is_missing_is_named_with_its_packages(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda program: None if program == "slurmd" else program)
    assert why_not() == (
        "no slurmd here (Debian: apt-get install slurmctld slurmd slurm-client munge libpmix-dev "
        "iproute2)"
    )
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert why_not() == "only root can start a Slurm"
