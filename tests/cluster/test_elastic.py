"""torchrun starts the workers again, as many or fewer, and their history is that of one job."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.cluster.elastic_job import train
from tests.cluster.logs import read
from tests.cluster.processes import end_all, new_mark

ROOT = Path(__file__).resolve().parents[2]


def torchrun(folder: Path, num_workers: int, last: int, *words: str) -> None:
    """Run the job to its end; nothing is left of it."""
    mark = new_mark()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=1"]
    command += [f"--nproc-per-node={num_workers}", "-m", "tests.cluster.elastic_job"]
    try:
        done = subprocess.run(
            [*command, str(folder), str(last), *words],
            cwd=ROOT,
            env={**os.environ, **mark, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=100,
            check=False,
        )
    finally:
        end_all(mark)
    assert done.returncode == 0, done.stdout


def train_unbroken(rank: int, size: int, folder: str) -> None:
    train(Path(folder), 16)


def test_killed_and_restarted_workers_write_the_history_of_an_unbroken_job(ranks, tmp_path):
    """A worker is killed in step 6, the newest checkpoint is of step 4; then a job of one rank
    goes on from step 12."""
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    unbroken.mkdir()
    broken.mkdir()
    ranks.run(train_unbroken, 3, folder=str(unbroken))

    torchrun(broken, 3, 13, "1:6")
    for rank in range(3):
        expected, _ = read(unbroken, rank)
        entries, complaints = read(broken, rank)
        assert complaints == []
        assert (broken / f"starts{rank}").read_text() == (
            "restart 0, 3 ranks, from step 0\nrestart 1, 3 ranks, from step 4\n"
        )
        assert entries == expected[:6] + expected[4:13]

    torchrun(broken, 1, 16)
    expected, _ = read(unbroken, 0)
    entries = read(broken, 0)[0][15:]
    starts = (broken / "starts0").read_text().splitlines()
    assert starts[2:] == ["restart 0, 1 ranks, from step 12"]
    # Its gradients are not those of three ranks, so only what the scaler decides is the same.
    assert [e[:3] for e in entries] == [e[:3] for e in expected[12:]]
