"""From optimizers to local gradients: which, in what order, and on whose memory."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from shardscale import LayoutError, ShardedGradScaler
from shardscale.shards import local_shards, params_of, require_apart


def name_of(param):
    return f"the one of {tuple(param.shape)}"


def optimizer_of(*grads, groups=1):
    params = []
    for grad in grads:
        param = torch.nn.Parameter(
            torch.zeros(2) if grad is None else torch.zeros_like(grad.detach())
        )
        param.grad = grad
        params.append(param)
    return torch.optim.SGD([{"params": params[i::groups]} for i in range(groups)], lr=1.0)


@pytest.fixture
def mesh():
    """Rank 0 of a pretended 2 × 2 mesh."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    dist.destroy_process_group()


def test_order_is_that_of_the_optimizer_and_none_is_left_out():
    grads = [torch.ones(1), None, torch.ones(3), torch.ones(4), None]
    optimizer = optimizer_of(*grads, groups=2)
    params, shards = local_shards(optimizer, name_of)
    assert [g.numel() for g in shards] == [1, 3, 4]
    assert all(p.grad is g for p, g in zip(params, shards, strict=True))
    assert list(params_of(optimizer)) == [p for g in optimizer.param_groups for p in g["params"]]


@pytest.mark.parametrize("grads", [[], [None], [None, None]], ids=len)
def test_an_optimizer_without_gradients_has_no_shard(grads):
    class Empty:
        param_groups = ()

    assert local_shards(optimizer_of(*grads) if grads else Empty(), name_of) == ([], [])


def test_empty_and_scalar_gradients_are_shards():
    _, grads = local_shards(optimizer_of(torch.empty(0, 3), torch.tensor(2.0)), name_of)
    assert [tuple(g.shape) for g in grads] == [(0, 3), ()]


@pytest.mark.parametrize("beside", [(), (torch.ones(2, dtype=torch.complex64),)], ids=len)
def test_a_gradient_that_is_met_twice_is_one_shard(beside):
    """By a parameter listed twice, or two parameters with one gradient tensor."""
    shared = torch.ones(3)
    optimizer = optimizer_of(shared, torch.ones(2), shared, *beside)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.param_groups[0]["params"].append(optimizer.param_groups[0]["params"][1])
    params, grads = local_shards(optimizer, name_of)
    assert len(params) == len(grads) == 2 + len(beside)
    assert grads[0] is shared


@pytest.mark.parametrize("conjugated", [False, True])
def test_complex_gradients_give_a_real_view_of_their_memory(conjugated):
    grad = torch.tensor([1 + 2j, 3 - 4j])
    given = grad.conj() if conjugated else grad
    [shard] = local_shards(optimizer_of(given), name_of).grads
    assert shard.dtype == torch.float32 and shard.shape == (2, 2)
    shard.mul_(2)
    assert grad.tolist() == [2 + 4j, 6 - 8j]


def test_sparse_gradients_give_their_values():
    grad = torch.sparse_coo_tensor(
        torch.tensor([[1, 1]]), torch.ones(2, 3), (4, 3), check_invariants=True
    )
    [shard] = local_shards(optimizer_of(grad), name_of).grads
    shard.mul_(5)
    assert grad._values().tolist() == [[5.0] * 3] * 2


def test_sparse_gradients_are_coalesced_for_a_norm_only():
    def fresh():
        return optimizer_of(
            torch.sparse_coo_tensor(
                torch.tensor([[1, 1]]), torch.ones(2), (4,), check_invariants=True
            )
        )

    [raw] = local_shards(fresh(), name_of).grads
    optimizer = fresh()
    [summed] = local_shards(optimizer, name_of, coalesced=True).grads
    assert raw.tolist() == [1.0, 1.0]
    assert summed.tolist() == [2.0]
    assert next(params_of(optimizer)).grad.is_coalesced()


@pytest.mark.parametrize(
    "grad",
    [
        torch.ones(6).as_strided((2, 3), (3, 1)),
        torch.ones(40).as_strided((2, 3), (20, 5)),
        torch.ones(4, 5).t(),
        torch.ones(2, 3, 4).permute(1, 2, 0),
        torch.ones(3, 1, 4).expand(3, 1, 4),
        torch.ones(1).expand(1),
        torch.ones(0).expand(7, 0),
    ],
    ids=lambda g: f"{tuple(g.shape)} by {g.stride()}",
)
def test_strides_without_overlap_are_taken(grad):
    [shard] = local_shards(optimizer_of(grad), name_of).grads
    assert shard is grad


