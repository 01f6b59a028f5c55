"""The checker of the logs finds out a scaler that does not reduce, under the faults of the matrix.

It would be worth nothing if it passed whatever the ranks write.
"""

from __future__ import annotations

import os
import signal

import pytest

from tests.cluster.crew import Crew, Job
from tests.cluster.faults import Address, struck
from tests.cluster.logs import compare

SIZE = 3
OVERFLOW = Address("nan", 0, 2)
HIT, STEP = 1, 5
# The scaler, its optimizer, and the fault that comes after the overflow.
BROKEN = [
    ("deaf", "sgd", "kill-before"),
    ("deaf", "adamw", "kill-during"),
    ("deaf", "sgd", "kill-after"),
    ("deaf", "adamw", "stop"),
    ("deaf", "sgd", "raise"),
    ("deaf", "adamw", "nan"),
    ("torch", "adamw", "nan"),  # torch's own reduces nothing where the optimizer is fused
    ("torch", "adamw", "kill-after"),
]


@pytest.fixture(scope="module")
def jobs(crew: Crew, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], Job]:
    folder = tmp_path_factory.mktemp("broken")

    def start(scaler: str, model: str, kind: str) -> Job:
        faults = ["--fault", str(OVERFLOW), "--fault", str(Address(kind, HIT, STEP))]
        name = f"{scaler}-{model}-{kind}"
        return crew.start(folder / name, SIZE, "--scaler", scaler, "--model", model, *faults)

    return {case: start(*case) for case in BROKEN}


@pytest.mark.parametrize("case", BROKEN, ids="-".join)
def test_local_verdicts_do_not_pass_the_checker(crew: Crew, jobs, case: tuple[str, str, str]):
    job, kind = jobs[case], case[-1]
    ranks = [0, 2] if kind == "stop" else range(SIZE)
    crew.ended([job.pids[rank] for rank in ranks], limit_s=30.0)
    fault = struck(job.folder, Address(kind, HIT, STEP))
    assert fault is not None
    if kind == "stop":
        os.kill(fault.pid, signal.SIGKILL)
    killed = [] if kind in ("nan", "raise") else [HIT]
    differing = compare(job.folder, SIZE, killed=killed)
    # Rank 0 alone saw the overflow: it has skipped, and the others have stepped on.
    first = next(complaint for complaint in differing if complaint.startswith("step "))
    assert first.startswith("step 2: ranks [0]: skipped")
    assert "ranks [1, 2]: stepped" in first
