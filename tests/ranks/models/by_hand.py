"""Plain tensors, sharded by hand: every parameter cut into pieces, gathered for each forward."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

import shardscale
from tests.ranks.models.laid import Laid, Layout
from tests.ranks.models.net import batch, make_net

__all__ = ["LAYOUTS"]


class _HandSharded(nn.Module):
    def __init__(self, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        net = make_net(dtype)
        self.shapes = {name: p.shape for name, p in net.named_parameters()}
        self.shards = nn.ParameterDict()
        for name, p in net.named_parameters():
            mine = _pieces(p.detach().flatten(), size)[dist.get_rank()]
            self.shards[name.replace(".", "_")] = nn.Parameter(mine.clone())
        self.net = [net.requires_grad_(False)]  # in a list, so that it is no submodule

    def whole(self) -> dict[str, Tensor]:
        return {
            name: _Gather.apply(self.shards[name.replace(".", "_")], shape)
            for name, shape in self.shapes.items()
        }

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.net[0], self.whole(), (x,))


class _Gather(torch.autograd.Function):
    """Shards to the full tensor; backward sums over all ranks and keeps this rank's piece."""

    @staticmethod
    def forward(ctx, shard: Tensor, shape: torch.Size) -> Tensor:
        gathered: list[Tensor] = [torch.empty(0)] * dist.get_world_size()
        dist.all_gather_object(gathered, shard.detach())
        return torch.cat(gathered).view(shape)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.flatten().clone()
        dist.all_reduce(total)
        return _pieces(total, dist.get_world_size())[dist.get_rank()].clone(), None


def _pieces(flat: Tensor, size: int) -> list[Tensor]:
    """As ``torch.chunk``, filled up with empty pieces: of a bias of 3, rank 3 of 4 has nothing."""
    pieces = list(flat.chunk(size))
    return pieces + [flat[:0]] * (size - len(pieces))


def _hand_sharded(size: int, dtype: torch.dtype) -> Laid:
    model = _HandSharded(size, dtype)

    def backward(scaler, step: int) -> None:
        scaler.scale(model(batch(dist.get_rank(), step, dtype)).sum()).backward()

    def whole() -> dict[str, Tensor]:
        return {name: p.detach() for name, p in model.whole().items()}

    return Laid(model, backward, whole, size, shardscale.distinct)


LAYOUTS = {"hand-sharded": Layout(_hand_sharded, (2, 3, 4, 8))}
