"""When ranks agree, and how the demo says it."""

from __future__ import annotations

import pytest

from shardscale.demo.agreement import closing_line, ranks_agree
from shardscale.demo.results import RankRow


def rows(ranks: int = 3) -> list[RankRow]:
    """Ranks that took the same steps; each holds a shard of its own."""
    return [RankRow(rank, 32768.0, 19, 1, f"{rank:012x}", 0.96) for rank in range(ranks)]


def replicas(ranks: int = 3) -> list[RankRow]:
    """The same, each holding all parameters."""
    return [row._replace(digest="abcdefabcdef") for row in rows(ranks)]


@pytest.mark.parametrize("wrap", ["fsdp1", "fsdp2"])
def test_shards_may_differ_under_fsdp(wrap: str):
    assert ranks_agree(rows(), wrap)


def test_replicas_must_not_differ_under_ddp():
    assert ranks_agree(replicas(), "ddp")
    assert not ranks_agree(rows(), "ddp")


@pytest.mark.parametrize("wrap", ["ddp", "fsdp1", "fsdp2"])
@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize(
    "change",
    [{"scale": 65536.0}, {"applied": 20}, {"skipped": 0}],
    ids=lambda change: next(iter(change)),
)
def test_one_rank_that_differs_is_enough(wrap: str, rank: int, change: dict[str, float]):
    found = replicas()
    found[rank] = found[rank]._replace(**change)
    assert not ranks_agree(found, wrap)


def test_a_rank_alone_agrees():
    assert ranks_agree(rows(1), "fsdp2")


def test_agreement_is_said_in_one_line():
    assert closing_line(rows(4), "fsdp2") == (
        "agree: 4 of 4 ranks applied 19 of 20 steps, skipped 1, and ended at scale 32768; "
        "test accuracy 96.0 %"
    )


def test_agreement_of_replicas_names_their_digest():
    assert "with the same parameters abcdefabcdef;" in closing_line(replicas(), "ddp")


def test_divergence_names_who_did_what():
    found = rows()
    found[1] = found[1]._replace(scale=2.0**24, applied=20, skipped=0)
    assert closing_line(found, "fsdp1") == (
        "DIVERGED: of 20 steps ranks 0, 2 skipped 1 (scale 32768); "
        "rank 1 skipped 0 (scale 16777216); test accuracy 96.0 %"
    )


def test_replicas_that_differ_in_their_parameters_alone_are_told_apart():
    found = replicas()
    found[2] = found[2]._replace(digest="012345678901", accuracy=0.5)
    assert closing_line(found, "ddp") == (
        "DIVERGED: of 20 steps ranks 0, 1 skipped 1 (scale 32768, parameters abcdefabcdef); "
        "rank 2 skipped 1 (scale 32768, parameters 012345678901); test accuracy 50.0 to 96.0 %"
    )
