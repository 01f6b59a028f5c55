"""A wish of one rank stops all ranks at the same step, and changes nothing else."""

from __future__ import annotations

import math
import os
import signal
from functools import partial

import pytest
import torch
import torch.distributed as dist

from shardscale import ShardedGradScaler, StopSignal, distinct
from tests.ranks import accelerator
from tests.ranks.accelerator import NAME, TRANSPORT
from tests.ranks.graph import Graph
from tests.ranks.rank import log, outcome, scratch
from tests.ranks.report import Signal

SCALE = 8.0
NUM = 6
SGD = partial(torch.optim.SGD, lr=0.5, momentum=0.5)
# What a rank has: one optimizer whose verdict is read at once, or late, or none, or both.
KINDS = {"plain": [False], "fused": [True], "none": [], "both": [False, True]}
MIXED = ("fused", "plain", "none", "both")


class Job:
    """One rank's optimizers, and a loop that all ranks run alike; a wish is made at one verdict."""

    def __init__(self, kind, device="cpu", **options):
        self.params = [torch.nn.Parameter(torch.ones(3, device=device)) for _ in KINDS[kind]]
        self.optimizers = [SGD([p], fused=f) for p, f in zip(self.params, KINDS[kind], strict=True)]
        self.scaler = ShardedGradScaler(device, init_scale=SCALE, growth_interval=2, **options)
        self.scaler.attach(torch.nn.ParameterList(self.params), copies=distinct)

    def iterate(self, how, value):
        self.scaler.begin()
        for p in self.params:
            p.grad = torch.full_like(p, value)
        norms = []
        if how in ("unscale_", "twice"):
            self.scaler.unscale_(self.optimizers)
        if how in ("clip", "twice"):
            norms.append(self.scaler.clip_grad_norm_(self.optimizers, 1.0).item())
        self.scaler.step(self.optimizers)
        self.scaler.update()
        return norms

    def state(self):
        return [p.tolist() for p in self.params], self.scaler.get_scale()


class Once:
    """A wish that is made when it is asked for the n-th time, and never again."""

    def __init__(self, at):
        self.at = at
        self.num_asked = 0

    def __call__(self):
        self.num_asked += 1
        return self.num_asked - 1 == self.at


def train(rank, size, kinds, how, wishes, bad_at=None, **options):
    """What rank's ``should_stop`` said after each update, and all that training came to.

    ``wishes``: for some ranks, at which of its verdicts each of them wishes.
    """
    job = Job(kinds[rank], **options)
    if rank in wishes:
        assert job.scaler.listen(Once(wishes[rank])) is job.scaler
    said, seen = [], []
    for i in range(NUM):
        is_bad = i == bad_at and rank == size - 1
        norms = job.iterate(how, math.inf if is_bad else 3.0 + rank + i)
        said.append(job.scaler.should_stop())
        seen.append((*job.state(), repr(norms)))
    return said, seen


def said_from(iteration):
    return [i >= iteration for i in range(NUM)]


@pytest.mark.parametrize("how", ["step", "unscale_", "clip", "twice"])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_all_ranks_stop_at_the_same_step_and_train_as_without_a_wish(ranks, how, size):
    """Contract 53: whichever optimizers they have, whether the step is skipped or not.

    The wish is made at one verdict only; where an iteration has two, at the first of them, which no
    optimizer remembers.
    """
    kinds = [MIXED[(rank + size) % 4] for rank in range(size)]
    verdicts = 2 if how == "twice" else 1
    for wisher, bad_at in ((0, None), (size - 1, 2)):
        run = partial(ranks.run, train, size, kinds=kinds, how=how, bad_at=bad_at)
        without = run(wishes={})
        wished = run(wishes={wisher: 2 * verdicts})

        assert [said for said, _ in without] == [[False] * NUM] * size
        assert [said for said, _ in wished] == [said_from(3)] * size
        assert [seen for _, seen in wished] == [seen for _, seen in without]


def test_with_clipping_left_to_the_step_they_stop_together_too(ranks):
    run = partial(ranks.run, train, 3, kinds=MIXED, how="clip", fold_clip=True)
    without, wished = run(wishes={}), run(wishes={1: 2})

    assert [said for said, _ in wished] == [said_from(3)] * 3
    assert [seen for _, seen in wished] == [seen for _, seen in without]


