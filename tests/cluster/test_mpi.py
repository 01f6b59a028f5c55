"""Ranks agree over real MPICH and real Open MPI, without torch.distributed.

One start of mpirun, for each MPI and number of ranks, runs all cases of ``mpi_cases.py``; a test
judges what one of them returned.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.cluster.mpi import KINDS, MPIJob, environment, python_with
from tests.comm_contract import check_contract

SIZES = (2, 3, 4)
LIMIT_S = 100.0  # on two cores that have nothing else to do, the longest takes a tenth of it
SOON_S = 10.0  # where waiting for the others would take twice as long


class Found(NamedTuple):
    """What the cases returned in one start."""

    size: int
    by_case: dict[str, list[Any]]

    def __getitem__(self, case: str) -> list[Any]:  # type: ignore[override]
        """What one case returned, by rank."""
        results = self.by_case[case]
        raised = [result["raised"] for result in results if "raised" in (result or ())]
        assert not raised, "\n".join(raised)
        return results


@functools.cache
def run(kind: str, size: int) -> Found:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        ended = MPIJob(kind, size, "-m", "tests.cluster.mpi_cases", report).ended(LIMIT_S)
        assert ended.code == 0, ended.output
        assert ended.left == {}
        return Found(size, json.loads(report.read_text()))


def on(*sizes: int) -> Callable[..., Any]:
    """With both MPIs on these numbers of ranks."""
    starts = [pytest.param(kind, size, id=f"{kind}-{size}") for kind in KINDS for size in sizes]
    return pytest.mark.parametrize(("kind", "size"), starts)


@on(*SIZES)
def test_mpi_keeps_the_contract(kind: str, size: int):
    check_contract(run(kind, size)["contract"], size)


@on(*SIZES)
def test_all_ranks_skip_when_one_has_nan(kind: str, size: int):
    for found in run(kind, size)["nan_on_one"]:
        assert set(found) == {"torch.float32", "torch.bfloat16", "torch.float16"}
        for after_nan, parameter, scale in found.values():
            assert after_nan == [[1.0] * 3, 4.0]
            assert parameter == [0.5] * 3
            assert scale == 4.0


@on(*SIZES)
def test_ranks_without_gradients_and_without_optimizers_take_part(kind: str, size: int):
    """All are asked twice; the second time the gradients of those in the middle overflow."""
    first, *middle, last = run(kind, size)["without_gradients"]
    scale = 4.0 if middle else 8.0
    assert first == last == [[1.0] * 3, scale]
    assert all(found == [[0.5] * 3, scale] for found in middle)


@on(*SIZES)
def test_the_norm_of_pieces_is_that_of_one_process(kind: str, size: int):
    """Also where the last rank has nothing of the vector."""
    whole = torch.nn.Parameter(torch.zeros(11))
    whole.grad = torch.arange(1.0, 12.0)
    norm = torch.nn.utils.clip_grad_norm_([whole], 1.0)
    torch.optim.SGD([whole], lr=1.0).step()

    norms, pieces = zip(*run(kind, size)["norm"], strict=True)
    assert set(norms) == {norm.item()}
    assert pieces[-1] == []
    # torch multiplies by a factor that it has rounded to float32.
    torch.testing.assert_close(
        torch.tensor([*itertools.chain(*pieces)]), whole.data, rtol=3e-7, atol=0
    )


@on(*SIZES)
def test_all_ranks_have_one_state(kind: str, size: int):
    states = run(kind, size)["state"]
    assert all(state == states[0] for state in states)
    num_skipped = sum(step % 5 < size for step in range(12))
    state, parameter = states[0]
    assert dict(state["shardscale"])["num_skipped"] == num_skipped
    assert parameter == [1.0 - 0.5 * (12 - num_skipped)] * 3


@on(*SIZES)
def test_ranks_that_disagree_all_raise_and_move_nothing(kind: str, size: int):
    for rank, calls in enumerate(run(kind, size)["disagreement"]):
        assert len(calls) == 3
        for error, message, parameter in calls:
            assert error == "DisagreementError"
            assert message.startswith(f"rank {rank} of {size}: ")
            assert "1.0 on rank 0" in message  # its max_norm
            assert parameter == [1.0] * 3
        assert "'clip_grad_norm_' on rank 0, 'step' on rank" in calls[-1][1]


@on(*SIZES)
def test_a_rank_at_fault_raises_its_own_error_and_the_others_hear_of_it(kind: str, size: int):
    (error, message, parameter), *others = run(kind, size)["fault_of_one"]
    assert error == "LayoutError"
    assert parameter == [1.0] * 3
    for error, heard, parameter in others:
        assert error == "DisagreementError"
        assert f"rank 0 raised LayoutError: {message.rstrip('.')}" in heard
        assert parameter == [1.0] * 3


@on(*SIZES)
def test_the_wish_of_one_rank_stops_all_at_one_step(kind: str, size: int):
    answers = run(kind, size)["wish_to_stop"]
    assert all(answer == answers[0] for answer in answers)
    assert answers[0].count(False) >= 2 and answers[0][-1]


@on(*SIZES)
def test_a_rank_that_waits_hears_of_a_disagreement_that_others_have_read(kind: str, size: int):
    """It would wait for them in vain; what it raises is what it would have read later itself."""
    for error, message, parameter, seconds in run(kind, size)["read_late"]:
        assert error == "DisagreementError"
        assert "max_norm: 1.0 on rank 0, 2.0 on rank 1" in message
        assert parameter == [1.0] * 3
        assert seconds < SOON_S


@on(*SIZES)
def test_a_copy_keeps_its_communicator_and_a_pickle_loses_it(kind: str, size: int):
    for scale, error, message in run(kind, size)["copies"]:
        assert scale == 4.0
        assert error == "StageError"
        assert "with a comm=" in message


@on(*SIZES)
def test_scalers_of_one_communicator_are_told_apart(kind: str, size: int):
    """Also where one has another patience, and so its own view of it."""
    for error, message in run(kind, size)["two_scalers"]:
        assert error == "DisagreementError"
        assert "scaler (in order of making): 0 on rank 0, 1 on rank" in message


@on(*SIZES)
def test_nothing_mixes_with_other_traffic_of_the_program(kind: str, size: int):
    for rank, found in enumerate(run(kind, size)["other_traffic"]):
        assert found == {
            "verdict": [sum(range(size)), size],
            "gathered": list(range(size)),
            "sum": sum(range(size)),
            "from the right": (rank + 1) % size,
        }


@on(*SIZES)
def test_objects_are_gathered_on_a_thread_while_the_program_waits_in_mpi(kind: str, size: int):
    assert run(kind, size)["gather_on_a_thread"] == [list(range(size))] * size


@on(*SIZES)
def test_large_objects_are_gathered(kind: str, size: int):
    lengths = [(rank + 1) * 2**20 for rank in range(size)]
    assert run(kind, size)["large_objects"] == [lengths] * size


@on(*SIZES)
def test_mpirun_brings_up_torch_distributed_too(kind: str, size: int):
    """A scaler over Gloo and one over MPI then live beside each other in one program."""
    for rank, found in enumerate(run(kind, size)["bring_up"]):
        assert found == {
            "rank": [rank, size, rank],
            "source": kind,
            "sum": sum(range(size)),
            "scales": [4.0, 4.0],
        }


@on(*SIZES)
def test_what_is_no_communicator_to_agree_in_is_refused(kind: str, size: int):
    *members, outsider = run(kind, size)["refused"]
    for found in (*members, outsider):
        for name, word in (
            ("an intercommunicator", "comm.Merge()"),
            ("no communicator", "comm is a int"),
            ("no time", "timeout_s is nan"),
        ):
            error, message = found[name]
            assert error == "ConfigError"
            assert word in message
    assert all(found["no member"] == [None, ""] for found in members)
    error, message = outsider["no member"]
    assert error == "ConfigError"
    assert f"rank {size - 1} of MPI.COMM_WORLD" in message
    assert "MPI.COMM_NULL" in message


# Each in a fork of one process, which has imported all but MPI.
_UNUSABLE = """
import os, mpi4py
import shardscale.comm

