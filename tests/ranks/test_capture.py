"""An iteration replayed from a graph decides as one that Python runs, on every rank."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.distributed as dist

from shardscale import ShardedGradScaler, distinct, skip_on_device
from tests.ranks import accelerator
from tests.ranks.accelerator import NAME, TRANSPORT
from tests.ranks.graph import Graph
from tests.ranks.rank import outcome

SCALE = 8.0
INF, NAN = math.inf, math.nan
OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=0.5, momentum=0.5, fused=True),
    "AdamW": partial(torch.optim.AdamW, lr=0.5, fused=True),
    "gated RMSprop": lambda params: skip_on_device(
        torch.optim.RMSprop(params, lr=0.5, capturable=True)
    ),
}
HOW = ["step", "unscale_", "clip"]


class Job:
    """One rank's parameters, which a graph is made over; gradients are given in place."""

    def __init__(self, optimizer="SGD", how="step", group=None, **options):
        self.params = [torch.nn.Parameter(torch.ones(3, device=NAME)) for _ in range(2)]
        self.optimizer = OPTIMIZERS[optimizer](self.params)
        self.how = how
        self.max_norm = 1.0
        self.scaler = ShardedGradScaler(
            NAME, init_scale=SCALE, growth_interval=3, process_group=group, **options
        )
        self.scaler.attach(torch.nn.ParameterList(self.params), copies=distinct)
        for p in self.params:
            p.grad = torch.zeros_like(p)
        self.give(SCALE)
        self.iterate()  # a first one as usual: optimizers make their state

    def give(self, *values):
        """The gradients of the next iteration."""
        for p, value in zip(self.params, values * len(self.params), strict=False):
            with torch.no_grad():
                p.grad.fill_(value)

    def iterate(self):
        self.scaler.begin()
        norm = None
        if self.how == "unscale_":
            self.scaler.unscale_(self.optimizer)
        elif self.how == "clip":
            norm = self.scaler.clip_grad_norm_(self.optimizer, self.max_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return norm

    def state(self):
        """Everything that an iteration moves."""
        seen = [p.tolist() for p in self.params]
        for p in self.params:
            seen += [v.tolist() for v in self.optimizer.state[p].values()]
        state = self.scaler._state
        return [*seen, *(t.item() for t in state)]


def new_group():
    accelerator.install()
    return dist.new_group(backend=f"cpu:gloo,{NAME}:{TRANSPORT}")


# ------------------------------------------------------------------------------- as Python runs it

VALUES = [8.0, 8.0, INF, 4.0, NAN, 2.0, 2.0, 3.0, 1.0]


def replay_beside_eager(rank, size):
    """{(optimizer, how): the first iteration in which a replay differs, or None; the scales}."""
    group = new_group()
    return {
        (optimizer, how): compare(rank, size, group, optimizer, how)
        for optimizer in OPTIMIZERS
        for how in HOW
    }


def compare(rank, size, group, optimizer, how):
    replayed, eager = (Job(optimizer, how, group) for _ in range(2))
    graph = Graph(replayed.iterate)
    scales = []
    for i, value in enumerate(VALUES):
        is_mine = i % size == rank or math.isfinite(value)  # one rank overflows
        for job in (replayed, eager):
            job.give(value if is_mine else 1.0)
        graph.replay()
        norm = eager.iterate()
        scales.append(eager.scaler.get_scale())
        if replayed.state() != eager.state():
            return i, scales, replayed.state(), eager.state()
        if norm is not None and repr(norm.item()) != repr(graph.result.item()):
            return i, norm.item(), graph.result.item()
    return None, scales


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_replay_moves_what_an_iteration_moves_bit_for_bit(ranks, size):
    """Parameters, optimizer state, scale and trackers; good steps, skips, growth and backoff."""
    for found in ranks.run(replay_beside_eager, size):
        for how, (first_difference, *seen) in found.items():
            assert first_difference is None, (how, seen)
            assert seen == [[8.0, 16.0, 8.0, 8.0, 4.0, 4.0, 4.0, 8.0, 8.0]], how


# ------------------------------------------------------------------------- between two replays


def meddle(rank, size, what, who):
    """Between two replays something is changed, in Python; what the next ones do."""
    job = Job(how="clip", group=new_group())
    if what == "tensor of max_norm":
        job.max_norm = torch.ones((), device=NAME)
    graph = Graph(job.iterate)
    job.give(SCALE)
    graph.replay()
    if rank in who:
        if what == "update(new_scale)":
            job.scaler.update(2.0)
        elif what == "tensor of max_norm":
            job.max_norm.fill_(0.5)
        elif what == "eager iteration":
            job.give(SCALE)
            job.iterate()
        elif what == "load_state_dict":
            job.scaler.load_state_dict(job.scaler.state_dict())
    scale = job.scaler.get_scale()
    before = job.params[0].tolist()
    job.give(scale)
    graph.replay()
    moved = job.params[0].tolist() != before
    norm = math.sqrt(6.0 * size)  # of ones on all ranks, before clipping
    seen = graph.result.item() == pytest.approx(norm, rel=1e-6)
    job.give(scale)
    told = outcome(lambda: (job.iterate(), job.iterate()))
    return moved, seen, scale, told.error, told.message


@pytest.mark.parametrize(
    ("what", "scale"),
    [
        ("update(new_scale)", 2.0),
        ("tensor of max_norm", 8.0),
        ("eager iteration", 16.0),
        ("load_state_dict", 8.0),
    ],
)
@pytest.mark.parametrize("size", [2, 3])
def test_what_all_ranks_change_between_replays_holds_in_the_next_one(ranks, size, what, scale):
    for found in ranks.run(meddle, size, what=what, who=range(size)):
        assert found == (True, True, scale, None, "")


@pytest.mark.parametrize("what", ["update(new_scale)", "tensor of max_norm", "load_state_dict"])
def test_what_one_rank_changes_stops_all_of_them(ranks, what):
    """No parameter moves in the replays from there on; the next iteration of Python's tells."""
    for moved, _, _, error, message in ranks.run(meddle, 3, what=what, who=[1]):
        assert not moved
        assert error == "DisagreementError", message


def clip_by_a_tensor(rank, size):
    job = Job(how="clip", group=new_group())
    job.max_norm = torch.ones((), device=NAME)
    graph = Graph(job.iterate)
    clipped = []
    for max_norm in (1.0, 0.25, 100.0, -1.0, NAN):
        job.max_norm.fill_(max_norm)
        before = job.params[0].tolist()
        job.give(job.scaler.get_scale())
        graph.replay()
        clipped.append((job.params[0].grad[0].item(), job.params[0].tolist() != before))
    return clipped


def test_a_maximum_norm_on_the_device_may_change_between_replays(ranks):
    """A rubbish one is a skip."""
    norm = math.sqrt(6.0 * 2)
    expected = [1.0 / norm, 0.25 / norm, 1.0, 1.0, 1.0]
    for clipped in ranks.run(clip_by_a_tensor, 2):
        values, moved = zip(*clipped, strict=True)
        assert values == pytest.approx(expected, rel=1e-5)
        assert moved == (True, True, True, False, False)


def drift_in_a_replay(rank, size):
    """Rank 1's scale is another one in the third replay, and not in those after it."""
    job = Job(group=new_group())
    graph = Graph(job.iterate)
    moved = []
    for i in range(6):
        if rank == 1 and i in (2, 3):
            job.scaler._scale.mul_(2.0 if i == 2 else 0.5)
        before = job.params[0].tolist()
        job.give(SCALE)
        graph.replay()
        moved.append(job.params[0].tolist() != before)
    found = outcome(lambda: (job.iterate(), job.iterate()))
    return moved, found.error, found.message


def test_ranks_that_drift_apart_during_replays_stop_together_for_good(ranks):
    for moved, error, message in ranks.run(drift_in_a_replay, 3):
        assert moved == [True, True, False, False, False, False]
        assert error == "DisagreementError"
        assert "they drifted apart before" in message


def replay_once_more(rank, size):
    """Rank 1 replays an iteration that the others run themselves; then all run theirs."""
    job = Job(group=new_group())
    graph = Graph(job.iterate)
    job.give(SCALE)
    graph.replay()
    job.give(SCALE)
    if rank == 1:
        graph.replay()
    else:
        job.iterate()
    after_it = job.params[0].tolist()
    job.give(job.scaler.get_scale())
    found = outcome(lambda: (job.iterate(), job.iterate()))
    return after_it, job.params[0].tolist(), found.error, found.message


def test_ranks_replay_together_or_not_at_all(ranks):
    """The same iteration twice, once each way, is one; but from then on their counts differ."""
    for found in (told := ranks.run(replay_once_more, 3)):
        after_it, in_the_end, error, message = found
        assert after_it == in_the_end == told[0][0]
        assert error == "DisagreementError"
        assert "updates by replays of a graph: 1 on ranks 0, 2, 2 on rank 1" in message


# ------------------------------------------------------------------------------ what the host sees


def look_after_replays(rank, size):
    job = Job(group=new_group())
    graph = Graph(job.iterate)
    early = job.scaler.last_report()
    job.give(SCALE)
    graph.replay()
    job.give(INF if rank == 0 else SCALE)
    graph.replay()
    report, saved = job.scaler.last_report(), job.scaler.state_dict()
    job.give(job.scaler.get_scale())
    with accelerator.counted_waits() as waits:
        graph.replay()
        job.iterate()
    resumed = ShardedGradScaler(NAME, process_group=None)
    resumed.load_state_dict(saved)
    return early, report, saved, waits, resumed.state_dict() == saved


def test_counts_and_reports_know_of_replays(ranks):
    for early, report, saved, waits, same in ranks.run(look_after_replays, 2):
        assert early is None or early.step == 0
        assert report[:4] == (2, 8.0, 4.0, True)
        assert saved["scale"] == 4.0
        ours = dict(saved["shardscale"])
        assert (ours["num_updates"], ours["num_skipped"]) == (3, 1)
        assert waits == [0]
        assert same


# -------------------------------------------------------------------------- what cannot be captured


def try_to_capture(rank, size):
    """{what: the error of a capture, or of what comes after it}."""
    group = new_group()
    told = {}

    def attempt(what, iteration, then=lambda: None):
        told[what] = outcome(lambda: (Graph(iteration), then()))[1:]

    cold = Job.__new__(Job)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Job, "iterate", lambda self: None)
        cold.__init__(group=group)
    attempt("cold", cold.iterate)

    started = Job(how="step", group=group)
    started.scaler.unscale_(started.optimizer)
    attempt("started outside", lambda: started.scaler.step(started.optimizer))

    finished = Job(group=group)
    attempt(
        "finished outside", lambda: finished.scaler.step(finished.optimizer), finished.scaler.update
    )

    plain = Job(group=group)
    plain.optimizer = torch.optim.RMSprop(plain.params, capturable=True)
    attempt("host decides", plain.iterate)

    eager = Job(group=group, sync=True)
    attempt("sync", eager.iterate)

    begun = Job(group=group)
    begun.scaler.begin()
    begun.scaler.step(begun.optimizer)
    begun.scaler.update()
    own = torch.nn.Parameter(torch.ones(3, device=NAME))
    own.grad = torch.zeros_like(own)
    late = torch.optim.SGD([own], lr=0.5, fused=True)
    attempt("begun outside", lambda: (begun.scaler.step(late), begun.scaler.update()))

    setting = Job(group=group)

    def set_scale():
        setting.scaler.step(setting.optimizer)
        setting.scaler.update(4.0)

    attempt("new scale", set_scale)
    return told


REASONS = {
    "cold": "no iteration of it is over yet on this device",
    "started outside": "a verdict of this iteration was made outside",
    "finished outside": "the calls that belong to it come outside",
    "host decides": "the host has to read its verdict. Make the optimizers with fused=True",
    "sync": "with sync=True the host reads every verdict",
    "begun outside": "this iteration began before an update outside of the graph",
    "new scale": r"update(new_scale) cannot be captured. Call it between two replays",
}


@pytest.mark.parametrize("size", [1, 2])
def test_what_cannot_be_captured_is_refused_with_the_reason(ranks, size):
    for told in ranks.run(try_to_capture, size):
        assert told.keys() == REASONS.keys()
        for what, (error, _, message) in told.items():
            assert error == "StageError", (what, error, message)
            assert REASONS[what] in message, (what, message)
