"""The message's arithmetic up to the largest group: exact in any order, and how often it misses."""

from __future__ import annotations

import functools

import numpy
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shardscale.records import Call, ScaleState
from shardscale.verdict import (
    MAX_RANKS,
    _multipliers,
    fingerprint,
    is_heard,
    units_of,
    unpack,
    weight,
)

Integers = NDArray[numpy.int64]
SIZES = (2, 3, 8, 1_024, MAX_RANKS)
ALL_HEARD = 3_259  # the largest group in which every wish is heard in every step
SOME_HEARD = 107_439  # the largest in which wishes besides rank 0's are
# Small ones, both sides of these borders and of that between turns of two and of three steps.
BORDERS = (1, 2, 3, 4, 5, 3_258, 3_259, 3_260, 3_261, 4_105, 4_106, 107_439, 107_440, 131_071)


def weights(steps: Integers, ranks: Integers, size: int) -> Integers:
    """``weight`` of many ranks and steps at once, for speed; held to it by the first test."""
    return draws(steps, ranks, size) - draws(steps, (ranks + 1) % size, size)


def draws(steps: Integers, ranks: Integers, size: int) -> Integers:
    starts = [_multipliers(int(step))[-1] for step in steps.ravel()]
    residues = numpy.where((ranks == size - 1) & (size % 2 == 1), 2, ranks % 2)
    z = ranks.astype(numpy.uint64) * numpy.uint64(0x9E3779B97F4A7C15)
    z = z + numpy.array(starts, dtype=numpy.uint64).reshape(steps.shape)
    z = (z ^ (z >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
    z ^= z >> numpy.uint64(31)
    return 3 * (z % numpy.uint64(170)).astype(numpy.int64) + residues


@pytest.mark.parametrize("size", [1_023, 1_024, 16_384, MAX_RANKS - 1, MAX_RANKS])
def test_weights_of_large_groups_are_small_never_zero_and_sum_to_zero(size):
    step = 5
    found = numpy.array([weight(step, rank, size) for rank in range(size)])

    assert found.sum() == 0
    assert (found != 0).all() and abs(found).max() <= 509
    assert (found == weights(numpy.array([step]), numpy.arange(size), size)).all()


# What ranks send that have the fingerprints given, and how many of them are bad or wish.
FINGERPRINTS = {
    "alike": lambda random, weights: random.integers(1, 1023) + 0 * weights,
    "all different": lambda random, weights: random.integers(1, 1023, len(weights)),
    "as high as can be": lambda random, weights: numpy.where(weights > 0, 1022, 1),
    "as low as can be": lambda random, weights: numpy.where(weights < 0, 1022, 1),
}
WEIGHTS = {
    "drawn": lambda step, size: weights(numpy.array([step]), numpy.arange(size), size),
    # No draw is beyond 509, and a ring rises from 0 to that at most every second time.
    "largest": lambda step, size: (
        numpy.resize([-509, 509], size - size % 2).tolist() + [0] * (size % 2)
    ),
}
COUNTS = {
    "some": lambda random, size: random.integers(0, 2, size),
    "none": lambda random, size: numpy.zeros(size, dtype=numpy.int64),
    "all": lambda random, size: numpy.ones(size, dtype=numpy.int64),
}


def heard(step: int, size: int) -> Integers:
    """1 for the ranks whose wish rides in this step."""
    return numpy.array([is_heard(step, rank, size) for rank in range(size)], dtype=numpy.int64)


def at_the_borders(test):
    """The worst sums, in groups of all sizes at which something changes."""
    for size in (*BORDERS, MAX_RANKS):
        for print_kind in ("as high as can be", "as low as can be"):
            kinds = {"print_kind": print_kind, "weight_kind": "largest"}
            test = example(size=size, step=0, **kinds, bad_kind="all", wish_kind="all", seed=0)(
                test
            )
    return test


@settings(deadline=None, max_examples=30)
@given(
    size=st.integers(2, MAX_RANKS),
    step=st.integers(0, 10**6),
    print_kind=st.sampled_from(sorted(FINGERPRINTS)),
    weight_kind=st.sampled_from(sorted(WEIGHTS)),
    bad_kind=st.sampled_from(sorted(COUNTS)),
    wish_kind=st.sampled_from(sorted(COUNTS)),
    seed=st.integers(0, 2**32),
)
@at_the_borders
def test_every_partial_sum_is_exact_in_every_order(
    size, step, print_kind, weight_kind, bad_kind, wish_kind, seed
):
    """Rings, trees and switches add in orders of their own, and rank by rank in none of them."""
    random = numpy.random.default_rng(seed)
    units = units_of(size)
    mine = numpy.array(WEIGHTS[weight_kind](step, size))
    bad = COUNTS[bad_kind](random, size)
    wishes = COUNTS[wish_kind](random, size) * heard(step, size)
    terms = mine * FINGERPRINTS[print_kind](random, mine) * units.call + bad + wishes * units.wish

    # No set of ranks has a sum beyond these two, so none is rounded, whoever adds it up.
    assert terms[terms > 0].sum() < 2**53
    assert -terms[terms < 0].sum() < 2**53
    total = int(terms.sum())
    for order in (terms, random.permutation(terms), numpy.sort(terms), numpy.sort(terms)[::-1]):
        assert (order.astype(float).cumsum() == order.cumsum()).all()  # a ring, or rank by rank
        level = order.astype(float)
        while len(level) > 1:  # a tree
            level = numpy.append(level, [0.0] * (len(level) % 2)).reshape(-1, 2).sum(1)
        assert level[0] == total
    assert total % units.call == bad.sum() + wishes.sum() * units.wish
    if print_kind == "alike":
        assert 0 <= total < units.call


@pytest.mark.parametrize("size", [*BORDERS, 16_384, MAX_RANKS])
@pytest.mark.parametrize("on_host", [True, False])
def test_what_is_counted_is_read_again(size, on_host, monkeypatch):
    """Bad ranks and wishes, from none to all there may be, beside any drift that can be summed."""
    monkeypatch.setattr("shardscale.verdict._is_on_host", lambda tensor: on_host)
    units = units_of(size)
    num_heard = units.call // units.wish - 1
    drifts = {0, 1, -1, 2**53 // units.call - 1, 1 - 2**53 // units.call}
    for num_bad in {0, 1, size}:
        for num_wishes in {0, 1, num_heard}:
            for drift in drifts:
                total = num_bad + num_wishes * units.wish + drift * units.call
                assert abs(total) < 2**53
                words = torch.tensor([total, 0.0], dtype=torch.float64)
                flags = unpack(words, False, size).flags.tolist()
                found = num_bad > 0 or drift != 0
                assert flags == [found, drift != 0, False, num_wishes > 0], (num_bad, num_wishes)


# --- Wishes: whose is heard. ----------------------------------------------------------------------


def test_the_bounds_that_the_documentation_states_are_the_largest():
    """By the sum itself: the rises of a ring, all of 509, times 1022, and below one unit more."""

    def fits(size, num_wishes):
        of_one_call = (size + 1) * (num_wishes + 1)
        return (size // 2 * 509 * 1022 + 1) * of_one_call - 1 < 2**53

    assert max(size for size in range(1, 5_000) if fits(size, size)) == ALL_HEARD
    assert max(size for size in range(100_000, MAX_RANKS + 1) if fits(size, 2)) == SOME_HEARD
    assert fits(MAX_RANKS, 1)


@pytest.mark.parametrize("size", [1, 2, 3, 64, ALL_HEARD])
def test_up_to_3259_ranks_every_wish_is_heard_in_every_step(size):
    for step in range(3):
        assert heard(step, size).all()


@pytest.mark.parametrize(("size", "turns"), [(3_260, 2), (4_105, 2), (4_106, 3), (8_192, 16)])
def test_in_larger_groups_rank_0_is_heard_and_the_others_take_turns(size, turns):
    room = units_of(size).call // units_of(size).wish - 1
    rounds = numpy.array([heard(step, size) for step in range(7, 7 + turns)])

    assert (rounds[:, 0] == 1).all()
    assert (rounds[:, 1:].sum(0) == 1).all()
    assert (rounds.sum(1) <= room).all()


@pytest.mark.parametrize("size", [SOME_HEARD + 1, MAX_RANKS])
def test_in_the_largest_groups_rank_0_alone_is_heard(size):
    for step in range(2):
        assert heard(step, size).nonzero()[0].tolist() == [0]


# --- Misses: ranks that drifted alike, and whose differences cancel in the sum. -------------------

NUM_STEPS = 10_000
# The hash of two calls is the same in one step of 1022. Where it is not, the weights of the ranks
# that drifted alike must cancel: given all draws but one, at most one value of 170 does it.
ONE_RANK = 1 / 1022
SEVERAL_RANKS = ONE_RANK + (1 - ONE_RANK) / 170


@functools.cache
def drifts() -> list[tuple[Call, Call]]:
    """For each step, what most ranks believe and what some others do."""
    random = numpy.random.default_rng(0)

    def number(dtype=torch.float32) -> torch.Tensor:
        return torch.tensor(2.0 ** random.integers(-10, 17), dtype=torch.float32).to(dtype)

    def call(step: int) -> Call:
        state = ScaleState(number(), number(torch.int32), number(torch.int32))
        return Call(step, "step", 0, 0, None, "DynamicScale()", state, state.scale)

    def drifted(call: Call) -> Call:
        what = random.integers(3)
        if what == 0:
            return call._replace(stamp=call.stamp * 2)
        if what == 1:
            return call._replace(max_norm=random.random())
        tracker = call.state.growth_tracker + 1
        return call._replace(state=call.state._replace(growth_tracker=tracker))

    return [(each, drifted(each)) for each in map(call, range(NUM_STEPS))]


@functools.cache
def collisions() -> NDArray[numpy.bool_]:
    """The steps in which both sides of the drift have the same fingerprint."""
    return numpy.array([fingerprint(one, None) == fingerprint(two, None) for one, two in drifts()])


def some(size: int, num: int) -> Integers:
    """In each step, ``num`` different ranks of the group."""
    random = numpy.random.default_rng(num)
    first = random.integers(0, size, (NUM_STEPS, 1))
    gaps = random.integers(1, max(2, size // num + 1), (NUM_STEPS, num - 1)).cumsum(1)
    return (first + numpy.append(numpy.zeros_like(first), gaps, 1)) % size


def neighbours(size: int, num: int) -> Integers:
    """In each step, ``num`` ranks in a row, as those of one node."""
    first = numpy.random.default_rng(num).integers(0, size, (NUM_STEPS, 1))
    return (first + numpy.arange(num)) % size


# Half of the ranks of 131,072 are too many numbers for a quick test.
PATTERNS = [
    *[(size, some, 1, ONE_RANK) for size in SIZES],
    *[(size, neighbours, 2, SEVERAL_RANKS) for size in SIZES[1:]],
    *[(size, some, 2, SEVERAL_RANKS) for size in SIZES[2:]],
    *[(size, neighbours, 8, SEVERAL_RANKS) for size in SIZES[3:]],
    (8, some, 4, SEVERAL_RANKS),
    (1_024, some, 512, SEVERAL_RANKS),
    (MAX_RANKS, some, 64, SEVERAL_RANKS),
]


@pytest.mark.parametrize(
    ("size", "pattern", "num", "rate"),
    PATTERNS,
    ids=[f"{num} {pattern.__name__} of {size}" for size, pattern, num, _ in PATTERNS],
)
def test_a_drift_is_seldom_missed_and_then_found_soon(size, pattern, num, rate):
    steps = numpy.arange(NUM_STEPS).reshape(-1, 1)
    ranks = pattern(size, num)
    missed = collisions() | (weights(steps, ranks, size).sum(1) == 0)

    # At most what is expected and five standard deviations of it; but some, or nothing was counted.
    assert 0 < missed.sum() < NUM_STEPS * rate + 5 * (NUM_STEPS * rate) ** 0.5
    assert missed.mean() < 0.01
    for step in numpy.flatnonzero(missed):
        assert any(is_found(step, later, ranks[step], size) for later in range(1, 4))


def is_found(step: int, later: int, ranks: Integers, size: int) -> bool:
    """Whether a drift that began at ``step`` is found so many steps after it."""
    now = int(step) + later
    one, two = (fingerprint(call._replace(num_updates=now), None) for call in drifts()[step])
    return one != two and sum(weight(now, int(rank), size) for rank in ranks) != 0
