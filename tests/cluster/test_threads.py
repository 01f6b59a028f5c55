"""The job of the fault matrix on ranks that are threads: NaN on one of them."""

from __future__ import annotations

import time
from pathlib import Path

from shardscale.testing import run_ranks
from tests.cluster import job, matrix
from tests.cluster.faults import Address, struck
from tests.cluster.logs import compare, read

SIZE = 4
FAULT = Address("nan", 3, 5)


def test_all_threads_skip_when_one_has_a_nan(tmp_path: Path):
    chosen = job.options(["--folder", str(tmp_path), "--fault", str(FAULT)])
    with matrix.row("NaN on one rank", "threads", "all skip", limit_s=5.0) as row:
        outcomes = run_ranks(lambda comm: job.run(chosen, comm.rank, comm.size, comm), SIZE)
        ended_at_s = time.monotonic()
        assert outcomes == [None] * SIZE
        assert compare(tmp_path, SIZE) == []
        skipped = [entry.step for entry in read(tmp_path, 0)[0] if entry.skipped]
        assert skipped == [FAULT.step]
        row.ended(ended_at_s - struck(tmp_path, FAULT).at_s, None)
