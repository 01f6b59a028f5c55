"""One call from end to end, where the rest of the suite does not look."""

from __future__ import annotations

import torch

from shardscale import ShardedGradScaler


def test_gradients_of_a_kept_graph_are_unscaled_and_clipped():
    """With ``create_graph=True`` gradients require gradients, and autograd minds in-place work."""
    weight = torch.nn.Parameter(torch.full((3,), 2.0))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = ShardedGradScaler("cpu", init_scale=8.0)
    loss = scaler.scale(weight.square().sum())
    (weight.grad,) = torch.autograd.grad(loss, [weight], create_graph=True)
    assert weight.grad.requires_grad

    norm = scaler.clip_grad_norm_(optimizer, 1.0)
    scaler.step(optimizer)
    scaler.update()

    assert norm.item() == torch.tensor(48.0).sqrt().item()
    # Clipped to norm 1 in three equal parts; 1e-6 in the coefficient and float32 rounding.
    torch.testing.assert_close(weight.detach(), 2 - torch.full((3,), 3**-0.5), rtol=1e-6, atol=0)


def test_a_disabled_scaler_steps_whatever_can_step():
    class Anything:
        def step(self, by):
            return by + 1

    assert ShardedGradScaler("cpu", enabled=False).step(Anything(), by=2) == 3
