"""The examples do what they say: same losses and norms as one process, one step skipped by all."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable

import pytest
import torch

from tests.examples.play import EXAMPLES, NAMES, SIZES, Printed, play, read, refusals
from tests.examples.tables import LAYOUTS, PATTERNS, RANKS, excerpts, outputs, shown, with_blocks

ROOT = EXAMPLES.parent
SKIPS_THE_THIRD = ["stepped", "stepped", "skipped", "stepped", "stepped"]
OTHERS = {
    "gan": {"critic": (10, 2.0**15)},
    "actor_critic": {"critic": (5, 2.0**15)},
    "frozen_phases": {"backbone": (2, 2.0**15)},
    "two_scalers": {"student": (5, 2.0**16)},
}
"""Steps taken by what does not overflow, or is not trained from the start, and its scale."""
ROUNDING = 1e-3
"""Relative: float16 carries eleven bits, and a rounding of 2^-12 in each of many terms averages
out. The smallest parameter that could be counted twice unnoticed is 0.2 % of the squared norm."""


@pytest.fixture(scope="module")
def printed(ranks) -> Callable[[str, int], Printed]:
    """What an example printed on so many ranks; each is run once."""
    known: dict[tuple[str, int], Printed] = {}

    def get(name: str, size: int) -> Printed:
        if (name, size) not in known:
            known[name, size] = play(ranks, name, size)
        return known[name, size]

    return get


@pytest.mark.parametrize("size", [2, RANKS])
@pytest.mark.parametrize("name", NAMES)
def test_every_rank_takes_four_steps_and_skips_one(printed, name, size):
    found = printed(name, size)
    assert found.outcomes == SKIPS_THE_THIRD
    assert found.ranks == [(4, 2.0**15)] * size
    assert not math.isfinite(found.norms[2])
    assert found.losses[-1] < found.losses[0]
    others = {other: [end] * size for other, end in OTHERS.get(name, {}).items()}
    assert found.others == others


@pytest.mark.parametrize("size", [2, RANKS])
@pytest.mark.parametrize("name", NAMES)
def test_losses_and_norms_are_those_of_one_process(printed, name, size):
    """One rank holds the whole model and sees the whole batch: nothing there is counted twice."""
    found, alone = printed(name, size), printed(name, 1)
    assert alone.ranks == [(4, 2.0**15)]
    for step, outcome in enumerate(SKIPS_THE_THIRD):
        if outcome == "stepped":
            assert found.losses[step] == pytest.approx(alone.losses[step], rel=ROUNDING)
            assert found.norms[step] == pytest.approx(alone.norms[step], rel=ROUNDING)


def test_a_number_of_ranks_that_cannot_work_is_refused(ranks):
    some = {name: sizes for name, sizes in SIZES.items() if sizes != "1 to 8"}
    expected = {name: f"run this on {sizes} ranks, not 3" for name, sizes in some.items()}
    assert refusals(ranks, sorted(some), 3) == expected


@pytest.mark.parametrize("name", [name for name in NAMES if SIZES[name] == "1 to 8"])
def test_any_other_number_of_ranks_works(printed, name):
    """The parts of the batch are not all of one size, so the norms are not those of one process."""
    found = printed(name, 3)
    assert found.outcomes == SKIPS_THE_THIRD
    assert found.ranks == [(4, 2.0**15)] * 3
    assert [math.isfinite(loss) for loss in found.losses] == [True, True, False, True, True]


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short_and_says_where_it_runs(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 90
    assert SIZES[name] in ("1, 2 or 4", "1, 2, 4 or 8", "1 to 8")


def test_a_page_shows_each_example():
    layouts = [name for name, _ in shown(LAYOUTS.read_text(), "table")]
    assert sorted([*layouts, *outputs(PATTERNS.read_text())]) == NAMES


def test_the_page_of_layouts_shows_their_tables(printed):
    """After a change of `describe()`: python -m tests.examples.tables."""
    page = LAYOUTS.read_text()
    tables = {name: printed(name, RANKS).table for name, _ in shown(page, "table")}
    assert with_blocks(page, "table", tables) == page


@pytest.mark.parametrize("name", outputs(PATTERNS.read_text()))
def test_the_page_of_patterns_shows_what_they_print(printed, name):
    """But for float16, which is not rounded alike on all machines."""
    on_page, found = read(outputs(PATTERNS.read_text())[name] + "\n"), printed(name, RANKS)
    for numbers, theirs in ((found.losses, on_page.losses), (found.norms, on_page.norms)):
        assert numbers == pytest.approx(theirs, rel=ROUNDING, nan_ok=True)
    assert (found.outcomes, found.ranks, found.others) == on_page[2:5]


def test_the_page_of_patterns_shows_lines_that_are_there():
    found = excerpts(PATTERNS.read_text())
    assert {name for name, _ in found} == set(outputs(PATTERNS.read_text()))
    for name, lines in found:
        program = textwrap.dedent((EXAMPLES / f"{name}.py").read_text())
        indents = [" " * (4 * depth) for depth in range(4)]
        assert any(textwrap.indent(lines, indent) in program for indent in indents), (name, lines)


def torchrun(name: str, num_ranks: int) -> Printed:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    done = subprocess.run(
        [*start, str(num_ranks), f"examples/{name}.py"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return read(done.stdout)


def test_torchrun_starts_them(printed):
    """One of them, because starting takes longest; the others differ in what `main` does."""
    found, forked = torchrun("fsdp2", 2), printed("fsdp2", RANKS)
    assert found.outcomes == SKIPS_THE_THIRD
    assert found.ranks == [(4, 2.0**15)] * 2
    assert found.losses == pytest.approx(forked.losses, rel=ROUNDING, nan_ok=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
@pytest.mark.parametrize("name", NAMES)
def test_they_train_on_gpus(printed, name):
    """On 4, 2 or 1 of them, over NCCL; the norms of float16 are those of the CPU."""
    num_ranks = max(n for n in (1, 2, 4) if n <= torch.cuda.device_count())
    found, alone = torchrun(name, num_ranks), printed(name, 1)
    assert found.outcomes == SKIPS_THE_THIRD
    assert found.ranks == [(4, 2.0**15)] * num_ranks
    assert found.norms[0] == pytest.approx(alone.norms[0], rel=5 * ROUNDING)
