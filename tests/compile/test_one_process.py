"""A compiled training step: the bits of eager, few breaks, no recompilation."""

from __future__ import annotations

import collections
import math
import subprocess
import sys

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from shardscale import ShardedGradScaler
from tests.compile.step import (
    CALLS,
    OPTIMIZERS,
    inputs_of,
    net,
    new_scaler,
    operators,
    same_bits,
    train,
)

pytestmark = pytest.mark.filterwarnings("default")  # compilers warn of what they do themselves
EVERY = pytest.mark.parametrize("kind", OPTIMIZERS)
EACH_CALL = pytest.mark.parametrize("calls", CALLS)
Pair = collections.namedtuple("Pair", "first second")


@EVERY
@EACH_CALL
def test_a_compiled_step_has_the_bits_of_an_eager_one(kind, calls, inductor):
    """A skipped step and two growths among them."""
    eager = train(net(), kind, calls, None)
    compiled = train(net(), kind, calls, inductor)
    assert 8.0 not in eager.numbers[:16] and 32.0 in eager.numbers[:16]
    assert math.inf in eager.numbers[:16] or any(map(math.isnan, eager.numbers[:16]))
    assert len(compiled.graphs) == 1
    assert same_bits(compiled.numbers, eager.numbers)


@EVERY
@EACH_CALL
def test_a_step_breaks_less_often_than_with_torchs_scaler_and_is_compiled_once(kind, calls):
    ours = train(net(), kind, calls, "eager")
    theirs = train(net(), kind, calls, "eager", torch.amp.GradScaler)
    # backward, step, update, zero_grad; and the call in between
    assert ours.breaks == 4 + (calls != "step")
    assert ours.breaks < theirs.breaks
    assert len(ours.graphs) == 1 <= len(theirs.graphs)
    assert ours.late == 0


def test_the_bookkeeping_and_its_operators_are_in_no_graph():
    called = operators(train(net(), "foreach AdamW", "clip", "eager").graphs)
    assert called and not [name for name in called if "amp_" in name or "foreach" in name]


STRUCTURES = {
    "tensor": lambda loss: loss,
    "half": lambda loss: loss.half(),
    "list": lambda loss: [loss, loss + 1],
    "named tuple": lambda loss: Pair(loss, loss + 1),
    "nested dict": lambda loss: {"a": [loss, (loss,)], "b": loss + 1},
}


def leaves(outputs):
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    values = outputs.values() if isinstance(outputs, dict) else outputs
    return [leaf for value in values for leaf in leaves(value)]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_forward_loss_and_scale_are_one_graph_that_reads_the_scale(structure):
    """No break, no recompilation when the scale changes: it is an input, never a constant."""

    def run(compiles):
        model, scaler = net(), new_scaler()
        optimizer = OPTIMIZERS["loop SGD"](model.parameters())
        counter = CompileCounterWithBackend("eager")

        def forward(inputs):
            return scaler.scale(STRUCTURES[structure](model(inputs).square().mean()))

        if compiles:
            forward = torch.compile(forward, backend=counter, fullgraph=True)
        seen = []
        for i in range(8):
            outputs = forward(inputs_of(i))
            seen += [t.item() for t in leaves(outputs)] + [scaler.get_scale()]
            assert {t.dtype for t in leaves(outputs)} == {torch.float32}
            leaves(outputs)[0].backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return seen, type(outputs), counter.frame_count

    compiled, eager = run(True), run(False)
    assert same_bits(compiled[0], eager[0])
    assert compiled[1] is eager[1]
    assert compiled[2] == 1