@pytest.mark.parametrize(
    "grad",
    [
        torch.ones(1).expand(4),
        torch.ones(3, 1).expand(3, 2),
        torch.ones(9).as_strided((3, 3), (2, 1)),
        torch.ones(9).unfold(0, 4, 2),
    ],
    ids=lambda g: f"{tuple(g.shape)} by {g.stride()}",
)
def test_overlapping_elements_are_refused_by_name(grad):
    with pytest.raises(LayoutError, match=r"the one of \(.*share memory.*Clone it first"):
        local_shards(optimizer_of(torch.ones(2), grad), name_of)


def test_dtypes_that_cannot_be_unscaled_are_refused_by_name():
    grad = torch.ones(3).to(torch.float8_e5m2)
    with pytest.raises(LayoutError, match=r"the one of \(3,\) has dtype torch.float8_e5m2"):
        local_shards(optimizer_of(torch.ones(2), grad), name_of)


def test_dtensors_give_their_local_tensor(mesh):
    whole = torch.arange(8.0)
    grads = [
        distribute_tensor(whole.clone(), mesh, p) for p in ([Replicate(), Shard(0)], [Shard(0)] * 2)
    ]
    _, shards = local_shards(optimizer_of(*grads), name_of)
    assert [s.tolist() for s in shards] == [[0.0, 1.0, 2.0, 3.0], [0.0, 1.0]]
    assert all(s is g._local_tensor for s, g in zip(shards, grads, strict=True))


def test_dtensors_and_plain_gradients_may_be_mixed(mesh):
    grad = distribute_tensor(torch.arange(8.0), mesh, [Replicate(), Shard(0)])
    _, shards = local_shards(optimizer_of(torch.ones(3), grad, torch.ones(2).double()), name_of)
    assert [type(s) for s in shards] == [torch.Tensor] * 3
    assert [s.numel() for s in shards] == [3, 4, 2]


@pytest.mark.parametrize("beside", [(), (torch.ones(2),)], ids=len)
@pytest.mark.parametrize("placements", [[Replicate(), Replicate()], [Shard(0), Shard(0)]], ids=str)
def test_a_dtensor_gradient_placed_unlike_its_parameter_is_refused(mesh, placements, beside):
    optimizer = optimizer_of(
        distribute_tensor(torch.ones(8), mesh, [Replicate(), Shard(0)]), *beside
    )
    wrong = distribute_tensor(torch.ones(8), mesh, placements)
    next(params_of(optimizer)).grad = wrong
    with pytest.raises(LayoutError, match="Redistribute the gradient"):
        local_shards(optimizer, name_of)


def test_a_partial_gradient_is_not_taken_for_a_whole_one(mesh):
    param = torch.nn.Parameter(distribute_tensor(torch.ones(8), mesh, [Replicate()] * 2))
    param.grad = DTensor.from_local(torch.ones(8), mesh, [Replicate(), Partial()])
    with pytest.raises(LayoutError, match=r"the one of \(8,\)"):
        local_shards(torch.optim.SGD([param], lr=1.0), name_of)


# ---------------------------------------------------------------------------------- shared memory


def test_two_gradients_that_are_one_memory_are_one_shard():
    """As when one object is met twice: it is multiplied once, and counted once."""
    flat = torch.ones(6)
    params, grads = local_shards(optimizer_of(flat.view(2, 3), torch.ones(2), flat), name_of)
    assert [g.data_ptr() for g in grads] == [flat.data_ptr(), grads[1].data_ptr()]
    assert [p.shape for p in params] == [(2, 3), (2,)]


@pytest.mark.parametrize(
    "views",
    [
        lambda flat: (flat[:5], flat[4:9]),
        lambda flat: (flat[4:9], flat[:5]),
        lambda flat: (flat, flat[3:4]),
        lambda flat: (flat[8:], flat[:2], flat[2:5], flat[:9]),
        lambda flat: (flat[:4], flat[:2]),
        lambda flat: (flat[:8], flat[:8].view(torch.float64)[:2], flat[8:]),
        lambda flat: (flat[:6].view(2, 3).t(), flat[5:7]),
    ],
    ids=["end", "start", "inside", "among others", "shorter", "other dtype", "permuted"],
)
def test_gradients_that_share_a_part_of_their_memory_are_refused_by_name(views):
    grads = views(torch.ones(10))
    with pytest.raises(LayoutError, match=r"the one of .* and the one of .* share memory"):
        local_shards(optimizer_of(*grads), name_of)


