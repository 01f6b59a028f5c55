"""CUDA graphs of an iteration, with a real NCCL call inside: replays are iterations.

What several ranks do with replays is tested in ``tests/ranks/test_capture.py``, on a stand-in.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from shardscale import ShardedGradScaler, StageError, distinct, skip_on_device
from tests.gpu.test_scaler import host_reads_are

pytestmark = pytest.mark.gpu

SCALE = 8.0
VALUES = [8.0, 8.0, math.inf, 4.0, math.nan, 2.0, 2.0, 3.0, 1.0]
OPTIMIZERS = {
    "AdamW": partial(torch.optim.AdamW, lr=0.5, fused=True, capturable=True),
    "SGD": partial(torch.optim.SGD, lr=0.5, momentum=0.5, fused=True),
    "gated RMSprop": lambda params: skip_on_device(
        torch.optim.RMSprop(params, lr=0.5, capturable=True)
    ),
}


class Job:
    """Parameters whose gradients are given in place, and an iteration over them."""

    def __init__(self, comm, optimizer="AdamW", how="step", **options):
        self.params = [torch.nn.Parameter(torch.ones(n, device="cuda")) for n in (3, 4097)]
        self.optimizer = OPTIMIZERS[optimizer](self.params)
        self.how, self.max_norm = how, 1.0
        self.scaler = ShardedGradScaler(
            "cuda", init_scale=SCALE, growth_interval=3, comm=comm, **options
        )
        self.scaler.attach(torch.nn.ParameterList(self.params), copies=distinct)
        for p in self.params:
            p.grad = torch.zeros_like(p)
        self.give(SCALE)
        self.iterate()  # a first one as usual: optimizers make their state, NCCL its communicator

    def give(self, value):
        for p in self.params:
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

    def capture(self):
        """A graph of the iteration, and what its call returned."""
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # NCCL's watchdog asks for events from a thread of its own meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = self.iterate()
        return graph, result

    def state(self):
        seen = [p.detach().clone() for p in self.params]
        seen += [v.clone() for p in self.params for v in self.optimizer.state[p].values()]
        return [*seen, *(t.clone() for t in self.scaler._state)]


@pytest.mark.parametrize("how", ["step", "unscale_", "clip"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_replay_moves_what_an_iteration_moves_bit_for_bit(comm, name, how):
    replayed, eager = Job(comm, name, how), Job(comm, name, how)
    before = len(comm.devices)
    graph, norm = replayed.capture()
    assert comm.devices[before:] == ["cuda"]
    for value in VALUES:
        for job in (replayed, eager):
            job.give(value)
        graph.replay()
        expected = eager.iterate()
        for mine, other in zip(replayed.state(), eager.state(), strict=True):
            assert torch.equal(mine, other)
        if norm is not None:
            assert repr(norm.item()) == repr(expected.item())
    assert dict(replayed.scaler.state_dict()["shardscale"])["num_updates"] == len(VALUES) + 1
    assert replayed.scaler.state_dict() == eager.scaler.state_dict()


def test_a_scale_set_between_replays_holds_in_the_next_one(comm):
    job = Job(comm, how="unscale_")
    graph, _ = job.capture()
    job.give(SCALE)
    graph.replay()
    job.scaler.update(2.0)
    job.give(2.0)
    graph.replay()
    assert job.params[0].grad.tolist() == [1.0] * 3


def test_a_maximum_norm_on_the_device_may_change_between_replays(comm):
    job = Job(comm, how="clip")
    job.max_norm = torch.ones((), device="cuda")
    graph, norm = job.capture()
    for max_norm in (1.0, 0.25, 1e6):
        job.max_norm.fill_(max_norm)
        job.give(job.scaler.get_scale())
        graph.replay()
        expected = min(1.0, max_norm / math.sqrt(4100.0))
        assert norm.item() == pytest.approx(math.sqrt(4100.0), rel=1e-6)
        assert job.params[0].grad[0].item() == pytest.approx(expected, rel=1e-5)


def test_replays_make_the_host_wait_for_nothing(comm):
    job = Job(comm)
    graph, _ = job.capture()
    with host_reads_are("error"):
        for _ in range(3):
            graph.replay()
    assert job.scaler.last_report().step == 3


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_without_a_first_iteration_nothing_is_captured(comm, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Job, "iterate", lambda self: None)
        job = Job(comm)
    with pytest.raises(StageError, match="no iteration of it is over yet"):
        job.capture()
