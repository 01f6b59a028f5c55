"""Lightning's shape: a precision plugin runs the closure with the backward pass, then steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from tests.ranks.loops.trace import Trace

__all__ = ["train"]

MAX_NORM = 2.0


class MixedPrecision:
    """Unscales before the hooks of the user, unless the optimizer does so in its kernel."""

    def __init__(self, scaler) -> None:
        self.scaler = scaler

    def optimizer_step(
        self,
        optimizer: torch.optim.Optimizer,
        closure: Callable[[], Tensor],
        on_before_optimizer_step: Callable[[], None],
    ) -> Tensor:
        loss = closure()
        if not getattr(optimizer, "_step_supports_amp_scaling", False):
            self.scaler.unscale_(optimizer)
            on_before_optimizer_step()
        self.scaler.step(optimizer)
        self.scaler.update()
        return loss


def train(
    scaler_class: type,
    model: nn.Module,
    batches: Iterator[Tensor],
    num_steps: int,
    optimizer: torch.optim.Optimizer,
) -> Trace:
    """Automatic optimization; between two epochs of two steps the plugin's state is stored."""
    trace = Trace()

    def make_plugin() -> MixedPrecision:
        return MixedPrecision(scaler_class("cpu", init_scale=8.0, growth_interval=2))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(next(batches)).square().mean()
        plugin.scaler.scale(loss).backward()
        return loss.detach()

    def clip() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)

    plugin = make_plugin()
    for step in range(num_steps):
        loss = plugin.optimizer_step(optimizer, closure, clip)
        trace.note(loss, plugin.scaler.get_scale(), model.parameters())
        if step % 2:
            saved, plugin = plugin.scaler.state_dict(), make_plugin()
            plugin.scaler.load_state_dict(saved)
    return trace