def told(prepare, **environ):
    if os.fork():
        assert os.wait()[1] == 0
        return
    os.environ.update(environ)
    prepare()
    from mpi4py import MPI
    if prepare is finalize:
        MPI.Finalize()
    try:
        shardscale.comm.MPIComm(MPI.COMM_WORLD)
    except shardscale.ConfigError as error:
        print(error, flush=True)
    os._exit(0)

def leave():
    mpi4py.rc.initialize = False

def finalize():
    pass

def serialize():
    mpi4py.rc.thread_level = "serialized"

told(leave)
told(finalize)
told(serialize)
told(
    dict, SLURM_JOB_ID="7", SLURM_STEP_ID="0", SLURM_PROCID="0", SLURM_NTASKS="4",
    SLURM_LOCALID="0", SLURM_NODEID="0", SLURM_STEP_NUM_NODES="1", SLURM_STEP_TASKS_PER_NODE="4",
)
"""


@pytest.mark.parametrize("kind", KINDS)
def test_an_mpi_that_cannot_be_used_is_refused_in_a_sentence(kind: str):
    done = subprocess.run(
        [python_with(kind), "-c", _UNUSABLE],
        env={**os.environ, **environment()},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    left_out, finalized, serialized, alone = done.stdout.splitlines()
    assert "MPI is not initialized" in left_out
    assert "MPI is finalized already" in finalized
    assert "Query_thread()" in serialized and "THREAD_MULTIPLE" in serialized
    assert "SLURM_NTASKS is 4" in alone
    assert "4 worlds of 1" in alone
    assert ("--mpi=pmix" if kind == "openmpi" else "--mpi=pmi2") in alone


# ----------------------------------------------------------------------------- who does not come


@on(3)
def test_who_does_not_come_is_named_with_host_and_last_step(kind: str, size: int):
    """In the time of the scaler, although its communicator would wait longer."""
    *waited, late = run(kind, size)["missing"]
    for rank, found in enumerate(waited):
        assert found["error"] == "MissingRankError"
        host = found["host"]
        start = f"rank {rank} of 3 ({host}): verdict 3 (step 2) did not complete"
        assert found["message"].startswith(start)
        assert f"Did not come: rank 2 ({host}), last heard of at step 1." in found["message"]
        assert f"Came: rank {1 - rank} ({host}) at step 2." in found["message"]
        assert found["seconds"] < SOON_S
    # The numbers of the others were there. To step by them would have left it alone with that.
    assert late["error"] == "MissingRankError"
    assert f"ranks 0 ({host}), 1 ({host}) gave it up" in late["message"]
    assert late["seconds"] < SOON_S
    assert all(found["parameter"] == [0.0] * 3 for found in (*waited, late))


@on(3)
def test_after_that_every_verdict_raises_at_once_and_objects_are_still_gathered(
    kind: str, size: int
):
    for found in run(kind, size)["missing"]:
        error, message, seconds = found["again"]
        assert error == "MissingRankError"
        assert "cannot be used any more, because verdict 3 (step 2) did not complete" in message
        assert seconds < 0.1
        assert found["gathered"] == [0, 1, 2]


@on(3)
def test_the_patient_give_up_soon_after_the_impatient(kind: str, size: int):
    first, second, _ = run(kind, size)["one_is_impatient"]
    for error, message, seconds in (first, second):
        assert error == "MissingRankError"
        assert ", ready but never at a verdict. Came: " in message
        assert "If some ranks never train" in message
        assert seconds < SOON_S
    assert "verdict 1 did not complete within 0.3 s" in first[1]
    assert "(rank 0 (" in second[1] and "gave it up" in second[1]


@on(3)
def test_a_wait_that_was_interrupted_is_not_taken_up_again(kind: str, size: int):
    """The numbers of that call are under way, and would be taken for those of the next one."""
    error, message = run(kind, size)["interrupted"][0]
    assert error == "MissingRankError"
    assert "cannot be used any more, because verdict 1 was interrupted" in message


@on(3)
def test_a_communicator_that_not_all_make_is_an_error_that_names_them(kind: str, size: int):
    *waited, late = run(kind, size)["not_made_by_all"]
    for error, message in waited:
        assert error == "MissingRankError"
        assert "making its MPIComm did not complete" in message
        assert "Did not come: rank 2, never heard of." in message
    assert late[0] == "MissingRankError"
    assert "(ranks 0, 1 gave it up)" in late[1]
