"""The verdict: one message, the same answer on every rank, and no way to disagree unseen."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardscale.errors import MissingRankError
from shardscale.records import Agreement, Call, ScaleState, ShardStats
from shardscale.testing import run_ranks
from shardscale.verdict import (
    MAX_RANKS,
    agree,
    alone,
    clip_coefficient,
    fingerprint,
    pack,
    units_of,
    unpack,
    weight,
)


def stats(found=0.0, sum_squares=None, wishes=False):
    squares = None if sum_squares is None else torch.tensor(sum_squares, dtype=torch.float64)
    return ShardStats(torch.tensor(found), squares, wishes)


def call(scale=65536.0, tracker=3, hysteresis=1, stamp=None, **changes):
    state = ScaleState(
        torch.tensor(scale),
        torch.tensor(tracker, dtype=torch.int32),
        torch.tensor(hysteresis, dtype=torch.int32),
    )
    made = Call(5, "step", 0, 0, None, "DynamicScale()", state, torch.tensor(stamp or scale))
    return made._replace(**changes)


def reduced(size, stats_of, call_of=lambda rank: call(), faulted=(), previous_of=lambda rank: None):
    """The summed message of ``size`` ranks, and each rank's own part of it."""
    parts = [
        pack(stats_of(r), call_of(r), r, size, previous_of(r), r in faulted) for r in range(size)
    ]
    return torch.stack(parts).sum(0), parts


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 64])
@pytest.mark.parametrize("bad_ranks", ["none", "first", "middle", "last", "all"])
def test_found_inf_is_exactly_one_if_any_rank_is_bad_and_zero_otherwise(size, bad_ranks):
    bad = {
        "none": set(),
        "first": {0},
        "middle": {size // 2},
        "last": {size - 1},
        "all": set(range(size)),
    }[bad_ranks]
    words, _ = reduced(size, lambda r: stats(float(r in bad)))
    result = unpack(words, False, size)

    assert result.verdict.found_inf.dtype == torch.float32
    assert result.verdict.found_inf.shape == ()
    assert result.verdict.found_inf.item() == (1.0 if bad else 0.0)
    assert result.drifted.item() == 0.0
    assert words[0].item() == len(bad)
    assert result.verdict.grad_norm.isnan()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 64])
