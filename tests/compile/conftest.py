"""Each test compiles from nothing, and Inductor keeps its files out of the home folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
import torch
import torch._dynamo
import torch._inductor.config

HAS_COMPILER = any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))


@pytest.fixture(scope="session")
def inductor_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One for all tests: equal graphs are compiled once."""
    if not HAS_COMPILER:
        pytest.skip("Inductor needs a C++ compiler: apt-get install g++")
    return str(tmp_path_factory.mktemp("inductor"))


@pytest.fixture
def inductor(inductor_cache: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The backend's name, for tests that compile to machine code."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", inductor_cache)
    with torch._inductor.config.patch(compile_threads=1):  # no processes that outlive the test
        yield "inductor"


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch.set_num_threads(before)
