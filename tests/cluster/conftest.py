"""What the tests on clusters share: the fault matrix, shown at the end of the run, and the crew."""

from tests.cluster.crew import crew
from tests.cluster.matrix import pytest_terminal_summary

__all__ = ["crew", "pytest_terminal_summary"]
