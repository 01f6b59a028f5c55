"""The message of a call that a graph repeats."""

from __future__ import annotations

import itertools

import torch

from shardscale.records import Call, ScaleState
from shardscale.verdict import fingerprint


def call(scale, num_replayed):
    state = ScaleState(
        torch.tensor(scale),
        torch.tensor(3, dtype=torch.int32),
        torch.tensor(1, dtype=torch.int32),
    )
    replayed = torch.tensor(num_replayed, dtype=torch.int64)
    return Call(5, "step", 0, 0, None, "DynamicScale()", state, state.scale, replayed)


def test_a_miss_is_not_repeated_by_the_next_replay():
    """Its multipliers are those of the capture, but the count of replays goes in as a factor.

    Of 8,000 scales some eight have by chance the fingerprint of 65536; the next replays have
    another one. Three alike in a row are a chance of one in 100,000.
    """
    scales = [float(s) for s in range(1, 8001)]
    missed = [
        scale
        for scale in scales
        if fingerprint(call(scale, 0), None) == fingerprint(call(65536.0, 0), None)
    ]
    assert missed
    for scale in missed:
        later = [
            fingerprint(call(scale, n), None) == fingerprint(call(65536.0, n), None) for n in (1, 2)
        ]
        assert not all(later)


def test_ranks_that_have_replayed_more_or_less_often_differ():
    prints = [int(fingerprint(call(65536.0, n), None)) for n in range(300)]
    repeats = sum(one == other for one, other in itertools.pairwise(prints))
    assert repeats <= 3  # 0.3 are to be expected
