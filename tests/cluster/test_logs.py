"""The checker of the ranks' logs sees what must not be, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.cluster.logs import Entry, RankLog, compare, digest, read

KILLED = 1


def history(num_steps: int, first: int = 0) -> list[Entry]:
    """Good and bad steps, as three ranks would write them that agree."""
    return [
        Entry(step, step % 3 == 1, (1024.0 / 2**step).hex(), f"{step:016x}")
        for step in range(first, first + num_steps)
    ]


def write(folder: Path, *logs: list[Entry]) -> Path:
    for rank, entries in enumerate(logs):
        log = RankLog(folder, rank)
        for entry in entries:
            scale = float.fromhex(entry.scale)
            log.write(entry.step, skipped=entry.skipped, scale=scale, digest=entry.digest)
    return folder


def append(folder: Path, rank: int, text: str) -> None:
    with (folder / f"rank{rank}.jsonl").open("a") as file:
        file.write(text)


def test_a_log_reads_as_it_was_written(tmp_path: Path):
    entries = history(4, first=7)
    assert read(write(tmp_path, entries), 0) == (entries, [])


@pytest.mark.parametrize("first", [0, 12])
def test_equal_logs_are_one_history(tmp_path: Path, first: int):
    """One that begins later is that of a job resumed."""
    assert compare(write(tmp_path, *[history(5, first)] * 3), 3) == []


def test_the_verdict_under_way_may_be_missing(tmp_path: Path):
    assert compare(write(tmp_path, history(5), history(4), history(5)), 3) == []


def test_more_than_the_verdict_under_way_may_not(tmp_path: Path):
    (complaint,) = compare(write(tmp_path, history(5), history(3), history(5)), 3, killed=[KILLED])
    assert "{0: 5, 1: 3, 2: 5}" in complaint


@pytest.mark.parametrize(
    "change", [{"skipped": True}, {"scale": (0.5).hex()}, {"digest": "f" * 16}], ids=str
)
@pytest.mark.parametrize("step", [0, 2, 4])
def test_a_different_entry_is_named_with_its_step_and_ranks(tmp_path: Path, step: int, change):
    """Also in the last step, and by a rank that was killed."""
    history_there = history(5)
    history_there[step] = history_there[step]._replace(**{"skipped": False, **change})
    history_here = history(5)
    history_here[step] = history_here[step]._replace(skipped=False)
    write(tmp_path, history_here, history_there, history_here)
    (complaint,) = compare(tmp_path, 3, killed=[KILLED])
    assert complaint.startswith(f"step {step}: ")
    assert "ranks [0, 2]" in complaint
    assert "ranks [1]" in complaint


def test_shards_differ_but_not_their_verdicts(tmp_path: Path):
    here = [entry._replace(digest="a" * 16) for entry in history(3)]
    there = [entry._replace(digest="b" * 16) for entry in history(3)]
    write(tmp_path, here, there)
    assert compare(tmp_path, 2, replicated=False) == []
    assert len(compare(tmp_path, 2)) == 3


@pytest.mark.parametrize("steps", [[0, 1, 3], [0, 1, 1], [0, 2, 1], [1, 2, 3]], ids=str)
def test_a_step_left_out_twice_or_out_of_order_is_a_gap(tmp_path: Path, steps: list[int]):
    there = [history(4)[step] for step in steps]
    (complaint,) = compare(write(tmp_path, history(3), there), 2)
    assert complaint.startswith("rank 1: the steps are not 0 and so on")


def test_half_a_line_is_forgiven_to_who_was_killed(tmp_path: Path):
    write(tmp_path, *[history(3)] * 3)
    append(tmp_path, KILLED, '{"step": 3, "skip')
    assert compare(tmp_path, 3, killed=[KILLED]) == []
    (complaint,) = compare(tmp_path, 3, killed=[0])
    assert complaint.startswith("rank 1: line 4 is broken")


@pytest.mark.parametrize(
    "line",
    [
        "",
        "nonsense",
        "[]",
        '{"step": 3, "skip',
        json.dumps({"step": 3, "skipped": False, "scale": (1.0).hex()}),
        json.dumps({**history(1)[0]._asdict(), "more": 1}),
        json.dumps({**history(1)[0]._asdict(), "step": "3"}),
        json.dumps({**history(1)[0]._asdict(), "skipped": 0}),
        json.dumps({**history(1)[0]._asdict(), "scale": 1.0}),
        json.dumps({**history(1)[0]._asdict(), "scale": "big"}),
    ],
)
def test_any_other_broken_line_is_forgiven_to_nobody(tmp_path: Path, line: str):
    write(tmp_path, *[history(3)] * 3)
    append(tmp_path, KILLED, line + "\n")
    (complaint,) = compare(tmp_path, 3, killed=[KILLED])
    assert complaint.startswith("rank 1: line 4 is broken")


def test_a_missing_log_is_that_of_a_rank_killed_before_its_first_step(tmp_path: Path):
    write(tmp_path, *[history(1)] * 2)
    (complaint,) = compare(tmp_path, 3)
    assert complaint.startswith("rank 2 left no log")
    assert compare(tmp_path, 3, killed=[2]) == []
    write(tmp_path, *[history(1, first=1)] * 2)
    (complaint,) = compare(tmp_path, 3, killed=[2])
    assert "more than the verdict under way" in complaint


def test_a_log_of_nobody_is_seen(tmp_path: Path):
    """Two ranks that take each other's number would otherwise hide that one is missing."""
    write(tmp_path, *[history(2)] * 3)
    assert compare(tmp_path, 2) == ["rank2.jsonl is of no rank of this job"]


def test_where_nobody_has_finished_a_step_nothing_was_shown(tmp_path: Path):
    (complaint,) = compare(write(tmp_path, [], []), 2)
    assert "nothing was compared" in complaint


def test_a_digest_tells_any_bit_of_any_dtype():
    params = [torch.ones(3), torch.zeros((), dtype=torch.bfloat16), torch.empty(0)]
    before = digest(params)
    assert digest(params) == before
    params[1].neg_()  # equal as a number
    assert digest(params) != before
