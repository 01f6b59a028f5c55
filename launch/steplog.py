"""A log of one rank with a line for each finished step, which no kill of the process can take back.

The lines of `rank0.jsonl`, `rank1.jsonl`, ... are meant to be compared::

    {"step": 3, "skipped": false, "scale": "0x1.0000000000000p+16", "digest": "9f86d081884c"}
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from shardscale.demo.witness import StepWitness

__all__ = ["RankLog"]


class RankLog:
    """The log of one rank; a job that is continued continues its log.

    Args:
        folder: Where the logs of all ranks lie; made if need be.
        rank: This rank.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank{rank}.jsonl"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, step: int, scale: float, witness: StepWitness) -> None:
        """Add a line; when this returns, the kernel has it.

        Args:
            step: Its number, from 1 on.
            scale: After the step; written to the last bit.
            witness: Has seen whether the step changed the parameters of this rank.
        """
        line = {
            "step": step,
            "skipped": witness.just_skipped,
            "scale": scale.hex(),
            "digest": witness.digest(),
        }
        os.write(self._file, (json.dumps(line) + "\n").encode())
