"""torchrun on two hosts that only a cable joins: a rank killed or stopped, the cable pulled.

The hosts are network namespaces. All jobs start together: most of their time is waiting.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.cluster import matrix, netns
from tests.cluster.faults import Address, struck
from tests.cluster.job import End, alone, end_of
from tests.cluster.logs import compare, read
from tests.cluster.torchrun import Launch, await_

LAUNCHER = "torchrun, 2 hosts"
TIMEOUT_S = 3.0
OPTIONS = ("--steps", "13", "--fault", "nan:0:2")
HOLD = Address("hold", 0, 5)
STOP = Address("stop", 1, 5)
# One job is started three times. A rank is killed in the sixth verdict of the first start, and
# the sixth of the second is late: whoever reads there what was written for the other gives up.
KILL = Address("kill-during", 3, 5)
LATE = Address("slow", 1, KILL.step + 5, start=1)
STOP_AGAIN = Address("stop", 1, LATE.step + 1, start=1)


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Launch]]:
    if reason := netns.why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("two-hosts")
    with ExitStack() as stack:

        def start(name: str, num_local: int, fault: Address, *more: str, restarts=0) -> Launch:
            hosts = stack.enter_context(netns.cable())
            options = [*OPTIONS, "--timeout", str(TIMEOUT_S), "--fault", str(fault), *more]
            launch = Launch(
                folder / name, *options, num_local=num_local, hosts=hosts, max_restarts=restarts
            )
            return stack.enter_context(launch)

        resume = ["--checkpoints", str(folder / "checkpoints")]
        resume += ["--fault", str(LATE), "--fault", str(STOP_AGAIN)]
        # In the order of the tests: the first has to look after its job in time.
        yield {
            "pull": start("pull", 2, HOLD),
            "stop": start("stop", 1, STOP),
            "restart": start("restart", 2, KILL, *resume, restarts=2),
        }


def ends(job: Launch, run: Path, *ranks: int) -> list[End]:
    """How ranks of one host ended, at one start of the job; torchrun may have ended all but one
    of them before they could say."""

    def found() -> list[End]:
        return [end for rank in ranks if (end := end_of(run, rank))]

    await_(lambda: found() or None, job)
    return found()


def test_if_the_cable_is_pulled_both_sides_raise(launches: dict[str, Launch]):
    """All ranks are in one verdict when the link goes down, but the one that held it up."""
    job = launches["pull"]
    run = job.folder / "run0"
    with matrix.row("link down", LAUNCHER, "MissingRankError on both sides", 20.0) as row:
        await_(lambda: struck(run, HOLD), job)
        job.hosts[1].pull_the_cable()
        pulled_at_s = time.monotonic()
        (run / "go").touch()
        here, there = ends(job, run, 0, 1), ends(job, run, 2, 3)
        assert [end.missing() for end in here] == [{2, 3}] * len(here)
        assert all(end.missing() in ({0, 1}, None) for end in there), there
        assert compare(run, 4) == []
        row.ended(max(end.at_s for end in here + there) - pulled_at_s, 1)
        assert job.exit_code(0, limit_s=15.0) == 1, job.printed()
        job.agents[1].kill()  # it looks for a store that it cannot reach, for longer than we wait
        assert job.left(within_s=10.0) == {}


def test_if_a_rank_is_stopped_the_other_host_raises_and_names_it(launches: dict[str, Launch]):
    job = launches["stop"]
    run = job.folder / "run0"
    with matrix.row("SIGSTOP", LAUNCHER, "MissingRankError names it", 10.0) as row:
        fault = await_(lambda: struck(run, STOP), job)
        (end,) = ends(job, run, 0)
        assert end.missing() == {1}
        assert compare(run, 2, killed=[1]) == []
        # Its agent sends SIGTERM, which a stopped process does not see, and SIGKILL 30 s later.
        with suppress(ProcessLookupError):
            os.kill(fault.pid, signal.SIGCONT)
        assert job.exit_codes(limit_s=20.0) == [1, 1], job.printed()
        assert job.left(within_s=5.0) == {}
        row.ended(end.at_s - fault.at_s, 1)


def test_after_elastic_restarts_the_job_goes_on_where_it_was(
    launches: dict[str, Launch], tmp_path: Path
):
    """torchrun counts restarts on each host by itself: here 0 on one and 1 on the other."""
    job = launches["restart"]
    first, second, third = (job.folder / f"run{number}" for number in range(3))
    with (
        matrix.row("kill -9, elastic restart", LAUNCHER, "resumes, equal logs", 60.0) as killing,
        matrix.row(
            "SIGSTOP after a restart", LAUNCHER, "MissingRankError names it", 10.0
        ) as stopping,
    ):
        killed = await_(lambda: struck(first, KILL), job)
        stopped = await_(lambda: struck(second, STOP_AGAIN), job, limit_s=90.0)
        # torchrun may have ended the others before they could say anything.
        assert compare(first, 4, killed=range(4)) == []
        assert struck(second, LATE) is not None

        found = ends(job, second, 0) + ends(job, second, 2, 3)
        os.kill(stopped.pid, signal.SIGCONT)  # for its agent not to wait for 30 s
        assert [end.missing() for end in found] == [{1}] * len(found)
        assert compare(second, 4, killed=[1]) == []
        stopping.ended(max(end.at_s for end in found) - stopped.at_s, 1)

        assert job.exit_codes(limit_s=90.0) == [0, 0], job.printed()
        assert job.left(within_s=5.0) == {}
        assert compare(third, 4) == []
        entries = [entry for run in (first, second, third) for entry in read(run, 0)[0]]
        assert entries == alone(tmp_path, *OPTIONS)
        killing.ended(stopped.at_s - killed.at_s, 0)
