"""Gloo process groups as communicators."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from shardscale.comm import ProcessGroupComm
from tests.comm_contract import NUM_SUMS, check_contract, keep_contract


def contract(rank, size, num_sums):
    return keep_contract(ProcessGroupComm(dist.group.WORLD, timeout_s=20), num_sums)


@pytest.mark.parametrize(("size", "num_sums"), [(2, 500), (3, NUM_SUMS), (4, 500)])
def test_gloo_keeps_the_contract(ranks, size, num_sums):
    """Contract 44: the same bits on every rank, 10,000 times where the ring is odd."""
    check_contract(ranks.run(contract, size, limit_s=90, num_sums=num_sums), size)
