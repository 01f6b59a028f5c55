"""Jobs that are started wrongly on a real Slurm say so in one sentence, and none of them hangs."""

from __future__ import annotations

import time
from pathlib import Path

from tests.cluster import matrix
from tests.cluster.mpi import python_with
from tests.cluster.slurm import Slurm

LIMIT_S = 5
TRAIN = ("python", "launch/train.py")


def refusal(slurm: Slurm, what: str, *command: str, code: int = 2, **variables: str) -> str:
    """What a command says that fails in time."""
    with matrix.row(what, command[0], "one sentence", LIMIT_S) as row:
        started = time.monotonic()
        done = slurm.run(*command, **variables)
        row.ended(time.monotonic() - started, done.returncode)
        assert done.returncode == code, done.stderr
    return done.stderr


def test_ranks_that_are_spread_unevenly(slurm: Slurm):
    said = refusal(slurm, "-N4 -n8 without tasks per node", "srun", "-N4", "-n8", *TRAIN)
    sentence = (
        "SLURM_STEP_TASKS_PER_NODE is '4,2,1(x2)', so the nodes have different numbers of tasks: "
        "pass --ntasks-per-node to sbatch or srun"
    )
    assert said.count(sentence) == 8, said


def test_a_batch_script_that_forgot_srun(slurm: Slurm, tmp_path: Path):
    words = ["--nodes=2", "--ntasks-per-node=2", f"--wrap={' '.join(TRAIN)}"]
    with matrix.row("no srun in the batch script", "sbatch", "one sentence", LIMIT_S) as row:
        started = time.monotonic()
        job = slurm.submit(tmp_path / "out", *words)
        state, code = job.ended(limit_s=30)
        row.ended(time.monotonic() - started, code)
        assert (state, code) == ("FAILED", 2)
    assert "srun did not start this process (SLURM_STEP_ID is not set)" in job.output


def test_mpi_ranks_that_do_not_find_each_other(slurm: Slurm):
    """Each would be a world of its own, and step alone."""
    path = f"{python_with('mpich').parent}:{slurm.environment['PATH']}"
    words = ["-N2", "--ntasks-per-node=1", "--mpi=none", "python", "-m", "mpi4py"]
    train = [TRAIN[1], "--comm", "mpi"]
    said = refusal(slurm, "--mpi=none with MPICH", "srun", *words, *train, PATH=path)
    assert "so these are 2 worlds of 1: start with srun --mpi=pmi2." in said


def test_more_nodes_than_there_are(slurm: Slurm):
    """Slurm is asked first whether the job could ever run."""
    command = ("python", "launch/slurm.py", "srun", "--nodes", "9", "--submit")
    said = refusal(slurm, "more nodes than there are", *command, code=1)
    assert said.startswith("Slurm refuses the job: ")
    assert slurm.run("squeue", "--noheader").stdout == ""
