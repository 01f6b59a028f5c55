"""Public test doubles: ranks as threads, faults by address."""

from shardscale.testing.faults import inject
from shardscale.testing.ranks import ThreadComm, run_ranks

__all__ = ["inject", "run_ranks", "ThreadComm"]
