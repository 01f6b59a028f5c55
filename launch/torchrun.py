"""torchrun that finds its meeting point in Slurm, and tells how the first rank that failed ended.

In a task of `srun`, one a node, its options beside the usual ones are those that the tasks have to
agree on. Anywhere else it is torchrun. It leaves with the exit code of the first rank that failed,
where torchrun itself leaves with 1: a batch script has to tell 85, a rank that was told to stop,
from a rank that broke.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

from shardscale.comm.nodelist import expand

__all__ = ["meeting_point"]

# Above the ports of torch (29400, 29500) and of shardscale's own meetings, below those that Linux
# gives to connections.
_FIRST_PORT = 30_000
_NUM_PORTS = 2_700


def meeting_point(environ: Mapping[str, str]) -> list[str]:
    """Return torchrun's options for the tasks of a step to meet; none where there is no step.

    Jobs that share a node have different ports, and each start of a job has a name of its own. The
    first node is the host: torchrun would compare the host names, which need not be the nodes'
    names in Slurm, and without a host all nodes wait for minutes. A container has no `scontrol`,
    so the list of nodes is read here.

    Args:
        environ: Such as ``os.environ``.
    """
    if "SLURM_STEP_NODELIST" not in environ:
        return []
    first = expand(environ["SLURM_STEP_NODELIST"])[0]
    job, restarts = environ["SLURM_JOB_ID"], environ.get("SLURM_RESTART_COUNT", "0")
    return [
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={first}:{_FIRST_PORT + int(job) % _NUM_PORTS}",
        f"--rdzv-id={job}.{restarts}",
        f"--rdzv-conf=is_host={int(environ['SLURM_NODEID'] == '0')}",
        # What this node calls itself may be localhost, also where rank 0 is on it.
        f"--local-addr={environ['SLURMD_NODENAME']}",
    ]


if __name__ == "__main__":
    try:
        main(meeting_point(os.environ) + sys.argv[1:])
    except ChildFailedError as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which would change the code
        print(error, file=sys.stderr)
        _, failure = error.get_first_failure()
        # The number of a signal is negative here; a shell adds it to 128.
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
    except SignalException:
        # Ended because of a failure on another node. srun reports the largest code, which should
        # be that failure's.
        sys.exit(1)
