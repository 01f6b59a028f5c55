"""What is left of a job is found, wherever its launcher has put it."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.cluster.processes import end_all, left, new_mark


@pytest.fixture
def mark():
    mark = new_mark()
    yield mark
    end_all(mark)


def test_an_orphan_in_a_session_of_its_own_is_found_and_ended(mark: dict[str, str]):
    # The shell leaves it behind, as a launcher that dies leaves its workers.
    orphan = ["sh", "-c", "setsid sh -c 'echo there; exec sleep 300 >/dev/null' &"]
    with subprocess.Popen(orphan, env={**os.environ, **mark}, stdout=subprocess.PIPE) as shell:
        assert shell.stdout is not None
        assert shell.stdout.readline() == b"there\n"
    assert len(left(mark)) == 1
    end_all(mark)
    assert left(mark) == {}


def test_a_zombie_and_another_job_are_not(mark: dict[str, str]):
    with (
        subprocess.Popen(["true"], env={**os.environ, **mark}) as ended,
        subprocess.Popen(["sleep", "300"], env={**os.environ, **new_mark()}) as other,
    ):
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)  # over, and not reaped
        assert left(mark, within_s=1.0) == {}
        other.kill()
