"""Faults under real mpirun: what ends, what goes on, and that the ranks wrote one history."""

from __future__ import annotations

import functools
import os
import signal
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.cluster import matrix
from tests.cluster.faults import Address, Struck, struck
from tests.cluster.job import end_of
from tests.cluster.logs import compare, read
from tests.cluster.mpi import KINDS, Ended, MPIJob

SIZE, HIT, STEP = 3, 1, 5
SKIPPED = Address("nan", 0, 2)  # so that there is something to decide
TIMEOUT_S = 2.0
GRACE_S = 2.0  # that those who waited give each other to say that they came
LIMIT_S = 60.0
NAMES = {"mpich": "mpirun (MPICH)", "openmpi": "mpirun (Open MPI)"}


def start(kind: str, folder: Path, *faults: Address, timeout_s: float = TIMEOUT_S) -> MPIJob:
    planted = [word for fault in (SKIPPED, *faults) for word in ("--fault", str(fault))]
    options = ("--folder", folder, "--timeout", str(timeout_s))
    return MPIJob(kind, SIZE, "-m", "tests.cluster.mpi_job", *options, *planted)


def assert_all_over(ended: Ended, folder: Path) -> None:
    """mpirun says so, no process is left, and whoever was ended has written one history."""
    assert ended.code != 0, ended.output
    assert ended.left == {}
    assert compare(folder, SIZE, killed=range(SIZE)) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", ["before", "during"])
def test_mpirun_ends_all_ranks_when_one_is_killed(kind: str, when: str, tmp_path: Path):
    fault = Address(f"kill-{when}", HIT, STEP)
    with matrix.row(f"kill -9 {when} the verdict", NAMES[kind], "mpirun ends all", 5.0) as row:
        ended = start(kind, tmp_path, fault).ended(LIMIT_S)
        assert_all_over(ended, tmp_path)
        num_by_hit, *others = (len(read(tmp_path, rank)[0]) for rank in (HIT, 0, 2))
        assert num_by_hit == STEP
        # In that verdict it may have told the others all that they needed.
        assert all(STEP <= num <= STEP + (when == "during") for num in others)
        row.ended(ended.at_s - struck(tmp_path, fault).at_s, ended.code)


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_that_wait_for_a_stopped_one_name_it_and_all_end(kind: str, tmp_path: Path):
    fault = Address("stop", HIT, STEP)
    limit_s = TIMEOUT_S + GRACE_S + 2.0  # two seconds for three processes on two cores
    with matrix.row("SIGSTOP", NAMES[kind], "MissingRankError names it", limit_s) as row:
        ended = start(kind, tmp_path, fault).ended(LIMIT_S)
        assert_all_over(ended, tmp_path)
        stopped = struck(tmp_path, fault)
        ends = [end_of(tmp_path, rank) for rank in (0, 2)]
        for end in ends:
            assert end.error == "MissingRankError"
            named = f"rank {HIT} ({os.uname().nodename}), last heard of at step {STEP - 1}"
            assert f"Did not come: {named}." in end.message
        assert ended.at_s - stopped.at_s <= limit_s + 5.0
        row.ended(max(end.at_s for end in ends) - stopped.at_s, ended.code)


class Continued(NamedTuple):
    """A job that was stopped for a while, went on, and ended in an exception."""

    folder: Path
    stopped: Struck
    raised: Struck
    ended: Ended


STOPPED, RAISED = Address("stop", HIT, STEP), Address("raise", 2, STEP + 4)


@pytest.fixture(scope="module")
def continued(tmp_path_factory: pytest.TempPathFactory):
    """By kind of MPI, such a job."""

    @functools.cache
    def run(kind: str) -> Continued:
        folder = tmp_path_factory.mktemp(kind)
        job = start(kind, folder, STOPPED, RAISED, timeout_s=8.0)
        deadline = time.monotonic() + LIMIT_S
        while (stopped := struck(folder, STOPPED)) is None or not is_stopped(stopped.pid):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(max(0.0, stopped.at_s + 1.5 - time.monotonic()))  # how long the fault lasts
        assert [len(read(folder, rank)[0]) for rank in range(SIZE)] == [STEP] * SIZE
        os.kill(stopped.pid, signal.SIGCONT)
        ended = job.ended(LIMIT_S)
        raised = struck(folder, RAISED)
        assert raised is not None, ended.output
        return Continued(folder, stopped, raised, ended)

    return run


def is_stopped(pid: int) -> bool:
    return "State:\tT" in Path(f"/proc/{pid}/status").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_continued_in_time_a_stopped_rank_changes_nothing(kind: str, continued):
    with (
        matrix.row("NaN on one rank", NAMES[kind], "all skip", 5.0) as skipping,
        matrix.row("SIGSTOP, SIGCONT in time", NAMES[kind], "equal logs", 8.0) as row,
    ):
        job = continued(kind)
        assert compare(job.folder, SIZE, killed=range(SIZE)) == []
        histories = [read(job.folder, rank)[0] for rank in range(SIZE)]
        assert [len(history) for history in histories] == [RAISED.step] * SIZE
        assert [entry.step for entry in histories[0] if entry.skipped] == [SKIPPED.step]
        skipping.ended(job.stopped.at_s - struck(job.folder, SKIPPED).at_s, None)
        row.ended(job.raised.at_s - job.stopped.at_s, None)


@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_on_one_rank_ends_all(kind: str, continued):
    """Under ``python -m mpi4py``; without it the others would wait for ever."""
    with matrix.row("exception on one rank", NAMES[kind], "mpirun ends all", 5.0) as row:
        job = continued(kind)
        assert_all_over(job.ended, job.folder)
        assert end_of(job.folder, RAISED.rank).error == "ValueError"
        assert f"planted: {RAISED}" in job.ended.output
        row.ended(job.ended.at_s - job.raised.at_s, job.ended.code)
