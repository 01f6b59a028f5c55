"""``launch/mpirun.sh`` starts ranks with the MPI that is there, or says in one sentence why not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.mpi import KINDS, environment, python_with

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "launch" / "mpirun.sh"
PROGRAM = """
import os, sys
from mpi4py import MPI
rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
cores = len(os.sched_getaffinity(0))
line = f"rank {rank} of {size}, {cores} cores, MARK {os.environ.get('MARK')}: "
os.write(1, (line + " ".join(sys.argv[1:]) + chr(10)).encode())  # as one piece
MPI.COMM_WORLD.Barrier()
if rank == 1 and "fail" in sys.argv:
    raise ValueError("planted")
MPI.COMM_WORLD.Barrier()
"""


@pytest.fixture
def program(tmp_path: Path) -> str:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return str(path)


def launch(path: list[Path], *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the script with these folders as PATH, before those of the system."""
    search = os.pathsep.join([*map(str, path), "/usr/bin", "/bin"])
    return subprocess.run(
        ["bash", SCRIPT, *words],
        cwd=REPOSITORY,
        env={**os.environ, **environment(), **environ, "PATH": search},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("kind", "flags"), [("mpich", "-genv MARK yes"), ("openmpi", "-x MARK=yes")]
)
def test_ranks_have_their_arguments_all_cores_and_what_mpirun_is_told(
    kind: str, flags: str, program: str
):
    """As root and on fewer cores, which Open MPI wants to be told."""
    words = ("-n", "3", "--oversubscribe", "--as-root", program, "-n", "two words")
    done = launch([python_with(kind).parent], *words, MPIRUN_FLAGS=flags)
    assert done.returncode == 0, done.stdout + done.stderr
    cores = len(os.sched_getaffinity(0))
    assert sorted(done.stdout.splitlines()) == [
        f"rank {rank} of 3, {cores} cores, MARK yes: -n two words" for rank in range(3)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_that_raises_ends_all(kind: str, program: str):
    done = launch([python_with(kind).parent], "-n", "2", "--as-root", program, "fail")
    assert done.returncode == 1
    assert "ValueError: planted" in done.stderr


def fake(folder: Path, name: str, body: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return folder


def test_an_mpirun_of_another_mpi_is_refused_and_both_are_named(program: str, tmp_path: Path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "mpirun").symlink_to(python_with("mpich").parent / "mpirun")
    done = launch([tmp_path / "bin", python_with("openmpi").parent], "-n", "2", program)
    assert done.returncode == 2
    (sentence,) = done.stderr.splitlines()
    assert f"{tmp_path}/bin/mpirun is of MPICH 5.0.2" in sentence
    assert "uses Open MPI 5.0.11" in sentence


@pytest.mark.parametrize(
    ("mpirun", "library"),
    [
        ("mpirun (Open MPI) 4.1.6", "Open MPI v5.0.11, package: Open MPI distribution"),
        (
            "Intel(R) MPI Library for Linux* OS, Version 2021.11 Build 20231005",
            "MPICH Version: 4.3",
        ),
        ("Some other launcher 3.2", "MPICH Version: 3.2"),
    ],
)
def test_another_version_is_another_mpi(mpirun: str, library: str, program: str, tmp_path: Path):
    bins = fake(tmp_path / "bin", "mpirun", f"echo '{mpirun}'")
    fake(bins, "python", f"echo '{library}'")
    done = launch([bins], program)
    assert done.returncode == 2
    assert "is of" in done.stderr and done.stderr.count("\n") == 1


def test_intels_mpirun_is_taken_with_intels_library(program: str, tmp_path: Path):
    said = "Intel(R) MPI Library for Linux* OS, Version 2021.11 Build 20231005"
    bins = fake(tmp_path / "bin", "mpirun", f"[ $1 = --version ] && echo '{said}' || echo run $*")
    fake(bins, "python", "echo 'Intel(R) MPI Library 2021.11 for Linux* OS'")
    assert (
        launch([bins], "-n", "4", program, "-x").stdout
        == f"run -n 4 python -m mpi4py {program} -x\n"
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root is asked whether it is meant")
def test_open_mpi_as_root_wants_to_be_meant(program: str):
    done = launch([python_with("openmpi").parent], "-n", "1", program)
    assert done.returncode == 2
    assert "--as-root" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "no program is named"),
        (["-n", "0", "PROGRAM"], "-n is '0'"),
        (["-n"], "-n is ''"),
        (["--hostfile", "PROGRAM"], "--hostfile is unknown"),
        (["-n", "2", "missing.py"], "there is no program 'missing.py'"),
        (["-n", "2", "PROGRAM"], "there is no mpirun in PATH"),
    ],
)
def test_what_cannot_be_started_is_one_sentence(words, sentence: str, program: str, tmp_path: Path):
    words = [program if word == "PROGRAM" else word for word in words]
    done = subprocess.run(
        ["/bin/bash", SCRIPT, *words],
        cwd=REPOSITORY,
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("launch/mpirun.sh: ")
    assert sentence in done.stderr and done.stderr.count("\n") == 1


def test_without_mpi4py_it_says_which_python(program: str, tmp_path: Path):
    bins = fake(tmp_path / "bin", "mpirun", "echo HYDRA 5.0")
    fake(bins, "python", f'exec {sys.executable} -S "$@"')  # which has the standard library alone
    done = launch([bins], program)
    assert done.returncode == 2
    assert done.stderr == (
        f"launch/mpirun.sh: {bins}/python cannot load mpi4py (No module named 'mpi4py'): pip "
        "install mpi4py, beside the MPI of this mpirun.\n"
    )
