"""A graph of operators on the stand-in for an accelerator: captured once, replayed at will.

As with CUDA graphs, what is captured does not run, a replay runs none of the Python code, reads and
writes the same memory, and allocates nothing. CUDA's own are tested in ``tests/gpu``, where there
is a GPU; only here can a replay be tried on several ranks without one.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.ranks.accelerator import recorded

__all__ = ["Graph"]


class Graph:
    """What a function launches.

    Args:
        iteration: Called once, to be captured.
    """

    def __init__(self, iteration: Callable[[], object]) -> None:
        with recorded() as launched:
            self.result = iteration()  # its tensors are filled by each replay
        self._launched = launched

    def replay(self) -> None:
        """Launch it all again."""
        for launch in self._launched:
            launch()