@pytest.mark.parametrize("wishes", [{0: 2, 2: 2}, {0: 4, 1: 2, 2: 3}])
def test_of_several_wishes_the_first_counts(ranks, wishes):
    for said, _ in ranks.run(train, 3, kinds=MIXED, how="step", wishes=wishes):
        assert said == said_from(3)


def test_who_reads_at_once_says_so_no_sooner(ranks):
    """With ``sync=True`` a rank knows each verdict when it is made."""
    for said, _ in ranks.run(train, 3, kinds=MIXED, how="step", wishes={0: 0}, sync=True):
        assert said == said_from(1)


def train_alone_first(rank, size):
    """Rank 0 wishes while there is no group yet; what all say alone, and then together."""
    job = Job(["fused", "plain", "both"][rank])
    job.scaler.listen(lambda: rank == 0)
    job.iterate("step", 3.0)
    alone = job.scaler.should_stop()
    job.scaler.listen(lambda: False)
    store = dist.FileStore(str(scratch() / "group"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    said = [job.scaler.should_stop()]
    for _ in range(3):
        job.iterate("step", 3.0)
        said.append(job.scaler.should_stop())
    return alone, said


def test_what_a_rank_wished_alone_does_not_stop_it_in_a_group_made_later(ranks):
    told = ranks.run(train_alone_first, 3, backend=None)

    assert told == [(True, [False] * 4), (False, [False] * 4), (False, [False] * 4)]


# ------------------------------------------------------------------------------- real signals


def train_until_told(rank, size, kinds):
    """Every rank listens to its own signals; the loop ends when it is told to."""
    stop = StopSignal()
    job = Job(kinds[rank])
    job.scaler.listen(stop)
    num = 0
    while not job.scaler.should_stop() and num < 20_000:
        job.iterate("step", 3.0)
        num += 1
        log("one more")
    return num, stop.received, job.state()[1]


def test_a_signal_to_one_rank_ends_the_loops_of_all_at_one_step(ranks):
    """Contract 53: sent from outside, whenever it arrives."""
    signals = [Signal(1, signal.SIGUSR2, after_lines=5)]
    reports = ranks.spawn(train_until_told, 3, kinds=MIXED, signals=signals)

    assert [report.error for report in reports] == [None] * 3
    nums, received, scales = zip(*(report.result for report in reports), strict=True)
    assert received == (False, True, False)
    assert len(set(nums)) == 1 and 5 <= nums[0] < 20_000
    assert len(set(scales)) == 1


def train_in_a_storm(rank, size, **how):
    """A thousand signals a second, each of which may interrupt a system call of the transport."""
    stop = StopSignal("ALRM")
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    said, seen = train(rank, size, **how)
    signal.setitimer(signal.ITIMER_REAL, 0.0)
    return said, seen, stop.received


def test_a_storm_of_signals_disturbs_no_verdict(ranks):
    how = {"kinds": MIXED, "how": "clip", "wishes": {}}
    for (said, seen), (*stormy, received) in zip(
        ranks.run(train, 3, **how), ranks.run(train_in_a_storm, 3, **how), strict=True
    ):
        assert received
        assert stormy == [said, seen]


def resume(rank, size, kinds):
    """A signal at one step, a state saved there, and what a loaded one says."""
    job = Job(kinds[rank])
    stop = StopSignal()
    job.scaler.listen(stop)
    for i in range(4):
        if rank == 0 and i == 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        job.iterate("step", 3.0)
    before = job.scaler.should_stop()
    stop.received = False  # as in the process that comes next
    job.scaler.load_state_dict(job.scaler.state_dict())
    after = [job.scaler.should_stop()]
    for _ in range(3):
        job.iterate("step", 3.0)
        after.append(job.scaler.should_stop())
    return before, after


def test_a_loaded_state_knows_nothing_of_earlier_wishes(ranks):
    assert ranks.run(resume, 3, kinds=MIXED) == [(True, [False] * 4)] * 3


# ---------------------------------------------------------------------------------- with faults


def raise_error():
    raise OSError("the stop file cannot be read")


def fail(rank, size, what, wishes):
    """In the third iteration rank 1 is at fault; where each rank hears of it, and how."""
    job = Job(MIXED[rank], timeout_s=5.0, sync=True)
    for i in range(5):
        at_fault = rank == 1 and i == 2
        if at_fault and what == "the wish":
            job.scaler.listen(raise_error)
        elif rank in wishes:
            job.scaler.listen(lambda: True)
        job.scaler.begin()
        for p in job.params:
            p.grad = torch.full_like(p, 3.0)
            if at_fault and what == "a layout":
                p.grad = torch.ones(1).expand(3)
        before = job.state()
        unscale_ = ("unscale_", lambda: job.scaler.unscale_(job.optimizers))
        clip = ("clip", lambda: job.scaler.clip_grad_norm_(job.optimizers, 1.0))
        step = ("step", lambda: job.scaler.step(job.optimizers))
        second = unscale_ if at_fault and what == "the order of calls" else clip
        for name, call in (unscale_, second, step, ("update", job.scaler.update)):
            found = outcome(call)
            if found.error is not None:
                return i, name, found.error, found.message, before == job.state()
    return None


DISAGREEMENT = "DisagreementError"


@pytest.mark.parametrize(
    ("what", "error"), [("a layout", "LayoutError"), ("the order of calls", "StageError")]
)
def test_a_fault_is_told_alike_with_a_wish_and_without(ranks, what, error):
    run = partial(ranks.run, fail, 3, what=what)
    without = run(wishes=[])

    assert [told[2] for told in without] == [DISAGREEMENT, error, DISAGREEMENT]
    assert run(wishes=[0, 2]) == without


def test_a_wish_that_raises_is_a_fault_of_its_rank(ranks):
    """It joins, so that nobody hangs and nothing moves; then it raises, and the others name it."""
    told = ranks.run(fail, 3, what="the wish", wishes=[0])

    assert [error for _, _, error, _, _ in told] == [DISAGREEMENT, "OSError", DISAGREEMENT]
    for iteration, name, _, message, still in told:
        assert (iteration, name, still) == (2, "unscale_", True)
        assert "the stop file cannot be read" in message
    assert "rank 1 raised OSError" in told[0][3]


# ----------------------------------------------------------------------------- on an accelerator


def train_on_the_device(rank, size):
    """What is said after each update, and how often the host waited for it all."""
    accelerator.install()
    group = dist.new_group(backend=f"cpu:gloo,{NAME}:{TRANSPORT}")
    job = Job("fused", NAME, process_group=group)
    job.iterate("step", 3.0)  # a first step makes momentum, for which torch's SGD has the host wait
    if rank == 1:
        job.scaler.listen(Once(1))
    said = []
    with accelerator.counted_waits() as waits:
        for _ in range(3):
            job.iterate("step", 3.0)
            said.append(job.scaler.should_stop())
    return said, waits


def test_on_a_device_no_host_waits_for_the_answer(ranks):
    assert ranks.run(train_on_the_device, 3) == [([False, False, True], [0])] * 3


def replay(rank, size):
    """A wish that is there while a graph is captured, and gone when it is replayed."""
    accelerator.install()
    group = dist.new_group(backend=f"cpu:gloo,{NAME}:{TRANSPORT}")
    job = Job("fused", NAME, process_group=group)
    job.iterate("step", 3.0)
    wish = Once(0)
    job.scaler.listen(wish)
    for p in job.params:
        p.grad = torch.full_like(p, 3.0)

    def iteration():
        job.scaler.begin()
        job.scaler.step(job.optimizers)
        job.scaler.update()

    graph = Graph(iteration)
    graph.replay()
    num_asked = wish.num_asked
    said = []
    for _ in range(3):
        job.iterate("step", 3.0)
        graph.replay()
        said.append(job.scaler.should_stop())
    return num_asked, wish.num_asked, said


def test_a_captured_verdict_carries_no_wish(ranks):
    """A replay would repeat it for ever. The next iteration of Python's asks, and it is heard."""
    assert ranks.run(replay, 2) == [(0, 3, [False, True, True])] * 2
