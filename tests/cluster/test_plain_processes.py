"""Processes over Gloo, without a launcher: what a rank that fails does to the others.

All jobs of this file are started together, because most of their time is waiting.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.cluster import matrix
from tests.cluster.crew import Crew, Ended, Job
from tests.cluster.faults import Address, struck
from tests.cluster.job import End, end_of
from tests.cluster.logs import compare, read

SIZE = 3
NUM_STEPS = 10
MODELS = ("sgd", "adamw", "fsdp2")
SKIPPED = Address("nan", 0, 2)  # in every job, so that there is something to decide
HIT, STEP = 1, 5
TIMEOUT_S = 3.0
GRACE_S = TIMEOUT_S  # that those who waited give each other to say that they came
IN_TIME_S = TIMEOUT_S + GRACE_S + 2.0  # two seconds for 70 processes on two cores

# Kind -> what was done, and how many steps the hit rank and the others have finished.
ENDING = {
    "kill-before": ("kill -9 before the verdict", 5, 5),
    "kill-during": ("kill -9 during the verdict", 5, 5),
    "kill-after": ("kill -9 after the verdict", 5, 6),
    "stop": ("SIGSTOP", 5, 5),
    "raise": ("exception on one rank", 5, 5),
}
HARMLESS = {"nan": ("NaN on one rank", "all skip"), "slow": ("one rank is late", "equal logs")}


@pytest.fixture(scope="module")
def jobs(crew: Crew, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Job]:
    """By kind of fault and by model."""
    folder = tmp_path_factory.mktemp("jobs")

    def start(model: str, *faults: Address, timeout_s: float = TIMEOUT_S) -> Job:
        planted = [word for fault in (SKIPPED, *faults) for word in ("--fault", str(fault))]
        options = ("--model", model, "--steps", str(NUM_STEPS), "--timeout", str(timeout_s))
        name = "-".join([model, *(fault.kind for fault in faults), str(len(started))])
        return crew.start(folder / name, SIZE, *options, *planted)

    started: dict[tuple[str, str], Job] = {}
    for model in MODELS:
        started["none", model] = start(model)
        for kind in (*HARMLESS, *ENDING):
            started[kind, model] = start(model, Address(kind, HIT, STEP))
    started["host", "sgd"] = start("sgd", Address("kill-before", 0, STEP))
    # The last to start and the first to be looked at: it has to be continued in time.
    started["continued", "sgd"] = start("sgd", Address("stop", HIT, STEP), timeout_s=8.0)
    return started


def logs_of(job: Job) -> list[bytes]:
    return [(job.folder / f"rank{rank}.jsonl").read_bytes() for rank in range(SIZE)]


def test_continued_in_time_a_stopped_rank_changes_nothing(crew: Crew, jobs):
    """It is stopped for more than half of what the others wait."""
    job = jobs["continued", "sgd"]
    fault = Address("stop", HIT, STEP)
    with matrix.row("SIGSTOP, SIGCONT in time", "processes", "equal logs", 15.0) as row:
        while (stopped := struck(job.folder, fault)) is None or not is_stopped(stopped.pid):
            time.sleep(0.01)
        time.sleep(max(0.0, stopped.at_s + 4.5 - time.monotonic()))  # how long the fault lasts
        assert [len(read(job.folder, rank)[0]) for rank in range(SIZE)] == [STEP] * SIZE
        os.kill(stopped.pid, signal.SIGCONT)
        ended = crew.ended(job.pids, limit_s=20.0)
        assert [each.code for each in ended] == [0] * SIZE
        assert logs_of(job) == logs_of(jobs["none", "sgd"])
        row.ended(max(each.at_s for each in ended) - stopped.at_s, 0)


def is_stopped(pid: int) -> bool:
    return "State:\tT" in Path(f"/proc/{pid}/status").read_text()


@pytest.mark.parametrize("kind", ENDING)
def test_the_others_raise_in_time_and_share_one_history(crew: Crew, jobs, kind: str):
    what, num_by_hit, num_by_others = ENDING[kind]
    others = [rank for rank in range(SIZE) if rank != HIT]
    with matrix.row(what, "processes", "MissingRankError names it", IN_TIME_S) as row:
        took_s = []
        for model in MODELS:
            job = jobs[kind, model]
            ended = crew.ended([job.pids[rank] for rank in others], limit_s=30.0)
            assert [each.code for each in ended] == [1, 1], model
            fault = struck(job.folder, Address(kind, HIT, STEP))
            took_s += [each.at_s - fault.at_s for each in ended]
            if kind == "stop":
                assert is_stopped(fault.pid)
                os.kill(fault.pid, signal.SIGKILL)
            (end,) = crew.ended([job.pids[HIT]], limit_s=10.0)
            assert end.code == (1 if kind == "raise" else -signal.SIGKILL)

            killed = [] if kind == "raise" else [HIT]
            is_replicated = model != "fsdp2"
            assert compare(job.folder, SIZE, killed=killed, replicated=is_replicated) == [], model
            lengths = [len(read(job.folder, rank)[0]) for rank in (HIT, *others)]
            assert lengths == [num_by_hit, num_by_others, num_by_others], model
            named = [named_by(end_of(job.folder, rank), model) for rank in others]
            assert any(named) and all(each in ({HIT}, None) for each in named)
        row.ended(max(took_s), 1)


def named_by(end: End | None, model: str) -> set[int] | None:
    assert end is not None
    if model == "fsdp2" and end.error == "RuntimeError":
        assert "Connection" in end.message  # by the transport, in a collective of the model
        return {HIT}
    return end.missing()


def test_if_the_store_dies_with_its_host_the_others_say_so(crew: Crew, jobs):
    job = jobs["host", "sgd"]
    with matrix.row(
        "kill -9 of the store's host", "processes", "MissingRankError says so", IN_TIME_S
    ) as row:
        ended = crew.ended(job.pids[1:], limit_s=30.0)
        assert [each.code for each in ended] == [1, 1]
        assert compare(job.folder, SIZE, killed=[0]) == []
        for rank in (1, 2):
            assert end_of(job.folder, rank).missing() is None
        fault = struck(job.folder, Address("kill-before", 0, STEP))
        row.ended(max(each.at_s for each in ended) - fault.at_s, 1)


@pytest.mark.parametrize("kind", HARMLESS)
def test_all_ranks_go_on_alike(crew: Crew, jobs, kind: str):
    what, expected = HARMLESS[kind]
    skipped = [SKIPPED.step, STEP] if kind == "nan" else [SKIPPED.step]
    with matrix.row(what, "processes", expected, limit_s=15.0) as row:
        took_s = []
        for model in MODELS:
            job = jobs[kind, model]
            ended = crew.ended(job.pids, limit_s=30.0)
            assert_one_whole_history(job, ended, model, skipped)
            fault = struck(job.folder, Address(kind, HIT, STEP))
            took_s += [each.at_s - fault.at_s for each in ended]
        row.ended(max(took_s), 0)


@pytest.mark.parametrize("model", MODELS)
def test_without_a_fault_the_entries_are_those_that_the_policy_makes(crew: Crew, jobs, model: str):
    job = jobs["none", model]
    assert_one_whole_history(job, crew.ended(job.pids, limit_s=30.0), model, [SKIPPED.step])


def assert_one_whole_history(job: Job, ended: list[Ended], model: str, skipped: list[int]) -> None:
    assert [each.code for each in ended] == [0] * SIZE
    assert compare(job.folder, SIZE, replicated=model != "fsdp2") == []
    for rank in range(SIZE):
        entries, _ = read(job.folder, rank)
        assert [entry.step for entry in entries if entry.skipped] == skipped
        assert [float.fromhex(entry.scale) for entry in entries] == scales_by_hand(skipped)


def scales_by_hand(skipped: list[int]) -> list[float]:
    """The scale after each step: halved by a bad one, doubled by every third good one in a row."""
    scale, num_good, scales = 1024.0, 0, []
    for step in range(NUM_STEPS):
        num_good = 0 if step in skipped else num_good + 1
        scale *= 0.5 if step in skipped else 2.0 if num_good == 3 else 1.0
        num_good %= 3
        scales.append(scale)
    return scales
