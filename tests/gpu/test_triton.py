"""The Triton kernels compiled: all their promises on a GPU, and what only a GPU has.

The promises are those that ``tests/kernels/grid.py`` runs in the interpreter.
"""

from __future__ import annotations

import math

import pytest
import torch

from shardscale.errors import StageError
from shardscale.kernels import triton as kernels
from shardscale.kernels.triton import table
from tests.gpu.test_scaler import host_reads_are
from tests.kernels.cases import *  # noqa: F403 - pytest finds tests by the names of a module
from tests.kernels.cases import DTYPES, assert_same, flag, zero

pytestmark = pytest.mark.gpu

NUMELS = [1, 5000, 4096, 0, 3]


@pytest.fixture
def device() -> str:
    return "cuda"


def make_grads(value: float = 3.0) -> list[torch.Tensor]:
    return [
        torch.full((n,), value + i, dtype=dtype, device="cuda")
        for i, n in enumerate(NUMELS)
        for dtype in DTYPES
    ]


class Iteration:
    """A call of each kernel over gradients that stay in place, and what it gives."""

    def __init__(self, grads):
        self.grads = grads
        self.inv_scale, self.factor = flag("cuda", 0.25), flag("cuda", 3.0)
        self.found = [flag("cuda"), flag("cuda")]
        self.squares = [zero("cuda"), zero("cuda")]

    def run(self):
        for tensor in (*self.found, *self.squares):
            tensor.zero_()
        kernels.check_(self.grads, self.inv_scale, self.found[0], self.squares[0])
        kernels.unscale_(self.grads, self.inv_scale, self.found[1], self.squares[1])
        kernels.scale_(self.grads, self.factor)

    def results(self):
        return [*self.grads, *self.found, *self.squares]

    def give(self, value):
        for grad in self.grads:
            grad.fill_(value)


def capture(iteration):
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        iteration.run()
    return graph


def test_a_replay_does_what_the_calls_do():
    """Also after the table has been sent anew for other gradients, and thrown out of the cache."""
    captured, eager = Iteration(make_grads()), Iteration(make_grads())
    captured.run()
    graph = capture(captured)
    for turn, value in enumerate((8.0, math.inf, 1.0, 2.0**-20, math.nan, 3e4)):
        for iteration in (captured, eager):
            iteration.give(value)
        graph.replay()
        eager.run()  # of the same sizes: takes the captured table's place
        for one, other in zip(captured.results(), eager.results(), strict=True):
            assert_same(one, other)
        if turn == 3:
            for i in range(2 * table._MOST_TABLES):
                kernels.scale_([torch.ones(i + 1, device="cuda")], flag("cuda", 0.5))


def test_two_graphs_keep_their_own_gradients():
    iterations = [Iteration(make_grads()) for _ in range(2)]
    graphs = []
    for iteration in iterations:
        iteration.run()
        graphs.append(capture(iteration))
    for iteration, value in zip(iterations, (8.0, 16.0), strict=True):
        iteration.give(value)
    for graph in graphs:
        graph.replay()
    for iteration, value in zip(iterations, (6.0, 12.0), strict=True):
        assert all((grad == value).all() for grad in iteration.grads)


def test_a_capture_of_gradients_that_no_iteration_has_found_is_refused():
    iteration = Iteration(make_grads())
    iteration.run()
    iteration.grads = [grad.clone() for grad in iteration.grads]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(StageError, match="Run one iteration as usual first"),
        torch.cuda.graph(graph),
    ):
        iteration.run()


@pytest.mark.parametrize("moves", [False, True])
def test_another_stream_waits_for_the_table(moves):
    """It is sent on a stream that is busy; a kernel that did not wait would read what was there.

    Also where it sends addresses of its own: the segments come from the other one.
    """
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for turn in range(5):
        numel = 5000 + turn + 100 * moves
        grads = [torch.full((numel,), 2.0, device="cuda") for _ in range(3)]
        others = [grad.clone() for grad in grads] if moves else grads
        found = [flag("cuda"), flag("cuda")]
        half = flag("cuda", 0.5)
        torch.cuda.synchronize()
        with torch.cuda.stream(streams[0]):
            torch.cuda._sleep(10**7)
            kernels.check_(grads, half, found[0])
        with torch.cuda.stream(streams[1]):
            kernels.unscale_(others, half, found[1])
        torch.cuda.synchronize()
        assert all((grad == 1.0).all() for grad in others)
        assert [f.item() for f in found] == [0.0, 0.0]


def test_tables_sent_in_a_row_do_not_overwrite_one_another():
    """Nothing has been copied yet when the third list is written, but for the host's waiting."""
    lists = [[torch.full((4096,), 2.0, device="cuda") for _ in range(50)] for _ in range(6)]
    half = flag("cuda", 0.5)
    torch.cuda.synchronize()
    torch.cuda._sleep(10**8)
    for grads in lists:
        kernels.scale_(grads, half)
    torch.cuda.synchronize()
    assert all((grad == 1.0).all() for grads in lists for grad in grads)


@pytest.mark.parametrize("moves", [False, True])
def test_the_host_waits_for_nothing(moves):
    iteration = Iteration(make_grads())
    iteration.run()
    kernels.count(iteration.grads)
    torch.cuda.synchronize()
    with host_reads_are("error"):
        for _ in range(2):
            if moves:
                iteration.grads = [grad.clone() for grad in iteration.grads]
            iteration.run()
            kernels.count(iteration.grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_than_2_to_the_31_elements(dtype):
    """Begins one element after a border, so that head, body and rest all have some."""
    numel = 2**31 + 4099
    memory = torch.ones(numel + 2, dtype=dtype, device="cuda")
    grad, squares, found = memory[1:-1], zero("cuda"), flag("cuda")
    kernels.unscale_([grad], flag("cuda", 0.5), found, squares)
    assert found.item() == 0.0
    assert squares.item() == numel / 4
    assert memory[0] == memory[-1] == 1.0
    assert grad.amin() == grad.amax() == 0.5
    for spot in (0, 2**31 - 1, 2**31, numel - 1):
        grad[spot] = math.nan
        kernels.check_([grad], flag("cuda", 0.5), found.zero_())
        assert found.item() == 1.0
        assert kernels.count([grad])[0, :2].tolist() == [0, 1]
        grad[spot] = 0.5
    del memory, grad
    torch.cuda.empty_cache()