@pytest.mark.parametrize(
    ("views", "num"),
    [
        (lambda flat: (flat[::2], flat.view(6, 2)[:, 0]), 1),
        (lambda flat: (flat.view(3, 4)[:, :2], flat.view(3, 4)[:, :2]), 1),
        (lambda flat: (flat[::2], flat[1::2]), 2),
        (lambda flat: (flat[::3], flat[4:6]), 2),
    ],
)
def test_gradients_with_gaps_are_compared_by_where_they_begin(views, num):
    grads = views(torch.ones(12))
    assert len(local_shards(optimizer_of(*grads), name_of).grads) == num


@pytest.mark.parametrize(
    "views",
    [
        lambda flat: (flat, flat[::2]),
        lambda flat: (flat[::2], flat),
        lambda flat: (flat[::2], flat[::3]),
        lambda flat: (flat[2:], flat[4::3]),
    ],
)
def test_a_gradient_with_gaps_inside_another_one_is_refused(views):
    with pytest.raises(LayoutError, match="share memory"):
        local_shards(optimizer_of(*views(torch.ones(12))), name_of)


def test_a_parameter_may_be_a_gradient_and_is_looked_at_like_one():
    shared = torch.nn.Parameter(torch.ones(4))
    assert len(local_shards(optimizer_of(shared, shared.detach()), name_of).grads) == 1
    freed = torch.nn.Parameter(torch.ones(4))
    optimizer = optimizer_of(freed)
    freed.untyped_storage().resize_(0)
    with pytest.raises(LayoutError, match="no memory"):
        local_shards(optimizer, name_of)


def test_memory_of_two_optimizers_is_refused_also_where_it_is_the_same():
    """One of them would divide what the other one has divided."""
    flat = torch.ones(6)
    apart = [optimizer_of(flat[:3]), optimizer_of(flat[3:])]
    require_apart([local_shards(optimizer, name_of) for optimizer in apart], name_of)
    for views in ((flat, flat.view(2, 3)), (flat[:4], flat[3:])):
        shards = [local_shards(optimizer_of(view), name_of) for view in views]
        with pytest.raises(LayoutError, match=r"the one of .* and the one of .* share memory"):
            require_apart(shards, name_of)
        scaler = ShardedGradScaler("cpu", init_scale=4.0)
        with pytest.raises(LayoutError, match="share memory"):
            scaler.unscale_([optimizer_of(view) for view in views])
        assert flat.tolist() == [1.0] * 6


def test_neighbours_in_one_memory_are_taken():
    flat = torch.ones(12)
    table = torch.ones(4, 6)
    grads = [flat[4:8], flat[:4], flat[8:8], flat[8:], table[:, :2], table[:, 2:]]
    assert len(local_shards(optimizer_of(*grads), name_of).grads) == 6


def test_a_gradient_whose_memory_was_freed_is_refused_by_name():
    grad = torch.ones(7)
    optimizer = optimizer_of(torch.ones(2), grad)
    grad.untyped_storage().resize_(0)
    with pytest.raises(LayoutError, match=r"the one of \(7,\) has elements, but no memory"):
        local_shards(optimizer, name_of)


def test_the_short_way_and_the_long_one_find_the_same(mesh, monkeypatch):
    """Whatever the C code gathers at once, the Python code gathers alike."""
    wide = distribute_tensor(torch.ones(8, 3), mesh, [Shard(0), Shard(0)])
    sharded = optimizer_of(*(DTensor(torch.ones(2, 3), wide._spec, requires_grad=False),) * 1)
    sharded.param_groups[0]["params"][0]._spec = wide._spec
    optimizers = [
        optimizer_of(torch.ones(3), None, torch.ones(()), torch.ones(0, 4), groups=2),
        optimizer_of(*(torch.ones(3, dtype=d) for d in (torch.float16, torch.bfloat16))),
        optimizer_of(torch.ones(3, 2).t(), torch.ones(4)),
        optimizer_of(None),
        sharded,
    ]
    short = [local_shards(optimizer, name_of) for optimizer in optimizers]
    monkeypatch.setattr("shardscale.kernels.gather", lambda params: None)
    for optimizer, (params, grads) in zip(optimizers, short, strict=True):
        long_params, long_grads = local_shards(optimizer, name_of)
        assert list(map(id, params)) == list(map(id, long_params))
        assert [g.data_ptr() for g in grads] == [g.data_ptr() for g in long_grads]
        assert [g.shape for g in grads] == [g.shape for g in long_grads]
