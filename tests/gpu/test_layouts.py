"""Where gradients, scale and message live on different devices: one GPU, one rank, real transports.

The same logic is tested without a GPU in ``tests/ranks/test_devices.py``, on several ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffload, CPUOffloadPolicy, FullyShardedDataParallel
from torch.distributed.fsdp import fully_shard as shard
from torch.distributed.tensor import DTensor

from shardscale import ShardedGradScaler, distinct
from shardscale.comm import ProcessGroupComm

pytestmark = pytest.mark.gpu

INF, NAN = math.inf, math.nan
SCALE = 8.0
CUDA = torch.device("cuda", 0)
BACKENDS = {"nccl": "cuda", "cpu:gloo,cuda:nccl": "cuda", "gloo": "cpu"}
"""A group's backends -> where its messages live."""


class WatchingComm(ProcessGroupComm):
    """Does its collective also on one rank, and notes where its transport found the message."""

    def __init__(self, group):
        super().__init__(group)
        self.devices = []

    def all_reduce_sum_(self, buffer):
        real = self.group
        self.group = self
        self._allreduce = real.allreduce
        try:
            super().all_reduce_sum_(buffer)
        finally:
            self.group = real

    def allreduce(self, tensors, options):
        """Stands in for the group's, for the time of one message."""
        self.devices += [t.device.type for t in tensors]
        return self._allreduce(tensors, options)


@pytest.fixture
def init(tmp_path) -> Iterator[Callable[[str], WatchingComm]]:
    """Makes the default group of one rank, with these backends."""
    torch.cuda.set_device(CUDA)

    def make(backends: str) -> WatchingComm:
        store = dist.FileStore(str(tmp_path / "store"), 1)
        dist.init_process_group(backends, store=store, rank=0, world_size=1)
        return WatchingComm(dist.group.WORLD)

    yield make
    dist.destroy_process_group()


# Where a gradient is zero but for rounding, Adam's first step is its sign; eps keeps it near zero.
OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.5, momentum=0.5, foreach=False),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.5, eps=1.0, foreach=False),
    "fused AdamW": lambda params: torch.optim.AdamW(params, lr=0.5, eps=1.0, fused=True),
}


def make_net() -> nn.Sequential:
    """5 -> 7 -> 3, whole numbers; smooth, as a ReLU near 0 turns rounding into another gradient."""
    generator = torch.Generator().manual_seed(7)
    net = nn.Sequential(nn.Linear(5, 7), nn.Softplus(), nn.Linear(7, 3))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randint(-1, 2, p.shape, generator=generator))
    return net


