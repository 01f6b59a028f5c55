"""Two jobs under torchrun on one host at once: one loses a rank, the other does not notice."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.cluster import matrix
from tests.cluster.faults import Address, struck
from tests.cluster.job import alone, end_of
from tests.cluster.logs import compare, read
from tests.cluster.torchrun import Launch, await_

SIZE = 2
OPTIONS = ("--steps", "10", "--fault", "nan:0:2")
HELD = [Address("hold", rank, 4) for rank in range(SIZE)]  # until the other job is stopped
KILL = Address("kill-before", 1, 5)
STOP = Address("stop", 1, 7)


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Launch, Launch]]:
    """One whose rank is killed, and one whose rank is stopped as long as the first one lasts."""
    folder = tmp_path_factory.mktemp("one-host")
    with ExitStack() as stack:

        def start(name: str, timeout_s: float, *faults: Address) -> Launch:
            planted = [word for fault in faults for word in ("--fault", str(fault))]
            options = [*OPTIONS, "--timeout", str(timeout_s), *planted]
            return stack.enter_context(Launch(folder / name, *options, num_local=SIZE))

        yield start("killed", 3.0, *HELD, KILL), start("unharmed", 60.0, STOP)


def test_two_jobs_on_one_host_share_nothing(launches: tuple[Launch, Launch], tmp_path: Path):
    killed, unharmed = (launch.folder / "run0" for launch in launches)
    with (
        matrix.row("two jobs, kill -9 in one", "torchrun", "the other goes on", 60.0) as both,
        matrix.row("kill -9 before the verdict", "torchrun", "all end", 10.0) as first,
        matrix.row("SIGSTOP, SIGCONT in time", "torchrun", "equal logs", 60.0) as second,
    ):
        stopped = await_(lambda: struck(unharmed, STOP), launches[1])
        held = await_(lambda: struck(killed, HELD[0]), launches[0])
        assert_nothing_shared(stopped.pid, held.pid)
        (killed / "go").touch()
        fault = await_(lambda: struck(killed, KILL), launches[0])
        assert launches[0].exit_code(0, limit_s=30.0) == 1, launches[0].printed()
        assert launches[0].left(within_s=5.0) == {}
        # torchrun may have ended the other rank before it could say anything.
        assert compare(killed, SIZE, killed=range(SIZE)) == []
        assert len(read(killed, 0)[0]) == KILL.step
        end = end_of(killed, 0)
        assert end is None or end.missing() == {1}
        first.ended(launches[0].ended_at_s[0] - fault.at_s, 1)

        os.kill(stopped.pid, signal.SIGCONT)
        assert launches[1].exit_code(0, limit_s=30.0) == 0, launches[1].printed()
        assert launches[1].left(within_s=5.0) == {}
        assert compare(unharmed, SIZE) == []
        assert read(unharmed, 0)[0] == alone(tmp_path, *OPTIONS)
        took_s = launches[1].ended_at_s[0] - stopped.at_s
        second.ended(took_s, 0)
        both.ended(took_s, 0)


def assert_nothing_shared(pid: int, other: int) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "MASTER_PORT"):
        assert variable(pid, name) != variable(other, name)


def variable(pid: int, name: str) -> str:
    """As the process was started with."""
    environment = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(line.split("=", 1) for line in environment if line)[name]
