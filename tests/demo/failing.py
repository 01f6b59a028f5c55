"""A rank that fails, in a file of its own so that its process has little to import."""

from __future__ import annotations

import os
import signal

__all__ = ["fail_on_rank_one"]


def fail_on_rank_one(how: str) -> None:
    """Raise or die on rank 1; the others wait until the launcher ends them."""
    if os.environ["RANK"] == "1":
        if how == "raise":
            raise ValueError("this rank is broken")
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()
