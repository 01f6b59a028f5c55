"""Tests that need a GPU are skipped without one, and say so."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from shardscale.comm import ProcessGroupComm


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA or ROCm device, and torch sees none")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


class CountingComm(ProcessGroupComm):
    """Counts its collectives, and notes where each message lived."""

    def __init__(self, group):
        super().__init__(group)
        self.devices = []

    def all_reduce_sum_(self, buffer):
        self.devices.append(buffer.device.type)
        super().all_reduce_sum_(buffer)


@pytest.fixture
def comm(tmp_path) -> Iterator[CountingComm]:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    device = torch.device("cuda", 0)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=device)
    yield CountingComm(dist.group.WORLD)
    dist.destroy_process_group()
