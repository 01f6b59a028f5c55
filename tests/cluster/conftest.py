"""What the tests on clusters share: the fault matrix, shown at the end of the run, and the crew;
a Slurm of four nodes, and another whose nodes have a network each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.crew import crew
from tests.cluster.matrix import pytest_terminal_summary
from tests.cluster.slurm import Slurm, running
from tests.cluster.slurm_daemons import why_not

__all__ = ["crew", "pytest_terminal_summary"]


@pytest.fixture(scope="package")
def slurm() -> Iterator[Slurm]:
    """Four nodes n1 to n4 that share this machine's network and host name."""
    if reason := why_not():
        pytest.skip(reason)
    with running("n", 4) as cluster:
        yield cluster


@pytest.fixture
def slurm_on_networks() -> Iterator[Slurm]:
    """Three nodes m1 to m3, each with a network, an address and a host name of its own."""
    if reason := why_not():
        pytest.skip(reason)
    with running("m", 3, networks=True) as cluster:
        yield cluster
