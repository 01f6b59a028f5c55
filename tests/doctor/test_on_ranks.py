"""The doctor on several ranks: what it finds, and that no rank it loses can hold it."""

from __future__ import annotations

from shardscale.doctor.codes import Code
from tests.doctor import on_ranks

LIMIT_S = 25.0  # none of them comes near it


def ends(ranks, case, size=2):
    """Each rank's exit code, and what it printed, on one line."""
    reports = ranks.spawn(case, size, backend=None, limit_s=LIMIT_S)
    codes = [r.exit_code if r.result is None else r.result for r in reports]
    return codes, [" ".join(report.output.split()) for report in reports]


def test_two_ranks_are_well(ranks):
    """What holds for three under torchrun (test_command.py) holds for two."""
    (code, report), (other, _) = ranks.run(on_ranks.written, 2, backend=None)
    assert (code, other) == (Code.WELL, Code.WELL)
    found = report["found"]
    assert found["F3 torch"] == {"0": "stepped, scale 4", "1": "skipped, scale 2"}
    assert found["F3 shardscale"] == {"0": "skipped, scale 2", "1": "skipped, scale 2"}
    assert found["F7 torch"]["1"] == "raised AssertionError, and kept the others waiting"


def test_a_broken_scaler_of_ours_is_a_failure(ranks):
    codes, (output, _) = ends(ranks, on_ranks.reduce_nothing)
    assert codes == [Code.CHECK, Code.CHECK]
    assert (
        "CHECK: F5, plain and DTensor parameters share an optimizer: wrong with shardscale's "
        "scaler on ranks 0-1."
    ) in output
    assert output.endswith(f"exit code {Code.CHECK}")


def test_a_rank_that_never_comes_is_named(ranks):
    (code, _), (output, _) = ends(ranks, on_ranks.never_come)
    assert code == Code.MISSING
    assert "MISSING: facts: rank 1: did not answer." in output


def test_a_rank_that_dies_is_named_with_its_host(ranks):
    codes, outputs = ends(ranks, on_ranks.lose_a_rank, size=3)
    assert codes == [Code.MISSING, -9, Code.MISSING]
    assert "MISSING: all-reduce: " in outputs[0]
    assert "rank 1: did not answer (on " in outputs[0]


def test_without_rank_0_the_others_end(ranks):
    codes, outputs = ends(ranks, on_ranks.lose_rank_0)
    assert codes == [-9, Code.MISSING]
    assert "rank 0 has not answered within" in outputs[1]


def test_an_all_reduce_that_hangs_is_a_failure(ranks):
    codes, (output, _) = ends(ranks, on_ranks.stick_in_an_all_reduce)
    assert codes == [Code.ALL_REDUCE, Code.ALL_REDUCE]
    assert "ALL_REDUCE: all-reduce: ranks 0-1: TimeoutError: no answer within 2 s" in output


def test_torchs_scaler_may_hang_and_nothing_fails(ranks):
    codes, (output, _) = ends(ranks, on_ranks.stick_in_torchs_last_check)
    assert codes == [Code.WELL, Code.WELL]
    assert "F7 torch: rank 1: TimeoutError: no answer within 2 s" in output
    assert output.endswith("All is well.")
