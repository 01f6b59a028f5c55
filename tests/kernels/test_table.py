"""The table of addresses: cut so that all is taken once, compared always, and never overrun."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardscale.errors import StageError
from shardscale.kernels.triton import table
from shardscale.kernels.triton.table import find_table, rows_of

CPU = torch.device("cpu")
SIZES = st.one_of(st.integers(1, 300), st.integers(1, 10**6), st.integers(2**31, 2**41))


@pytest.fixture(autouse=True)
def _empty_cache(monkeypatch):
    monkeypatch.setattr(table, "_tables", type(table._tables)())
    monkeypatch.setattr(table, "_captured", {})


def pieces(row, vector, shift):
    """The ranges of elements that a kernel makes of a segment, and where its vectors begin."""
    _, first, end, numel = row
    begin, end = min(first + shift, numel), min(end + shift, numel)
    length = (end - begin) // vector * vector
    head = begin if first == 0 else 0
    return [(0, head), (begin, begin + length), (begin + length, end)], begin


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    numels=st.lists(SIZES, min_size=1, max_size=40),
    itemsize=st.sampled_from([2, 4, 8]),
    most=st.integers(1, 3000),
    data=st.data(),
)
def test_every_element_is_taken_once_wherever_the_gradients_begin(numels, itemsize, most, data):
    vector = 16 // itemsize
    positions = np.arange(len(numels)) * 3 + 1
    rows, programs = rows_of(positions, np.array(numels, np.int64), itemsize, most)

    assert programs[0] == 0 and programs[-1] == len(rows)
    assert (np.diff(programs) > 0).all()
    shifts = [data.draw(st.integers(0, vector - 1)) for _ in numels]
    taken: dict[int, list[tuple[int, int]]] = {int(p): [] for p in positions}
    for row in rows.tolist():
        shift = shifts[(row[0] - 1) // 3]
        ranges, begin = pieces(row, vector, shift)
        assert (begin - shift) % vector == 0 or begin == row[3]
        assert all(b - a < 2**31 for a, b in ranges)
        taken[row[0]] += [(a, b) for a, b in ranges if a < b]
    for numel, ranges in zip(numels, taken.values(), strict=True):
        end = 0
        for a, b in sorted(ranges):
            assert a == end
            end = b
        assert end == numel


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    numels=st.lists(SIZES, min_size=1, max_size=40),
    itemsize=st.sampled_from([2, 4, 8]),
    most=st.integers(1, 3000),
)
def test_every_program_has_the_same_share(numels, itemsize, most):
    rows, programs = rows_of(np.arange(len(numels)), np.array(numels), itemsize, most)
    shares = np.add.reduceat((rows[:, 2] - rows[:, 1]) * itemsize, programs[:-1])
    cut = 256
    # A gradient's last cut may be shorter.
    most_segments = np.diff(programs).max()
    assert shares.max() - shares.min() <= cut * (most_segments + 1)
    assert len(rows) <= len(numels) + len(programs) - 2
    # Offsets within a segment are 32 bits long.
    assert (rows[:, 2] - rows[:, 1]).max() <= 2**30 + cut
    total = sum(numels) * itemsize
    assert len(programs) - 1 <= max(most, total // 2**30 + len(numels))


def test_small_lists_get_few_programs():
    _, programs = rows_of(np.arange(1), np.array([2048]), 4, 1000)
    assert len(programs) == 2
    _, programs = rows_of(np.arange(50), np.ones(50, np.int64), 4, 1000)
    assert len(programs) == 51


def test_a_table_is_found_again_and_changed_only_when_the_gradients_move():
    grads = [torch.ones(5), torch.ones(3, 4, dtype=torch.bfloat16)]
    first = find_table(grads, CPU)
    assert find_table(list(grads), CPU) is first
    moved = find_table([g.clone() for g in grads], CPU)
    assert moved is not first and moved.addresses is not first.addresses
    assert moved.parts is first.parts
    assert first.addresses.tolist() == [g.data_ptr() for g in grads]  # running kernels read it


def test_lists_of_one_shape_keep_their_own_tables():
    """Two networks alike take turns, and one of them is captured after the other has run."""
    lists = [[torch.ones(5), torch.ones(3, 4)] for _ in range(table._MOST_ALIKE + 1)]
    first = [find_table(grads, CPU) for grads in lists[:-1]]
    assert all(find_table(g, CPU) is one for g, one in zip(lists, first, strict=False))
    assert all(one.parts is first[0].parts for one in first)
    find_table(lists[-1], CPU)  # takes the place of the one used longest ago
    assert [
        find_table(grads, CPU) is one for grads, one in zip(lists[1:-1], first[1:], strict=True)
    ] == [True] * (table._MOST_ALIKE - 1)
    assert find_table(lists[0], CPU) is not first[0]
    assert first[0].addresses.tolist() == [g.data_ptr() for g in lists[0]]


@pytest.mark.parametrize(
    "other",
    [
        lambda g: g.view(torch.int32).view(torch.bfloat16)[:5],
        lambda g: g[:4],
        lambda g: torch.cat([g, g])[:5],
    ],
    ids=["dtype", "numel", "address"],
)
def test_an_address_alone_is_not_trusted(other):
    grad = torch.ones(5)
    one, two = find_table([grad], CPU), find_table([other(grad)], CPU)
    assert one is not two
    assert find_table([grad], CPU).addresses.tolist() == [grad.data_ptr()]


def test_tables_keep_no_gradient_alive():
    grad = torch.ones(5)
    find_table([grad], CPU)
    alive = weakref.ref(grad)
    del grad
    gc.collect()
    assert alive() is None


def test_the_least_recently_used_table_goes_first():
    grads = [torch.ones(i + 1) for i in range(table._MOST_TABLES + 1)]
    tables = [find_table([g], CPU) for g in grads[:-1]]
    assert find_table([grads[0]], CPU) is tables[0]
    find_table([grads[-1]], CPU)
    assert len(table._tables) == table._MOST_TABLES
    assert find_table([grads[0]], CPU) is tables[0]
    assert find_table([grads[1]], CPU) is not tables[1]


def test_a_capture_takes_only_what_an_iteration_has_found_before(monkeypatch):
    """And what it takes stays, whatever happens to the cache."""
    grads = [torch.ones(5), torch.ones(6)]
    known = find_table(grads, CPU)
    capturing = False
    monkeypatch.setattr(table, "_is_capturing", lambda device: capturing)

    capturing = True
    for unknown in ([g.clone() for g in grads], grads[:1]):
        with pytest.raises(StageError, match="Run one iteration as usual first"):
            find_table(unknown, CPU)
    assert find_table(grads, CPU) is known

    capturing = False
    moved = [g.clone() for g in grads]
    find_table(moved, CPU)
    assert known.addresses.tolist() == [g.data_ptr() for g in grads]  # a replay reads it
    table._tables.clear()
    capturing = True
    assert find_table(grads, CPU) is known
    with pytest.raises(StageError):
        find_table(moved, CPU)