def test_a_wrapped_loss_is_traced_and_its_gradient_has_the_scale_of_now(inductor):
    model, scaler = torch.nn.Linear(2, 1, bias=False), new_scaler()
    wrapped = scaler.wrap_loss(lambda outputs: outputs.sum())
    counter = CompileCounterWithBackend(inductor)
    compiled = torch.compile(lambda x: wrapped(model(x)), backend=counter, fullgraph=True)
    grads = []
    for new_scale in (4.0, 8.0, 2.0):
        scaler.update(new_scale)
        compiled(torch.ones(3, 2)).backward()
        grads.append(model.weight.grad.tolist())
        model.zero_grad()
    assert grads == [[[12.0, 12.0]], [[24.0, 24.0]], [[6.0, 6.0]]]
    assert counter.frame_count == 1

    # Compiled, the backward pass reads the scale where it lies; a change in between is not silent.
    loss = compiled(torch.ones(3, 2))
    scaler.update(64.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_of_a_compiled_scale_keep_its_stamp_across_an_update():
    """Two optimizers of one backward, an update after each: both are divided by the same scale."""

    def run(compiles):
        torch.manual_seed(0)
        model = torch.nn.Linear(2, 2)
        scaler = ShardedGradScaler("cpu", init_scale=16.0, growth_interval=1)
        first, second = (torch.optim.SGD([p], lr=0.5) for p in model.parameters())

        def forward(inputs):
            return scaler.scale(model(inputs).sum())

        if compiles:
            forward = torch.compile(forward, backend="eager", fullgraph=True)
        for _ in range(4):
            forward(torch.ones(1, 2)).backward()
            for optimizer in (first, second):
                scaler.step(optimizer)
                scaler.update()
            model.zero_grad()
        return [scaler.get_scale(), *(p.detach().clone() for p in model.parameters())]

    compiled = run(True)
    assert compiled[0] == 16.0 * 2**8  # grows in the middle of each iteration
    assert same_bits(compiled, run(False))


def test_what_a_step_reads_of_the_scaler_does_not_compile_it_again():
    model, scaler = net(), new_scaler()
    optimizer = OPTIMIZERS["fused AdamW"](model.parameters())
    counter = CompileCounterWithBackend("eager")

    @torch.compile(backend=counter)
    def step(inputs):
        scaler.scale(model(inputs).square().mean()).backward()
        scaler.step(optimizer)
        skips = scaler.verdict(optimizer).found_inf
        scaler.update()
        optimizer.zero_grad()
        return skips, scaler.get_scale(), scaler.last_report()

    seen, early = [], 0
    for i in range(8):
        skips, scale, report = step(inputs_of(i))
        seen.append((skips.item(), scale, report and report.step))
        early = counter.frame_count if i < 2 else early
    assert [s[0] for s in seen] == [0.0] * 5 + [1.0, 0.0, 0.0]
    assert [s[1] for s in seen] == [16.0, 32.0, 32.0, 64.0, 64.0, 32.0, 32.0, 64.0]
    assert [s[2] for s in seen] == [None, *range(7)]  # a fused step is read one iteration late
    assert counter.frame_count == early


@pytest.mark.parametrize("kind", ["foreach SGD", "foreach AdamW", "fused SGD", "fused AdamW"])
def test_an_optimizer_whose_step_is_compiled_steps_and_skips_as_under_torchs_scaler(kind, inductor):
    """Compiled, AdamW counts its steps in a tensor, so the reference is compiled as well."""
    found = {}
    for scaler_class in (torch.amp.GradScaler, ShardedGradScaler):
        torch._dynamo.reset()
        counters.clear()
        model, scaler = net(), new_scaler(scaler_class)
        optimizer = OPTIMIZERS[kind](model.parameters())
        optimizer.step = torch.compile(optimizer.step, backend=inductor)
        before = None
        for i in range(8):
            scaler.scale(model(inputs_of(i)).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            assert not hasattr(optimizer, "found_inf") and not hasattr(optimizer, "grad_scale")
            now = [p.detach().clone() for p in model.parameters()]
            assert before is None or same_bits(now, before) == (i == 5)
            before = now
        found[scaler_class] = [scaler.get_scale(), *before]
    assert same_bits(*found.values())


def test_importing_the_library_and_making_a_scaler_imports_no_compiler():
    program = (
        "import sys, shardscale; shardscale.ShardedGradScaler('cpu'); "
        "print('torch._dynamo' in sys.modules, 'torch._inductor' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == ["False", "False"]
