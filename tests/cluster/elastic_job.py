"""A job for torchrun that saves as it goes on, and begins with the newest whole checkpoint.

    torchrun ... -m tests.cluster.elastic_job FOLDER LAST_STEP [RANK_TO_DIE:IN_STEP]

A rank that is to die does so once, between backward and verdict, by SIGKILL.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch.distributed as dist

from launch import checkpoints
from shardscale import init_distributed
from tests.cluster.logs import RankLog
from tests.ranks.resumable import Job

EVERY = 4


def train(folder: Path, last: int, dying: str = "") -> None:
    """One rank's part, in the default group; its starts go to a file beside its log."""
    job = Job()
    log = RankLog(folder, job.rank)
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    first = checkpoints.load_newest(folder / "saved", job.model, job.optimizer, job.scaler)
    with (folder / f"starts{job.rank}").open("a") as starts:
        starts.write(f"restart {restarts}, {job.size} ranks, from step {first}\n")
    for step in range(first, last):
        job.backward(step)
        if restarts == "0" and dying == f"{job.rank}:{step}":
            os.kill(os.getpid(), signal.SIGKILL)
        state, digest = job.judge_and_step()
        skipped = job.scaler.last_report().skipped
        log.write(step, skipped=skipped, scale=state["scale"], digest=digest)
        if (step + 1) % EVERY == 0:
            checkpoints.save(folder / "saved", step + 1, job.model, job.optimizer, job.scaler)


if __name__ == "__main__":
    init_distributed()
    train(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
    dist.destroy_process_group()
