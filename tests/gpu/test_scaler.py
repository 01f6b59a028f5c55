"""The scaler on a GPU: torch's bits, and no word to the host that is not asked for."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from shardscale import ShardedGradScaler, skip_on_device
from shardscale.verdict import MAX_RANKS, units_of, unpack

pytestmark = pytest.mark.gpu

NUM_STEPS = 6
BAD_STEP = 3


class NoStep(torch.optim.Optimizer):
    """Does nothing, so that every host read is the scaler's."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self):
        return "stepped"


@contextmanager
def host_reads_are(mode: str) -> Iterator[None]:
    """Within, an operation that makes the host wait for the GPU is an error, or a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def make_params(dtypes=(torch.float32,)):
    generator = torch.Generator().manual_seed(5)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to("cuda", dtype))
        for dtype in dtypes
        for shape in ((7, 3), (1,), (2**12,))
    ]


def give_grads(params, scale, step):
    for i, p in enumerate(params):
        generator = torch.Generator().manual_seed(100 * step + i)
        p.grad = torch.randn(p.shape, generator=generator).to("cuda", p.dtype) * scale
        if step == BAD_STEP and i == 1:
            p.grad.view(-1)[0] = math.inf


def train(scaler, optimizer, params, explicit=False):
    """The scale after each step; the parameters change in place."""
    scales = []
    for step in range(NUM_STEPS):
        scaler.scale(torch.ones((), device="cuda"))
        give_grads(params, scaler.get_scale(), step)
        if explicit:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


OPTIMIZERS = {
    "AdamW fused": lambda params: torch.optim.AdamW(params, lr=0.1, fused=True),
    "AdamW foreach": lambda params: torch.optim.AdamW(params, lr=0.1, foreach=True),
    "Adam fused": lambda params: torch.optim.Adam(params, lr=0.1, fused=True),
    "SGD fused": lambda params: torch.optim.SGD(params, lr=0.1, fused=True),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_process_is_torch_bit_for_bit(name, explicit):
    results = []
    for scaler_class in (torch.amp.GradScaler, ShardedGradScaler):
        params = make_params()
        scaler = scaler_class("cuda", init_scale=1024.0, growth_interval=2)
        scales = train(scaler, OPTIMIZERS[name](params), params, explicit)
        results.append((params, scales))
    (theirs, their_scales), (ours, our_scales) = results

    assert our_scales == their_scales
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine.detach().view(torch.int32), other.detach().view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_that_torch_refuses_or_rounds_are_unscaled(dtype):
    params = make_params((dtype,))
    for p in params:
        p.grad = torch.full_like(p, 8.0)
    scaler = ShardedGradScaler("cuda", init_scale=4.0)
    scaler.unscale_(NoStep(params))

    assert all(p.grad.eq(2.0).all() for p in params)


def calls_of(scaler, optimizer, how):
    if how == "unscale_":
        scaler.unscale_(optimizer)
    if how == "clip_grad_norm_":
        scaler.clip_grad_norm_(optimizer, 1.0)
    scaler.step(optimizer)


@pytest.mark.parametrize("how", ["step", "unscale_", "clip_grad_norm_"])
@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("bad", [False, True])
def test_a_fused_optimizer_makes_the_host_wait_for_nothing(how, dtypes, bad):
    """A step that is skipped makes it wait no more than a good one."""
    params = make_params(dtypes)
    optimizer = torch.optim.AdamW(params, fused=True)
    scaler = ShardedGradScaler("cuda", init_scale=1024.0)
    loss = torch.ones((), device="cuda")
    for iteration in range(3):
        give_grads(params, 1024.0, BAD_STEP if bad and iteration == 1 else 0)
        # The first iteration places the scale and the optimizer's state.
        with host_reads_are("default" if iteration == 0 else "error"):
            scaler.scale(loss)
            calls_of(scaler, optimizer, how)
            scaler.update()


GATED = {
    "RMSprop": lambda params: torch.optim.RMSprop(params, capturable=True),
    "NAdam": lambda params: torch.optim.NAdam(params, capturable=True),
    "AdamW loop": lambda params: torch.optim.AdamW(params, foreach=False, capturable=True),
    "SGD": lambda params: torch.optim.SGD(params, momentum=0.9),
}


@pytest.mark.parametrize("how", ["step", "unscale_", "clip_grad_norm_"])
@pytest.mark.parametrize("name", GATED)
def test_a_gated_optimizer_makes_it_wait_for_the_first_step_alone(name, how):
    """And it ends where one ends that the host skips."""
    ends = []
    for gate in (skip_on_device, lambda optimizer: optimizer):
        params = make_params()
        optimizer = gate(GATED[name](params))
        scaler = ShardedGradScaler("cuda", init_scale=1024.0)
        for step in range(NUM_STEPS):
            give_grads(params, 1024.0, step)
            waits = gate is not skip_on_device or step == 0
            with host_reads_are("default" if waits else "error"):
                scaler.scale(torch.ones((), device="cuda"))
                calls_of(scaler, optimizer, how)
                scaler.update()
        ends.append([p.detach() for p in params])

    for mine, other in zip(*ends, strict=True):
        assert torch.equal(mine.view(torch.int32), other.view(torch.int32))


@pytest.mark.parametrize("how", ["step", "unscale_", "clip_grad_norm_"])
def test_any_other_optimizer_makes_it_wait_once(how):
    params = make_params()
    optimizer = NoStep(params)
    scaler = ShardedGradScaler("cuda", init_scale=1024.0)
    loss = torch.ones((), device="cuda")
    for iteration in range(3):
        give_grads(params, 1024.0, 0)
        with warnings.catch_warnings(record=True) as caught, host_reads_are("warn"):
            warnings.simplefilter("always")
            scaler.scale(loss)
            calls_of(scaler, optimizer, how)
            scaler.update()
        waits = [str(w.message) for w in caught if "synchroniz" in str(w.message)]
        if iteration:
            assert len(waits) == 1, waits


def test_gradients_on_the_host_and_on_the_gpu_share_one_verdict():
    for bad_on in (None, "cpu", "cuda"):
        params = [torch.nn.Parameter(torch.ones(3, device=d)) for d in ("cpu", "cuda")]
        for p in params:
            p.grad = torch.full_like(p, math.inf if p.device.type == bad_on else 4.0)
        optimizer = torch.optim.SGD(params, lr=0.5, foreach=False)
        scaler = ShardedGradScaler("cuda", init_scale=4.0)
        scaler.step(optimizer)
        scaler.update()

        assert [p[0].item() for p in params] == ([0.5, 0.5] if bad_on is None else [1.0, 1.0])


def test_gradients_here_are_given_to_triton():
    """A warning, which is an error here, would say why not."""
    model = torch.nn.Linear(3, 2, device="cuda")
    table = ShardedGradScaler("cuda").attach(model).describe()

    assert [line.split()[-1] for line in table.splitlines()[1:]] == ["triton", "triton"]


def test_a_clip_is_folded_without_a_word_to_the_host():
    """It ends where clipping in place ends; of the bad step nothing is left."""
    ends = []
    for fold in (True, False):
        params = make_params()
        optimizer = torch.optim.AdamW(params, lr=0.1, fused=True)
        scaler = ShardedGradScaler("cuda", init_scale=1024.0, fold_clip=fold)
        for step in range(NUM_STEPS):
            give_grads(params, scaler.get_scale(), step)
            before = [p.grad.clone() for p in params]
            with host_reads_are("default" if step == 0 else "error"):
                scaler.scale(torch.ones((), device="cuda"))
                scaler.clip_grad_norm_(optimizer, 1.0)
                after = [p.grad.clone() for p in params]
                scaler.step(optimizer)
                scaler.update()
            assert not fold or all(map(torch.equal, before, after))
        ends.append(torch.cat([p.detach().flatten() for p in params]))

    # AdamW divides by the root of squares: an error of the factor comes through relatively.
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


def test_the_report_comes_one_iteration_late():
    params = make_params()
    optimizer = torch.optim.AdamW(params, fused=True)
    scaler = ShardedGradScaler("cuda", init_scale=1024.0)
    for step in (0, BAD_STEP, 0):
        give_grads(params, scaler.get_scale(), step)
        scaler.step(optimizer)
        scaler.update()

    report = scaler.last_report()
    assert (report.step, report.scale, report.next_scale, report.skipped) == (1, 1024, 512, True)


@pytest.mark.parametrize("optimizer", ["AdamW fused", "SGD fused"])
def test_a_wish_to_stop_is_heard_without_a_word_to_the_host(comm, optimizer):
    params = make_params()
    optimizer = OPTIMIZERS[optimizer](params)
    said, wishes = [], iter([False, False, True, False, False])
    scaler = ShardedGradScaler("cuda", init_scale=1024.0, comm=comm).listen(lambda: next(wishes))
    for step in range(5):
        give_grads(params, 1024.0, 0)
        with host_reads_are("default" if step == 0 else "error"):
            scaler.scale(torch.ones((), device="cuda"))
            scaler.step(optimizer)
            scaler.update()
            said.append(scaler.should_stop())

    assert said == [False, False, False, True, True]


@pytest.mark.parametrize("size", [1, 2, 3, 1_000, 3_259, 3_260, 16_384, 107_440, MAX_RANKS])
def test_a_message_is_read_alike_on_the_gpu_and_on_the_host(size):
    """The units of word 0 are no powers of two, so the remainder must be exact."""
    units = units_of(size)
    counts = torch.tensor([0, 1, size, units.wish, units.wish + 1, units.call - 1])
    largest = 2**53 // units.call - 1
    drawn = torch.randint(-largest, largest + 1, (50,), generator=torch.Generator().manual_seed(0))
    for drift in (0, 1, -1, largest, -largest, *drawn.tolist()):
        for total in (counts + drift * units.call).tolist():
            words = torch.tensor([total, 4.0], dtype=torch.float64)
            here, there = unpack(words, True, size), unpack(words.cuda(), True, size)
            assert [field.tolist() for field in there] == [field.tolist() for field in here]


CONSTRUCT = """
import torch, shardscale
scaler = shardscale.ShardedGradScaler()
assert scaler.is_enabled() and scaler.get_scale() == 65536.0
scaler.load_state_dict(scaler.state_dict())
assert not torch.cuda.is_initialized()
"""


def test_a_scaler_is_made_and_loaded_without_touching_the_gpu():
    """Else every rank would make a context on GPU 0 before it has chosen its own."""
    done = subprocess.run([sys.executable, "-c", CONSTRUCT], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
