"""After an elastic restart the launcher's store is still there, with all that was written in it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from tests.ranks.pool import REPOSITORY


def test_the_second_world_reads_nothing_of_the_first(tmp_path):
    """The first has left a host, a late mark, an answer and an alarm, all of the verdict missed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["--max-restarts=1", "--monitor-interval=0.1"]
    command += ["-m", "tests.ranks.elastic", str(tmp_path)]
    subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=60,
        check=False,
    )
    host = socket.gethostname()
    told = [(tmp_path / f"world{attempt}").read_text() for attempt in range(2)]
    for attempt, message in enumerate(told):
        assert message.startswith(
            f"MissingRankError: rank {1 - attempt} of 2 ({host}): verdict 3 did not complete "
            f"within 1 s. Did not come: rank {attempt} ({host}), last heard of at verdict 2. "
            "No other rank came."
        )
    keys = (tmp_path / "keys1").read_text()
    for key in ("2/alarm", "2/answer/1", "2/late/1", "host/1"):
        assert f"shardscale/{key}" in keys
