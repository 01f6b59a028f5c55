"""Fixtures for all tests: ``ranks``, which runs a function on several processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ranks.pool import RankPool


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """``ranks.run(case, size, ...)`` and ``ranks.spawn(case, size, ...)``; started by the first
    case, ended last."""
    pool = RankPool(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()
