"""What one rank alone finds wrong with its gradients: it joins the others first, then raises."""

from __future__ import annotations

import pytest
import torch

from shardscale import ShardedGradScaler
from tests.ranks.rank import outcome


def two_iterations_with_a_gradient_that_cannot_be_judged(rank, size, fused):
    """In the first, the elements of one gradient share memory on rank 1: to unscale them in place
    would divide them twice. Each rank goes on as if it had caught its error."""
    p = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = torch.optim.SGD([p], lr=0.5, fused=fused)
    scaler = ShardedGradScaler("cpu", init_scale=4.0)
    errors, after = [], []
    for iteration in range(2):
        overlaps = rank == 1 and iteration == 0
        p.grad = torch.full((3,), 4.0).expand(2, 3) if overlaps else torch.full((2, 3), 4.0)
        scaler.scale(torch.ones(()))
        for name, call in {"step": lambda: scaler.step(optimizer), "update": scaler.update}.items():
            found = outcome(call)
            if found.error is not None:
                errors.append((iteration, name, found.error, found.message))
        after.append(p.flatten().tolist())
    return errors, after


def test_where_the_host_reads_the_verdict_all_ranks_raise_at_that_step(ranks):
    case = two_iterations_with_a_gradient_that_cannot_be_judged
    for rank, (errors, after) in enumerate(ranks.run(case, 3, fused=False)):
        assert after[0] == [1.0] * 6
        assert errors[0][:2] == (0, "step")
        assert_told(rank, *errors[0][2:])


def test_where_it_does_not_the_others_raise_at_the_next_update(ranks):
    case = two_iterations_with_a_gradient_that_cannot_be_judged
    for rank, (errors, after) in enumerate(ranks.run(case, 3, fused=True)):
        assert after[0] == [1.0] * 6
        places = [place[:2] for place in errors]
        assert places == ([(0, "step")] if rank == 1 else []) + [(1, "update")]
        assert_told(rank, *errors[-1][2:])


def overlap(params):
    params[1].grad = params[0].grad[4:]


def free(params):
    params[1].grad.untyped_storage().resize_(0)


BAD_MEMORY = {
    "shared": (overlap, "the gradients of whole and part share memory"),
    "freed": (free, "the gradient of part has elements, but no memory"),
}


def step_on_bad_memory(rank, size, how):
    """On rank 1 two gradients have an element in common, or one has lost its memory."""
    model = torch.nn.ParameterDict({"whole": torch.ones(5), "part": torch.ones(1)})
    params = [model["whole"], model["part"]]
    optimizer = torch.optim.SGD(params, lr=0.5)
    scaler = ShardedGradScaler("cpu", init_scale=4.0, model=model)
    for p in params:
        p.grad = torch.full_like(p, 4.0)
    if rank == 1:
        BAD_MEMORY[how][0](params)
    found = outcome(lambda: scaler.step(optimizer))
    return found.error, found.message, [p.tolist() for p in params]


@pytest.mark.parametrize("how", BAD_MEMORY)
def test_memory_that_is_shared_or_gone_is_an_error_on_every_rank(ranks, how):
    """Contract 52: by name where it is, and nothing moves."""
    for rank, (error, message, values) in enumerate(ranks.run(step_on_bad_memory, 3, how=how)):
        assert values == [[1.0] * 5, [1.0]]
        text = BAD_MEMORY[how][1]
        assert (error, text in message) == (
            "LayoutError" if rank == 1 else "DisagreementError",
            True,
        )


def assert_told(rank, error, message):
    if rank == 1:
        assert error == "LayoutError"
        assert "share memory" in message
    else:
        assert error == "DisagreementError"
        assert "rank 1 raised LayoutError" in message