@pytest.mark.parametrize("bad", [0, 1, "all"])
def test_a_wish_of_any_rank_is_read_and_changes_nothing_else(size, bad):
    """From no wish to one of every rank; the middle one's and the last one's alone, too."""
    bad_ranks = range(size if bad == "all" else bad)

    def read(wishing):
        words, _ = reduced(size, lambda r: stats(float(r in bad_ranks), r + 1.0, r in wishing))
        return unpack(words, True, size)

    without = read(())
    assert without.flags.tolist() == [float(bad != 0), 0.0, 0.0, 0.0]
    for wishing in ([size // 2], [size - 1], range(size)):
        result = read(wishing)
        assert result.flags.tolist() == [*without.flags.tolist()[:3], 1.0]
        assert result.grad_norm.item() == without.grad_norm.item()
        assert result.words[1].item() == without.words[1].item()


@pytest.mark.parametrize("size", [2, 3])
def test_a_wish_is_read_beside_a_drift_and_lost_beside_a_fault(size):
    drift, _ = reduced(size, lambda r: stats(wishes=r == 0), lambda r: call(tracker=r))
    fault, _ = reduced(size, lambda r: stats(wishes=r == 0), faulted={1})

    assert unpack(drift, False, size).flags.tolist() == [1.0, 1.0, 0.0, 1.0]
    assert unpack(fault, False, size).flags.tolist() == [1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6, 16, 129])
def test_weights_are_small_never_zero_and_sum_to_zero(size):
    for step in range(200):
        weights = [weight(step, rank, size) for rank in range(size)]

        assert sum(weights) == 0
        assert all(0 < abs(w) <= 509 for w in weights)


@settings(deadline=None, max_examples=50)
@given(
    size=st.integers(2, 40),
    step=st.integers(0, 10**6),
    order=st.randoms(use_true_random=False),
    data=st.data(),
)
def test_word_0_is_exact_in_every_order_of_summation(size, step, order, data):
    prints = data.draw(st.lists(st.integers(1, 1022), min_size=size, max_size=size))
    units = units_of(size)
    terms = [weight(step, r, size) * prints[r] * units.call + units.wish + 1 for r in range(size)]
    shuffled = list(terms)
    order.shuffle(shuffled)

    assert math.fsum(terms) == sum(map(float, shuffled)) == sum(terms)


def test_the_largest_group_fits_an_exact_float64():
    """No partial sum over any subset of ranks leaves the integers that float64 holds exactly."""
    wish, call = units_of(MAX_RANKS)
    counts = MAX_RANKS + wish
    largest_positive_part = MAX_RANKS // 2 * 509 * 1022 * call + counts

    assert counts < call
    assert largest_positive_part < 2**53


CHANGES = {
    "num_updates": {"num_updates": 6},
    "method": {"method": "clip_grad_norm_"},
    "ordinal": {"ordinal": 1},
    "scaler": {"scaler": 1},
    "max_norm": {"max_norm": 1.0},
    "policy": {"policy": "ConstantScale()"},
    "scale": {"scale": 32768.0, "stamp": 65536.0},
    "tracker": {"tracker": 4},
    "hysteresis": {"hysteresis": 2},
    "stamp": {"stamp": 32768.0},
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize(("size", "odd"), [(2, {1}), (3, {1}), (4, {0, 2}), (5, {4})])
def test_a_rank_whose_call_differs_is_seen_by_all_from_the_words_alone(what, size, odd):
    def mine(rank, step):
        changed = call(**CHANGES[what]) if rank in odd else call()
        return changed if what == "num_updates" else changed._replace(num_updates=step)

    seen = 0
    for step in range(300):
        words, _ = reduced(size, lambda r: stats(), functools.partial(mine, step=step))
        result = unpack(words, False, size)
        seen += int(result.drifted.item())
        assert result.verdict.found_inf.item() == result.drifted.item()

    # A miss has probability 1/1022 from the hash plus at most 1/170 from the weights of several odd
    # ranks: 3 % of 300 steps is beyond five standard deviations of either.
    assert seen >= 291


def test_two_of_four_ranks_that_drifted_alike_are_seen():
    misses = 0
    for step in range(2000):
        words, _ = reduced(
            4,
            lambda r: stats(),
            lambda r, step=step: call(tracker=9 if r < 2 else 3, num_updates=step),
        )
        misses += 1 - int(unpack(words, False, 4).drifted.item())

    # Neighbouring ranks cancel with probability 1/170 + 1/1022, so 14 of 2000 are expected.
    assert misses < 2000 * 0.01 + 15


def test_previous_verdict_is_part_of_the_fingerprint():
    words = [torch.tensor([0.0, x], dtype=torch.float64) for x in (1.0, 1.0 + 2e-16)]
    before = [unpack(each, True, 2) for each in words]
    words, _ = reduced(2, lambda r: stats(), previous_of=lambda r: before[r])

    assert unpack(words, False, 2).drifted.item() == 1.0


@pytest.mark.parametrize("size", [2, 3, 4, 7])
def test_a_buffer_that_was_never_reduced_reads_as_disagreement(size):
    _, parts = reduced(size, lambda r: stats())

    for part in parts:
        result = unpack(part, False, size)
        assert result.drifted.item() == 1.0
        assert result.verdict.found_inf.item() == 1.0


@pytest.mark.parametrize("faulted", [{0}, {1}, {0, 2}])
def test_a_rank_that_cannot_judge_makes_every_rank_skip(faulted):
    words, _ = reduced(3, lambda r: stats(sum_squares=math.inf), faulted=faulted)
    result = unpack(words, True, 3)

    assert result.faulted.item() == 1.0
    assert result.drifted.item() == 0.0
    assert result.verdict.found_inf.item() == 1.0


@pytest.mark.parametrize("faulted", [{0}, {1, 2}, {0, 1, 2}])
def test_a_fault_of_all_ranks_is_told_from_a_fault_of_some(faulted):
    """A mistake in the program they share is no disagreement; each raises its own error."""
    words, _ = reduced(3, lambda r: stats(sum_squares=1e-300), faulted=faulted)
    result = unpack(words, False, 3)

    assert result.faulted.item() == (len(faulted) < 3)
    assert result.found_inf.item() == 1.0


def test_drift_stands_until_the_state_is_replaced_and_a_fault_does_not():
    drift, _ = reduced(2, lambda r: stats(), lambda r: call(tracker=r))
    fault, _ = reduced(2, lambda r: stats(), faulted={1})
    good, _ = reduced(2, lambda r: stats())

    after_drift = unpack(good, False, 2, unpack(drift, False, 2))
    after_fault = unpack(good, False, 2, unpack(fault, False, 2))

    assert (after_drift.drifted.item(), after_drift.verdict.found_inf.item()) == (1.0, 1.0)
    assert (after_fault.faulted.item(), after_fault.verdict.found_inf.item()) == (0.0, 0.0)


def test_norm_is_the_root_of_the_summed_squares():
    words, _ = reduced(3, lambda r: stats(sum_squares=[9.0, 16.0, 0.0][r]))
    result = unpack(words, True, 3)

    assert result.verdict.grad_norm.item() == 5.0
    assert result.verdict.found_inf.item() == 0.0


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_norm_that_is_not_finite_counts_as_found_and_comes_back_as_it_is(bad):
    words, _ = reduced(3, lambda r: stats(sum_squares=bad if r == 1 else 1.0))
    result = unpack(words, True, 3)

    assert result.verdict.found_inf.item() == 1.0
    assert str(result.verdict.grad_norm.item()) == str(bad)
    assert clip_coefficient(result, 1.0).item() == 1.0


def test_finite_gradients_have_a_finite_norm():
    """Two float32 values of 3e38 have the norm 4.2e38, which float32 cannot hold."""
    words, _ = reduced(2, lambda r: stats(sum_squares=9e76))
    result = unpack(words, True, 2)

    assert result.verdict.found_inf.item() == 0.0
    assert result.verdict.grad_norm.item() == torch.finfo(torch.float32).max
    # 1 / (sqrt(1.8e77) + 1e-6), computed here by hand; float32 keeps 24 bits of it.
    assert clip_coefficient(result, 1.0).item() == pytest.approx(2.3570226e-39, rel=1e-5)


@pytest.mark.parametrize(
    ("norm", "max_norm", "expected"), [(10.0, 1.0, 0.1), (0.5, 1.0, 1.0), (3.0, math.inf, 1.0)]
)
def test_clip_coefficient_is_torchs(norm, max_norm, expected):
    result = alone(stats(sum_squares=norm**2))

    # float32 rounding of the coefficient, and torch's 1e-6 in the denominator.
    assert clip_coefficient(result, max_norm).item() == pytest.approx(expected, rel=1e-5)


def test_nan_payloads_do_not_enter_the_next_fingerprint():
    nans = torch.tensor([0x7FF8000000000000, -0x7FFFFFFFFFFFF], dtype=torch.int64)
    one, other = nans.view(torch.float64)
    first = unpack(torch.stack([one, one]), False, 2)
    second = unpack(torch.stack([other, other]), False, 2)

    assert one.isnan() and other.isnan()
    assert torch.equal(first.words.view(torch.int64), second.words.view(torch.int64))


def test_fingerprint_is_the_same_number_on_host_and_device(monkeypatch):
    """On an accelerator the words stay there and the arithmetic is done on int64 tensors."""
    made, before = call(), unpack(torch.tensor([2.0, 0.3], dtype=torch.float64), True, 2)
    host = fingerprint(made, before)
    monkeypatch.setattr("shardscale.verdict._is_on_host", lambda tensor: False)
    device = fingerprint(made, before)

    assert isinstance(host, int) and 1 <= host <= 1022
    assert isinstance(device, torch.Tensor) and device.dtype == torch.int64
    assert host == device.item()


# Of three ranks: none, one or all bad, none to all of them wishing, and all of it with a drift.
@pytest.mark.parametrize(
    "count", [0.0, 1.0, 3.0, 4.0, 5.0, 12.0, 15.0, 16.0, -5 * 16.0 + 2, 2.0**50 + 12, math.nan]
)
@pytest.mark.parametrize("squares", [0.0, -3.0, 25.0, 1e77, 1e90, math.inf, math.nan])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("before", [None, 0.0, 16.0])
def test_the_message_reads_alike_on_host_and_device(count, squares, normed, before, monkeypatch):
    """On an accelerator it is read by tensor operations, which the host's reading must equal."""
    message = torch.tensor([count, squares], dtype=torch.float64)
    earlier = torch.tensor([before or 0.0, 0.0], dtype=torch.float64)
    previous = None if before is None else unpack(earlier, False, 3)
    if squares < 0 and not math.isnan(count):
        return  # no such message
    host = unpack(message, normed, 3, previous)
    monkeypatch.setattr("shardscale.verdict._is_on_host", lambda tensor: False)
    device = unpack(message, normed, 3, previous)

    for mine, other in zip(host, device, strict=True):
        assert (mine.dtype, mine.shape) == (other.dtype, other.shape)
        assert mine.numpy().tobytes() == other.numpy().tobytes()


def test_all_ranks_read_the_same_bits_over_a_real_exchange():
    def rank_job(comm):
        previous, seen = None, []
        for step in range(5):
            mine = stats(float(comm.rank == 1 and step == 2), sum_squares=0.1 * (comm.rank + 1))
            previous = agree(mine, call(num_updates=step), comm, previous)
            seen.append((previous.verdict.found_inf.item(), previous.words.tolist()))
        return seen

    first, *others = run_ranks(rank_job, 3)

    assert [found for found, _ in first] == [0.0, 0.0, 1.0, 0.0, 0.0]
    assert all(other == first for other in others)


def test_a_different_max_norm_is_found_on_every_rank():
    def rank_job(comm):
        mine = call(method="clip_grad_norm_", max_norm=1.0 + (comm.rank == 1))
        return agree(stats(sum_squares=1.0), mine, comm)

    results = run_ranks(rank_job, 3)

    assert all(isinstance(r, Agreement) for r in results)
    assert [r.drifted.item() for r in results] == [1.0, 1.0, 1.0]


def test_a_rank_that_does_not_come_is_named():
    def rank_job(comm):
        if comm.rank == 1:
            return None
        return agree(stats(), call(), comm)

    results = run_ranks(rank_job, 3, timeout_s=0.5)

    assert all(isinstance(results[r], MissingRankError) for r in (0, 2))
    assert "Did not come: ranks [1]" in str(results[0])
