"""The watch over verdicts on a real stream: what it says of a GPU that is late, and what it does.

A group of one rank over NCCL never waits for others, so the only lateness here is the GPU's own.
What it does when others do not come is tested on stand-ins, in ``tests/unit/test_monitor.py``
and ``tests/ranks/test_late_verdicts.py``.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from shardscale.comm import ProcessGroupComm
from tests.gpu.test_scaler import host_reads_are

pytestmark = pytest.mark.gpu

OWN_GPU = "This rank's own GPU has not reached it"
LIMIT_S = 4.0


def keep_busy(seconds):
    """Launch what the GPU needs about so long for."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    num_cycles = 200_000_000
    for _ in range(3):  # the first ones bring its clock up to speed
        start.record()
        torch.cuda._sleep(num_cycles)
        end.record()
        end.synchronize()
    torch.cuda._sleep(int(num_cycles * seconds * 1000 / start.elapsed_time(end)))


def wait_for(condition, limit_s=10.0):
    """Wait without a word to the GPU."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_gpu_that_is_late_is_told_and_no_other_is_blamed_or_asked(comm, caplog):
    """The job goes on unharmed: the verdict completes after half of its time and before all."""
    comm.timeout_s = LIMIT_S
    message = torch.tensor([3.0, 0.5], dtype=torch.float64, device="cuda")
    comm.all_reduce_sum_(message)
    keep_busy(0.75 * LIMIT_S)
    with host_reads_are("error"):
        comm.all_reduce_sum_(message)
        wait_for(lambda: caplog.records)
        assert not torch.cuda.current_stream().query()  # the host was far ahead of it
    torch.cuda.synchronize()
    comm.all_reduce_sum_(message)

    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "rank 0 of 1" in record.getMessage()
    assert "verdict 2 takes " in record.getMessage()
    assert OWN_GPU in record.getMessage()
    assert "Did not come" not in record.getMessage()
    assert not comm.is_aborted
    assert message.tolist() == [3.0, 0.5]
    assert not comm._roll_call._store.check(["shardscale/joined"])  # before the first question


def test_a_verdict_that_does_not_complete_is_logged_the_group_aborted_and_the_next_call_raises(
    tmp_path,
):
    """In a process of its own, for a group that was aborted is in no state to be left behind."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.test_monitor", str(tmp_path / "store")],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["order"] == ["ERROR", "abort"]
    assert seen["error"] == "MissingRankError"
    assert "rank 0 of 1" in seen["message"]
    assert f"verdict 2 did not complete within {LIMIT_S / 4:g} s. {OWN_GPU}" in seen["message"]
    assert "Did not come" not in seen["message"]
    assert seen["is_still_busy"]


def hang(store):
    """The stream is kept busy for longer than a verdict may take; five seconds, and no more."""
    order = []
    handler = logging.Handler()
    handler.emit = lambda record: order.append(record.levelname)
    logging.getLogger("shardscale").addHandler(handler)
    abort = dist.ProcessGroup.abort
    dist.ProcessGroup.abort = lambda group: order.append("abort") or abort(group)
    dist.init_process_group(
        "nccl",
        store=dist.FileStore(store, 1),
        rank=0,
        world_size=1,
        device_id=torch.device("cuda", 0),
    )
    comm = ProcessGroupComm(dist.group.WORLD, timeout_s=LIMIT_S / 4)
    message = torch.ones(2, dtype=torch.float64, device="cuda")
    comm.all_reduce_sum_(message)
    keep_busy(5.0)
    comm.all_reduce_sum_(message)
    wait_for(lambda: "abort" in order)
    try:
        comm.all_reduce_sum_(message)
        raised = None
    except Exception as error:
        raised = error
    print(
        json.dumps(
            {
                "order": [name for name in order if name != "WARNING"],
                "error": type(raised).__name__,
                "message": str(raised),
                "is_still_busy": not torch.cuda.current_stream().query(),
            }
        ),
        flush=True,
    )
    os._exit(0)


if __name__ == "__main__":
    hang(sys.argv[1])
