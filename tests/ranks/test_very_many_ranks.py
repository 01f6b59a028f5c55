"""Verdicts of 256 to 16,384 ranks: every rank's real values, in one process."""

from __future__ import annotations

import functools
import math
from collections import Counter
from typing import NamedTuple

import pytest
import torch

import shardscale
from shardscale import DisagreementError, ShardedGradScaler
from shardscale.records import Call, ScaleState, ShardStats
from shardscale.verdict import pack, unpack
from tests.ranks.simulated import on_threads, summed

# --- The verdict alone: what each rank packs, an all-reduce over all ranks, what each reads. ------


class Scenario(NamedTuple):
    """Which ranks do not do what the others do; ranks are given for a size."""

    bad: tuple[int, ...] = ()
    wishing: tuple[int, ...] = ()
    odd: tuple[int, ...] = ()
    change: dict[str, object] = {}  # noqa: RUF012 - what the odd ranks' calls differ in
    faulted: tuple[int, ...] = ()
    is_reduced: bool = True


class Read(NamedTuple):
    """What the ranks read from the message, as counts of ranks: one entry where all agree."""

    bits: int  # how many different messages the ranks hold
    flags: Counter[tuple[bool, ...]]  # found, drifted, faulted, wished
    norm: float  # the first rank's


def scenarios(size: int) -> dict[str, Scenario]:
    first, middle, last, everyone = (0,), (size // 2,), (size - 1,), tuple(range(size))
    scale = torch.tensor(32768.0)
    return {
        "nobody": Scenario(),
        "first is bad": Scenario(bad=first),
        "middle is bad": Scenario(bad=middle),
        "last is bad": Scenario(bad=last),
        "all are bad": Scenario(bad=everyone),
        "first wishes to stop": Scenario(wishing=first),
        "all are bad and wish to stop": Scenario(bad=everyone, wishing=everyone),
        "one has another scale": Scenario(odd=middle, change={"stamp": scale}),
        "one has another max_norm": Scenario(odd=last, change={"max_norm": 2.0}),
        "one makes another call": Scenario(odd=first, change={"method": "step"}),
        "two drifted alike": Scenario(odd=(size // 3, size - 2), change={"stamp": scale}),
        "two neighbours drifted alike": Scenario(odd=(7, 8), change={"stamp": scale}),
        "half drifted alike": Scenario(odd=everyone[::2], change={"stamp": scale}),
        "one is bad and another drifted": Scenario(first, (), last, {"max_norm": 2.0}),
        "one is at fault": Scenario(faulted=middle),
        "one is at fault and others are bad": Scenario(bad=(1, 2), faulted=last),
        "all are at fault": Scenario(faulted=everyone),
        "nothing was reduced": Scenario(is_reduced=False),
    }


def judge_all(rank: int, size: int, num_ranks: int) -> dict[str, Read]:
    """All scenarios, one after the other; a case for one process."""
    call = a_call()
    good = [pack(stats_of(r), call, r, num_ranks) for r in range(num_ranks)]
    return {name: judge(s, call, good) for name, s in scenarios(num_ranks).items()}


def judge(scenario: Scenario, call: Call, good: list[torch.Tensor]) -> Read:
    size, messages = len(good), list(good)
    for r in {*scenario.bad, *scenario.wishing, *scenario.odd, *scenario.faulted}:
        mine = call._replace(**scenario.change) if r in scenario.odd else call
        stats = stats_of(r, r in scenario.bad)._replace(wishes=r in scenario.wishing)
        messages[r] = pack(stats, mine, r, size, faulted=r in scenario.faulted)
    held = summed(messages) if scenario.is_reduced else torch.stack(messages)
    # The same bits read the same, so each different message is read once.
    by_bits = Counter(row.tobytes() for row in held.numpy())
    flags: Counter[tuple[bool, ...]] = Counter()
    norms = []
    for bits, num_ranks in by_bits.items():
        words = torch.frombuffer(bytearray(bits), dtype=torch.float64)
        agreement = unpack(words, True, size)
        flags[tuple(map(bool, agreement.flags.tolist()))] += num_ranks
        norms.append(agreement.grad_norm.item())
    return Read(len(by_bits), flags, norms[0])


def a_call() -> Call:
    one = torch.tensor(1, dtype=torch.int32)
    state = ScaleState(torch.tensor(65536.0), one, one)
    return Call(5, "clip_grad_norm_", 0, 0, 1.0, "DynamicScale()", state, state.scale)


def stats_of(rank: int, is_bad: bool = False) -> ShardStats:
    return stats_with(squares(rank), is_bad)


@functools.cache  # making tensors would take longer than all the rest
def stats_with(sum_squares: float, is_bad: bool) -> ShardStats:
    return ShardStats(torch.tensor(float(is_bad)), torch.tensor(sum_squares, dtype=torch.float64))


def squares(rank: int) -> float:
    """Small integers, whose sum is exact in any order."""
    return rank % 7 + 1.0


@pytest.fixture(scope="module", params=[1_024, 16_384])
def read(request, ranks):
    size = request.param
    (found,) = ranks.run(judge_all, 1, backend=None, limit_s=100, num_ranks=size)
    return size, found


@pytest.mark.parametrize("name", scenarios(1_024))
def test_every_rank_reads_the_one_right_verdict(read, name):
    """The oracle is the definition: bad, drifted, at fault or wishing on any rank is so on all."""
    size, found = read
    scenario = scenarios(size)[name]
    if not scenario.is_reduced:
        assert found[name].flags == {(True, True, False, False): size}
        return
    is_stopped = bool(scenario.faulted)
    has_drifted = bool(scenario.odd)
    some_at_fault = is_stopped and len(scenario.faulted) < size
    is_found = bool(scenario.bad) or has_drifted or is_stopped
    norm = math.nan if is_stopped else math.sqrt(sum(map(squares, range(size))))

    assert found[name].bits == 1
    flags = (is_found, has_drifted, some_at_fault, bool(scenario.wishing))
    assert found[name].flags == {flags: size}
    assert found[name].norm == pytest.approx(norm, rel=1e-7, nan_ok=True)  # float32 rounding


# --- The real path: a scaler, an optimizer and a backward pass on each of so many threads. --------

MAX_NORM = 1.0
LR = 0.5


class Life(NamedTuple):
    """What one rank went through, iteration by iteration."""

    norms: tuple[float, ...]  # of every clip_grad_norm_
    scales: tuple[float, ...]
    moved: tuple[bool, ...]  # whether the parameter did
    error: str  # how the last iteration's began and ended


def train(rank: int, size: int, num_ranks: int) -> tuple[Counter[Life | str], float]:
    """How many ranks lived through what, and rank 0's parameter in the end; a case for one process.

    Four iterations: a good one, one that a single rank overflows in, a good one without clipping,
    and one in which a single rank clips by another norm.
    """
    params = [math.nan] * num_ranks
    overflowing, drifting = num_ranks // 2, num_ranks // 3

    def be_rank(comm) -> Life:
        param = torch.nn.Parameter(torch.zeros(()))
        optimizer = torch.optim.SGD([param], lr=LR)
        scaler = ShardedGradScaler("cpu", init_scale=4.0, comm=comm)
        scaler.attach(torch.nn.ParameterList([param]), copies=shardscale.distinct)
        norms, scales, moved, error = [], [], [], ""
        for iteration in range(4):
            before = param.item()
            overflows = iteration == 1 and comm.rank == overflowing
            drifts = iteration == 3 and comm.rank == drifting
            optimizer.zero_grad()
            scaler.scale(param * (math.inf if overflows else gradient(comm.rank))).backward()
            if iteration != 2:
                max_norm = 2 * MAX_NORM if drifts else MAX_NORM
                norms.append(scaler.clip_grad_norm_(optimizer, max_norm).item())
            try:
                scaler.step(optimizer)
                scaler.update()
            except DisagreementError as disagreement:
                error = str(disagreement).removeprefix(f"rank {comm.rank} ")
            scales.append(scaler.get_scale())
            moved.append(param.item() != before)
        params[comm.rank] = param.item()
        return Life(tuple(norms), tuple(scales), tuple(moved), error)

    outcomes = on_threads(be_rank, num_ranks)
    lives = Counter(each if isinstance(each, Life) else repr(each)[:500] for each in outcomes)
    return lives, params[0]


def gradient(rank: int) -> float:
    return rank % 5 + 1.0


@pytest.fixture(scope="module", params=[256, 1_024])
def trained(request, ranks):
    size = request.param
    ((lives, param),) = ranks.run(train, 1, backend=None, limit_s=100, num_ranks=size)
    return size, lives, param


def test_very_many_ranks_live_through_the_same_to_the_bit(trained):
    size, lives, _ = trained
    (life,) = lives

    assert isinstance(life, Life), life
    assert lives[life] == size


def test_all_of_very_many_ranks_skip_when_one_overflows(trained):
    _, (life,), _ = trained

    assert life.moved == (True, False, True, False)
    assert life.scales == (4.0, 2.0, 2.0, 2.0)


def test_the_norm_of_very_many_ranks_is_that_of_all_their_gradients(trained):
    size, (life,), param = trained
    norm = math.sqrt(sum(gradient(r) ** 2 for r in range(size)))

    good, bad, drifted = life.norms
    assert good == drifted == pytest.approx(norm, rel=1e-7)  # float32 rounding
    assert not math.isfinite(bad)
    # Rank 0 has the gradient 1: one step clipped, one not.
    assert param == pytest.approx(-LR * MAX_NORM / (norm + 1e-6) - LR, rel=1e-6)


def test_all_of_very_many_ranks_are_told_which_one_drifted(trained):
    size, (life,), _ = trained

    assert life.error.startswith(f"of {size}: the ranks disagree")
    assert f"{2 * MAX_NORM} on rank {size // 3}. Make" in life.error
