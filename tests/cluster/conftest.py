"""What the tests on clusters share: the fault matrix, shown at the end of the run."""

from tests.cluster.matrix import pytest_terminal_summary

__all__ = ["pytest_terminal_summary"]
