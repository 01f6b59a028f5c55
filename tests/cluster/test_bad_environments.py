"""A process that cannot know its place says so in one sentence and ends at once; it never waits."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.cluster import matrix

LIMIT_S = 5.0  # with the import
START = "shardscale.init_distributed('gloo')"
BY_HAND = {
    "RANK": "0",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29400",
}
TORCHRUN = {**BY_HAND, "TORCHELASTIC_RUN_ID": "one"}
BATCH = {
    "SLURM_JOB_ID": "12",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS": "4",
    "SLURM_TASKS_PER_NODE": "2(x2)",
}
SRUN = {
    **BATCH,
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
}


class Wrong(NamedTuple):
    """An environment that cannot be meant, and what its sentence must contain."""

    environ: dict[str, str]
    variable: str
    value: str
    cure: str
    program: str = START


WRONG = {
    "a rank that is no number": Wrong(
        {**TORCHRUN, "RANK": "two"}, "RANK", "'two'", "let the launcher set it"
    ),
    "a rank that is too large": Wrong(
        {**TORCHRUN, "RANK": "4"}, "RANK", "4", "let the launcher set it"
    ),
    "a rank and no more": Wrong({"RANK": "0"}, "RANK", "0", "unset RANK"),
    "one rank for all tasks of srun": Wrong(
        {**SRUN, **BY_HAND}, "SLURM_PROCID", "2", "unset RANK and WORLD_SIZE"
    ),
    "a batch script without srun": Wrong(BATCH, "SLURM_NTASKS", "4", "start it with srun"),
    "-N4 -n8 without tasks per node": Wrong(
        {
            **SRUN,
            "SLURM_NNODES": "4",
            "SLURM_NTASKS": "8",
            "SLURM_STEP_NUM_NODES": "4",
            "SLURM_STEP_NODELIST": "n[1-4]",
            "SLURM_STEP_TASKS_PER_NODE": "4,2,1(x2)",
        },
        "SLURM_STEP_TASKS_PER_NODE",
        "'4,2,1(x2)'",
        "pass --ntasks-per-node",
    ),
    "several hosts and a loopback master": Wrong(
        {**BY_HAND, "LOCAL_WORLD_SIZE": "2"}, "MASTER_ADDR", "'127.0.0.1'", "set it to the address"
    ),
    "a port that is in use": Wrong(BY_HAND, "MASTER_PORT", "in use", "set MASTER_PORT"),
    "a signal that does not exist": Wrong(
        {}, "signal to stop", "'USR9'", "must be one of", "shardscale.StopSignal('USR9')"
    ),
}


class Outcome(NamedTuple):
    """What one process came to."""

    code: int
    seconds: float  # by the clock, less those for which it had no core
    last_line: str


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Two processes at a time; a runner has two cores."""
    folder = tmp_path_factory.mktemp("wrong")
    with socket.create_server(("127.0.0.1", 0)) as taken, ThreadPoolExecutor(2) as pool:
        in_use = WRONG["a port that is in use"].environ
        in_use["MASTER_PORT"] = str(taken.getsockname()[1])
        ran = pool.map(run, WRONG.values(), (folder / str(i) for i in range(len(WRONG))))
        return dict(zip(WRONG, ran, strict=True))


def run(wrong: Wrong, output: Path) -> Outcome:
    launchers = ("RANK", "WORLD_", "LOCAL_", "MASTER_", "TORCHELASTIC_", "SLURM_", "OMPI_", "PM")
    own = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    started = time.monotonic()
    with (
        output.open("w") as errors,
        subprocess.Popen(
            [sys.executable, "-c", f"import shardscale; {wrong.program}"],
            cwd=Path(__file__).parents[2],
            env={**own, **wrong.environ},
            stderr=errors,
        ) as process,
    ):
        has_ended = os.WEXITED | os.WNOWAIT | os.WNOHANG
        while not os.waitid(os.P_PID, process.pid, has_ended):
            if time.monotonic() > started + 60.0:
                process.kill()
            time.sleep(0.01)
        took_s = time.monotonic() - started - in_queue_s(process.pid)
    return Outcome(process.returncode, took_s, output.read_text().splitlines()[-1])


def in_queue_s(pid: int) -> float:
    """How long a process has waited for a core, on a machine that has other work, too."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_environment_is_told_with_its_cure(outcomes: dict[str, Outcome], name: str):
    wrong, outcome = WRONG[name], outcomes[name]
    expected = f"ConfigError names {wrong.variable}"
    with matrix.row(f"wrong environment: {name}", "none", expected, LIMIT_S) as row:
        assert outcome.code == 1
        assert outcome.last_line.startswith("shardscale.errors.ConfigError: ")
        for part in (wrong.variable, wrong.value, wrong.cure):
            assert part in outcome.last_line
        row.ended(outcome.seconds, outcome.code)