def make_batch(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(-2, 3, (4, 5), generator=generator).float()


def keep_busy() -> None:
    """Work for some milliseconds: whoever reads a result without waiting reads too early."""
    square = torch.ones(4096, 4096, device=CUDA)
    for _ in range(8):
        square = square @ square


def local(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def offload_fsdp2() -> nn.Module:
    net = make_net()
    mesh = init_device_mesh("cuda", (1,))
    for layer in (net[0], net[2], net):
        shard(layer, mesh=mesh, offload_policy=CPUOffloadPolicy())
    return net


def offload_fsdp1() -> nn.Module:
    return FullyShardedDataParallel(
        make_net(), cpu_offload=CPUOffload(offload_params=True), device_id=CUDA
    )


OFFLOADS = {"FSDP2": offload_fsdp2, "FSDP1": offload_fsdp1}


def train(model: nn.Module, scaler: ShardedGradScaler, optimizer, how: str):
    """Norms and scales of a good, a bad and another good step, of which the last is clipped."""
    scales, norms = [], []
    for step, value in enumerate((None, NAN, None)):
        before = [local(p).clone() for p in model.parameters()]
        optimizer.zero_grad()
        scaler.scale(model(make_batch(step).to(CUDA)).sum()).backward()
        grads = [local(p.grad) for p in model.parameters()]
        assert {g.device.type for g in grads} == {"cpu"}
        if value is not None:
            grads[0].view(-1)[-1] = value
        keep_busy()
        if how == "unscale_":
            scaler.unscale_(optimizer)
        keep_busy()
        norms.append(scaler.clip_grad_norm_(optimizer, 0.5 if step == 2 else INF))
        keep_busy()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        after = [local(p) for p in model.parameters()]
        assert all(map(torch.equal, before, after)) == (value is not None)
    return [norm.item() for norm in norms], scales


# FSDP1 is deprecated, and takes a world of one for NO_SHARD.
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("how", ["clip", "unscale_"])
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("name", OFFLOADS)
def test_offloaded_gradients_are_trained_with_a_scale_on_the_gpu(init, name, optimizer_name, how):
    """Against the same network in one process on the host, clipped and stepped by torch.

    The GPU is kept busy, so that a number which the host does not wait for is not there yet.
    """
    comm = init("cpu:gloo,cuda:nccl")
    model = OFFLOADS[name]()
    scaler = ShardedGradScaler("cuda", init_scale=SCALE, comm=comm, model=model)
    norms, scales = train(model, scaler, OPTIMIZERS[optimizer_name](model.parameters()), how)

    net = make_net()
    optimizer = OPTIMIZERS[optimizer_name](net.parameters())
    expected = []
    for step, max_norm in ((0, INF), (2, 0.5)):
        optimizer.zero_grad()
        net(make_batch(step)).sum().backward()
        expected.append(nn.utils.clip_grad_norm_(net.parameters(), max_norm).item())
        optimizer.step()
    assert scales == [SCALE, SCALE / 2, SCALE / 2]
    assert math.isnan(norms[1])
    # The GPU multiplies matrices in another order, and after Adam's first step no longer exactly.
    assert [norms[0], norms[2]] == pytest.approx(expected, rel=1e-4)
    flat = torch.cat([p.detach().flatten() for p in net.parameters()])
    found = torch.cat([local(p).flatten() for p in model.parameters()])
    torch.testing.assert_close(found[: flat.numel()], flat, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backends", BACKENDS)
@pytest.mark.parametrize("scale_on", ["cpu", "cuda"])
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_parameters_on_the_host_and_on_the_gpu_in_one_optimizer(
    init, backends, scale_on, optimizer_name
):
    """One verdict and one norm, whatever the scale's device; the message where the group sends."""
    comm = init(backends)
    scales = []
    for bad_on in (None, "cpu", "cuda"):
        params = [nn.Parameter(torch.ones(3, device=d)) for d in ("cpu", "cuda", "cpu")]
        optimizer = OPTIMIZERS[optimizer_name](params)
        scaler = ShardedGradScaler(scale_on, init_scale=SCALE, comm=comm)
        scaler.attach(nn.ParameterList(params), copies=distinct)
        scaler.scale(torch.ones((), device="cuda"))
        for p in params:
            p.grad = torch.full_like(p, INF if p.device.type == bad_on else SCALE)
        keep_busy()
        norm = scaler.clip_grad_norm_(optimizer, INF)
        keep_busy()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())

        assert norm.device.type == scale_on
        # Nine gradients of 1.0; a norm rounded once to float32.
        assert norm.item() == (3.0 if bad_on is None else INF)
        # Adam's first step is lr * g / (|g| + eps); before it, decay.
        moved = 0.5 if optimizer_name == "SGD" else 0.995 - 0.25
        for p in params:
            expected = pytest.approx([moved] * 3, rel=1e-6) if bad_on is None else [1.0] * 3
            assert p.tolist() == expected
    assert scales == [SCALE, SCALE / 2, SCALE / 2]
    assert comm.devices == [BACKENDS[backends]] * 3


@pytest.mark.parametrize("backends", BACKENDS)
@pytest.mark.parametrize("grads_on", ["cpu", "cuda"])
def test_the_group_alone_decides_where_the_message_is(init, backends, grads_on):
    comm = init(backends)
    p = nn.Parameter(torch.ones(3, device=grads_on))
    optimizer = torch.optim.SGD([p], lr=0.5, foreach=False)
    for scale_on in ("cpu", "cuda"):
        scaler = ShardedGradScaler(scale_on, init_scale=SCALE, comm=comm)
        for value in (SCALE, NAN):
            p.grad = torch.full_like(p, value)
            keep_busy()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == SCALE / 2

    assert p.tolist() == [0.0] * 3
    assert comm.devices == [BACKENDS[backends]] * 4


@pytest.mark.parametrize("loss_on", ["cpu", "cuda"])
def test_a_loss_on_the_host_is_scaled_by_a_scale_on_the_gpu(loss_on):
    scaler = ShardedGradScaler("cuda", init_scale=SCALE)
    keep_busy()

    assert scaler.scale(torch.full((3,), 2.0, device=loss_on)).tolist() == [16.0] * 3
