"""The sentences about a verdict that did not complete, from what a roll call has found."""

from __future__ import annotations

import pytest

from shardscale.comm.attendance import Attendance, Crew, Place, tell

HOSTS = {0: "n1", 1: "n2", 2: "n3", 3: "n4"}
HERE = Place(37, 36)
BEFORE = Place(36, 35)
CREW = Crew(1, 4, "n2")


def told(answered, late=None, hosts=HOSTS, crew=CREW, place=HERE, last=BEFORE):
    found = Attendance({crew.rank: place, **answered}, late or {}, hosts)
    return tell(found, crew, place, last)


def test_who_is_missing_is_named_with_its_host_and_its_last_step():
    assert told({0: HERE, 2: HERE}) == (
        "Did not come: rank 3 (n4), last heard of at step 35. "
        "Came: ranks 0 (n1), 2 (n3) at step 36. "
        "Every rank must make every call of the scaler; if one is slow, raise timeout_s."
    )


def test_at_the_first_verdict_a_rank_without_a_scaler_was_never_heard_of():
    message = told({0: Place(1, 0)}, hosts={0: "n1", 2: "n3"}, place=Place(1, 0), last=None)
    assert message.startswith(
        "Did not come: rank 2 (n3), ready but never at a verdict; rank 3, never heard of. "
        "Came: rank 0 (n1) at step 0. "
    )


def test_a_step_that_nobody_told_is_not_made_up():
    """Sums of Partial gradients, or a communicator that is used without a scaler."""
    message = told({0: Place(37, None)}, place=Place(37, None), last=Place(36, None))
    assert "rank 2 (n3), 3 (n4), last heard of at verdict 36." in message.replace("ranks", "rank")
    assert "Came: rank 0 (n1). " in message
    for place, other in ((HERE, Place(37, None)), (Place(37, None), HERE)):
        assert "But" not in told({0: other, 2: place}, place=place)


def test_a_rank_whose_count_is_behind_is_told_apart():
    assert "Came: ranks 0 (n1), 2 (n3) at step 36. But rank 2 (n3) was at step 3." in told(
        {0: HERE, 2: Place(37, 3)}
    )


def test_a_mark_of_an_earlier_verdict_is_no_sign_of_this_one():
    """It was late once, and the verdict completed after all."""
    assert "Did not come: rank 3 (n4), last heard of at step 35. " in told(
        {0: HERE, 2: HERE}, late={3: Place(30, 29), 0: Place(30, 29)}
    )


def test_a_rank_that_wrote_that_it_waits_and_then_fell_silent_has_come():
    message = told({0: HERE}, late={2: HERE, 0: HERE})
    assert "Did not come: rank 3 (n4), last heard of at step 35." in message
    assert "Came, but no longer there: rank 2 (n3)." in message


def test_if_only_such_a_rank_is_absent_nobody_is_told_to_come():
    message = told({0: HERE, 3: HERE}, late={2: HERE})
    assert (
        message == "Came, but no longer there: rank 2 (n3). Came: ranks 0 (n1), 3 (n4) at step 36."
    )


def test_a_rank_still_waiting_for_the_verdict_before_is_not_blamed():
    """In a ring of sums one rank may have the result when another lost its neighbour over it."""
    message = told({0: BEFORE, 2: HERE})
    assert "Did not come: rank 3 (n4), last heard of at step 35." in message
    assert "Elsewhere: rank 0 (n1) was at verdict 36 (step 35)." in message


def test_ranks_that_all_wait_but_not_for_the_same_verdict_are_told_so():
    assert told({0: BEFORE, 2: HERE, 3: BEFORE}) == (
        "The ranks do not make the same calls: ranks 0 (n1), 3 (n4) were at verdict 36 (step 35)."
    )


def test_where_all_came_the_connection_is_to_blame():
    assert told({0: HERE, 2: HERE, 3: HERE}).startswith("All ranks came, so a connection broke")


def test_a_lonely_rank_says_so():
    assert "No other rank came." in told({})


def test_in_a_smaller_group_both_numbers_are_given():
    crew = Crew(1, 2, "n4", in_job=(0, 3))
    message = told({}, hosts={0: "n1", 1: "n4"}, crew=crew)
    assert crew.myself == "rank 1 of 2 (rank 3 of the job, n4)"
    assert "Did not come: rank 0 (rank 0 of the job, n1), last heard of" in message


@pytest.mark.parametrize(
    ("num_missing", "rest"), [(8, ""), (9, " and 1 more"), (1000, " and 992 more")]
)
def test_of_very_many_ranks_some_are_named(num_missing, rest):
    crew = Crew(0, num_missing + 1, "n0")
    assert f"7, 8{rest}, last heard of" in told({}, hosts={}, crew=crew)
