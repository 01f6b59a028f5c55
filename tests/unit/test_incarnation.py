"""A roll call in a store that outlives its ranks counts the living only, and gives fresh keys."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from shardscale import MissingRankError
from shardscale.comm.incarnation import assemble


def life(store: dist.Store, ranks: list[int], size: int = 3, timeout_s: float = 10.0):
    """What each of ``ranks`` gets out of one life of a job with ``size`` ranks."""

    def one(rank: int):
        return assemble(store, rank, size, timeout_s, f"rank {rank}", ", ".join)

    with ThreadPoolExecutor(len(ranks)) as pool:
        futures = [pool.submit(one, rank) for rank in ranks]
    return [future.exception() or future.result() for future in futures]


def test_rank_0_decides_from_what_all_have_said():
    decisions = [decision for _, decision in life(dist.HashStore(), [2, 0, 1])]
    assert decisions == ["rank 0, rank 1, rank 2"] * 3


def test_all_ranks_share_keys_that_no_earlier_life_has_written():
    store = dist.HashStore()
    first = [keys for keys, _ in life(store, [0, 1, 2])]
    first[1].set("address", "of the first life")
    assert first[0].check(["address"]) and first[2].check(["address"])
    second = [keys for keys, _ in life(store, [0, 1, 2])]
    assert not any(keys.check(["address"]) for keys in second)
    second[2].set("address", "of the second life")
    assert all(keys.get("address") == b"of the second life" for keys in second)


@pytest.mark.parametrize("missing", [0, 1])
def test_a_rank_that_came_in_an_earlier_life_only_is_missing_in_this_one(missing):
    store = dist.HashStore()
    life(store, [0, 1, 2])
    for error in life(store, [r for r in (0, 1, 2) if r != missing], timeout_s=0.3):
        assert isinstance(error, MissingRankError)
        assert f"rank {missing} " in str(error)


def test_many_missing_ranks_are_counted():
    [error] = life(dist.HashStore(), [0], size=100, timeout_s=0.01)
    assert "rank 0 of 100: ranks 1, 2, 3" in str(error)
    assert "and 83 more did not come" in str(error)
