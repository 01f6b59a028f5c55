"""Gloo process groups as communicators."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from shardscale.comm import ProcessGroupComm
from tests.comm_contract import check_contract, keep_contract


def contract(rank, size):
    return keep_contract(ProcessGroupComm(dist.group.WORLD, timeout_s=20))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_gloo_keeps_the_contract(ranks, size):
    check_contract(ranks.run(contract, size, limit_s=90), size)
