"""Expert parallelism: dense layers shared by all ranks, and experts that tokens travel to."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

import shardscale
from tests.ranks.models.laid import Laid, Layout, full, local
from tests.ranks.models.net import batch

__all__ = ["LAYOUTS", "Mixture", "experts_of", "reference_grads"]


class Mixture(nn.Module):
    """5 -> 7 -> 7 -> 3, where each token visits one expert in the middle; whole numbers."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.before = nn.Linear(5, 7)
        self.experts = Experts(num_experts)
        self.after = nn.Linear(7, 3)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randint(-1, 2, p.shape, generator=generator))

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        return self.after(self.experts(self.before(x).relu(), experts))


class Experts(nn.Module):
    """One matrix for each expert, stacked; all of them, or those of one rank of a group."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, 7, 7))
        self.group: dist.ProcessGroup | None = None
        self.may_rest = False
        """Whether the weight takes no part where no token came: its gradient is then None."""

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        order = experts.argsort(stable=True)
        tokens, experts = x[order], experts[order]
        if self.group is None:
            return self.visit(tokens, experts)[order.argsort()]
        num_ranks = self.group.size()
        owners = experts // (self.num_experts // num_ranks)
        counts = owners.bincount(minlength=num_ranks)
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts, group=self.group)
        there, back = arriving.tolist(), counts.tolist()
        ids = experts.new_empty(sum(there))
        dist.all_to_all_single(ids, experts, there, back, group=self.group)
        tokens = all_to_all_single_autograd(tokens, there, back, self.group)
        tokens = all_to_all_single_autograd(self.visit(tokens, ids), back, there, self.group)
        return tokens[order.argsort()]

    def visit(self, tokens: Tensor, experts: Tensor) -> Tensor:
        """Each token times the matrix of its expert."""
        if self.may_rest and not len(tokens):
            return tokens
        weight = self.weight.to_local() if isinstance(self.weight, DTensor) else self.weight
        return (tokens.unsqueeze(1) @ weight[experts % len(weight)]).squeeze(1)


def experts_of(index: int, step: int, num_experts: int) -> Tensor:
    """The expert that each of the four tokens of a batch visits; none the first one, at step 0."""
    generator = torch.Generator().manual_seed(100 * step + index)
    return torch.randint(int(step == 0), num_experts, (4,), generator=generator)


def reference_grads(model: Mixture, num_batches: int, step: int) -> dict[str, Tensor]:
    """Gradients of one process that holds all experts and sees all batches; left in ``model``."""
    model.zero_grad()
    for index in range(num_batches):
        experts = experts_of(index, step, model.experts.num_experts)
        model(batch(index, step), experts).sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def _lay(
    num_axes: int,
    spread: Callable[[Experts, DeviceMesh], Callable[..., object] | None],
    share: Callable[[Mixture], nn.Module],
) -> Callable[..., Laid]:
    """As many experts as ranks: each rank has its own, or on two axes two ranks have the same two.

    Args:
        num_axes: Of the experts' mesh.
        spread: Leaves each rank its experts; returns what the scaler must be told of copies.
        share: Wraps the dense layers, which are shared by all ranks.
    """

    def lay(size: int, dtype: torch.dtype) -> Laid:
        model = Mixture(size).to(dtype)
        mesh = init_device_mesh(
            "cpu", (num_axes, size // num_axes), mesh_dim_names=("replica", "ep")
        )
        model.experts.group = mesh["ep"].get_group()
        copies = spread(model.experts, mesh)
        wrapped = share(model)

        def backward(scaler, step: int) -> None:
            index = dist.get_rank()
            y = wrapped(batch(index, step, dtype), experts_of(index, step, size))
            scaler.scale(y.float().sum()).backward()

        def whole() -> dict[str, Tensor]:
            params = full(model)
            if not isinstance(model.experts.weight, DTensor):
                parts: list[Tensor] = [torch.empty(0)] * mesh["ep"].size()
                dist.all_gather_object(parts, params["experts.weight"], model.experts.group)
                params["experts.weight"] = torch.cat(parts)
            return params

        return Laid(wrapped, backward, whole, size, copies)

    return lay


def _own(experts: Experts, mesh: DeviceMesh) -> Callable[..., object]:
    """Plain tensors that nobody else holds."""
    mine = experts.weight.detach().chunk(mesh["ep"].size())[mesh["ep"].get_local_rank()]
    experts.weight = nn.Parameter(mine.clone())
    experts.may_rest = mesh["replica"].size() == 1
    return shardscale.distinct


def _copied(experts: Experts, mesh: DeviceMesh) -> Callable[..., object]:
    """Plain tensors of which a rank of the other axis holds a copy; summed by hand."""
    _own(experts, mesh)
    group = mesh["replica"].get_group()
    _sum_over(group, experts.weight)
    return lambda name, param: group if name == "experts.weight" else None


def _replicated(experts: Experts, mesh: DeviceMesh) -> None:
    """DTensors that know of the copies."""
    _own(experts, mesh)
    weight = DTensor.from_local(experts.weight.detach(), mesh, [Replicate(), Shard(0)])
    experts.weight = nn.Parameter(weight)
    _sum_over(mesh["replica"].get_group(), experts.weight)


def _sharded(experts: Experts, mesh: DeviceMesh) -> None:
    """DTensors cut along the other axis too."""
    _own(experts, mesh)
    weight = DTensor.from_local(experts.weight.detach(), mesh["ep"], [Shard(0)])
    experts.weight = nn.Parameter(weight)
    _shard_summing(experts, mesh["replica"])


def _sum_over(group: dist.ProcessGroup, weight: Tensor) -> None:
    weight.register_post_accumulate_grad_hook(
        lambda param: dist.all_reduce(local(param.grad), group=group)
    )


def _in_fsdp2(model: Mixture) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model.before, model.after):
        _shard_summing(layer, mesh)
    return model


def _shard_summing(layer: nn.Module, mesh: DeviceMesh) -> None:
    """FSDP2 whose gradients are sums over the ranks, as an expert's are over its tokens."""
    fully_shard(layer, mesh=mesh)
    layer.set_gradient_divide_factor(1.0)
    layer.set_force_sum_reduction_for_comms(True)  # Gloo knows no factors


def _in_ddp(model: Mixture) -> nn.Module:
    ignored = ["experts.weight"]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    wrapped = DistributedDataParallel(model)
    wrapped.register_comm_hook(None, _sum_bucket)
    return wrapped


def _sum_bucket(state, bucket):  # DDP refuses annotations that are strings
    """For DDP, which would average: a sum, as the experts' gradients are."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


LAYOUTS = {
    "EP": Layout(_lay(1, _own, _in_fsdp2), (2, 3, 4, 8)),
    "EP beside DDP": Layout(_lay(1, _own, _in_ddp), (2, 3)),
    "EP, copied": Layout(_lay(2, _copied, _in_ddp), (4, 8)),
    "EP on a mesh, replicated": Layout(_lay(2, _replicated, _in_fsdp2), (4, 8)),
    "EP on a mesh, sharded": Layout(_lay(2, _sharded, _in_fsdp2), (4, 8)),
}
"""Of ``Mixture``, not of the network that the other layouts have."""
