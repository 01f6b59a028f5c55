"""Ranks that do not come to a good end, in a file of their own so that they import little."""

from __future__ import annotations

import os
import signal

__all__ = ["fail_on_rank_one", "interrupt_the_launcher"]


def fail_on_rank_one() -> None:
    """Raise on rank 1; the others wait until the launcher ends them."""
    if os.environ["RANK"] == "1":
        raise ValueError("I am broken")
    signal.pause()


def interrupt_the_launcher() -> None:
    """Do what Ctrl-C does to the process that started this one, then wait for the end."""
    if os.environ["RANK"] == "1":
        os.kill(os.getppid(), signal.SIGINT)
    signal.pause()
