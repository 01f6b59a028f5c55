"""Who counts a gradient in the norm: known layouts, declared copies, and what nobody knows."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from shardscale import ConfigError, DisagreementError, LayoutError, ShardedGradScaler, distinct
from shardscale.layouts import Layouts
from shardscale.records import Members
from shardscale.testing import run_ranks


def member(rank, size):
    """One of several ranks that are the whole job."""
    return Members(rank, size, rank, frozenset(range(size)))


def model_of(*sizes):
    model = nn.Module()
    model.layers = nn.ParameterList([nn.Parameter(torch.ones(n)) for n in sizes])
    return model


def clip(comm, grads, max_norm, copies=distinct, attached=True, sync=False):
    """One clipped call on one rank; the norm and the gradients after it."""
    model = model_of(*map(len, grads))
    for param, grad in zip(model.layers, grads, strict=True):
        param.grad = grad.clone() * 8
    scaler = ShardedGradScaler("cpu", init_scale=8.0, comm=comm, sync=sync)
    if attached:
        scaler.attach(model, copies=copies)
    norm = scaler.clip_grad_norm_(torch.optim.SGD(model.parameters(), lr=1.0), max_norm)
    return norm, [p.grad for p in model.layers]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("max_norm", [0.5, math.inf])
def test_the_norm_of_hand_made_shards_is_that_of_the_whole_model(size, max_norm):
    """Uneven shards, some of them empty.

    Tolerance: the sum is float64 on both sides but for a float32 dot product of some ten elements
    here; torch rounds its norm to float32 before the factor is made.
    """
    rng = torch.Generator().manual_seed(size)
    whole = [torch.randn(n, generator=rng) for n in (7, 2, 40)]
    results = run_ranks(
        lambda comm: clip(comm, [w.tensor_split(size)[comm.rank] for w in whole], max_norm), size
    )
    params = [nn.Parameter(torch.zeros_like(w)) for w in whole]
    for param, grad in zip(params, whole, strict=True):
        param.grad = grad.clone()
    want = torch.nn.utils.clip_grad_norm_(params, max_norm)
    for norm, _ in results:
        assert norm.view(torch.int32) == results[0][0].view(torch.int32)
        torch.testing.assert_close(norm, want, rtol=1e-6, atol=0.0)
    for i, param in enumerate(params):
        got = torch.cat([grads[i] for _, grads in results])
        torch.testing.assert_close(got, param.grad, rtol=1e-6, atol=0.0)


def test_declared_copies_are_counted_once_by_their_first_rank():
    """The first parameter is held by all of four ranks, the second by pairs, the third by one."""

    def rank(comm):
        def mine(name, param):
            if name == "layers.0":
                return range(4)
            if name == "layers.1":
                return (comm.rank % 2, comm.rank % 2 + 2)
            return None

        grads = [torch.tensor([3.0]), torch.tensor([float(comm.rank % 2)]), torch.tensor([2.0])]
        return clip(comm, grads, math.inf, mine)[0].item()

    # 3² once, 0² and 1² once each, 2² on four ranks.
    assert run_ranks(rank, 4) == [torch.tensor(26.0).sqrt().item()] * 4


def test_copies_that_leave_out_this_rank_are_refused_on_every_rank():
    def rank(comm):
        return clip(comm, [torch.ones(2)], 1.0, lambda name, param: [1], sync=True)

    one, other = run_ranks(rank, 2)
    assert isinstance(one, LayoutError) and "leaves out this rank" in str(one)
    assert isinstance(other, DisagreementError) and "rank 0 raised LayoutError" in str(other)


@pytest.mark.parametrize("attached", [False, True])
def test_a_plain_tensor_in_a_group_needs_a_word_about_its_copies(attached):
    """Whether the others hold the same or another parameter, nothing tells."""

    def rank(comm):
        return clip(comm, [torch.ones(2)], 1.0, copies=None, attached=attached)

    for error in run_ranks(rank, 2):
        assert isinstance(error, LayoutError)
        assert "speaks of 1 of the group's 2 ranks" in str(error)
        if attached:
            assert "layers.0 (plain)" in str(error)
            assert "attach(model, copies=...)" in str(error)
            assert "shardscale.distinct if they hold other parameters" in str(error)
        else:
            assert "a parameter of shape (2,) (plain)" in str(error)
            assert "scaler.attach(model)" in str(error)


def test_a_verdict_without_a_norm_never_asks_who_owns_what():
    def rank(comm):
        model = model_of(2)
        model.layers[0].grad = torch.ones(2)
        scaler = ShardedGradScaler("cpu", comm=comm)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        scaler.unscale_(optimizer)
        return scaler.verdict(optimizer).grad_norm.isnan().item()

    assert run_ranks(rank, 2) == [True, True]


def test_alone_everything_is_counted():
    layouts = Layouts()
    assert layouts.is_owner(nn.Parameter(torch.ones(1)), member(0, 1))


def test_attaching_again_updates_and_several_models_add_up():
    layouts, first, second = Layouts(), model_of(2), model_of(3)
    layouts.attach(first, distinct)
    layouts.attach(second, None)
    assert [tuple(p.shape) for p in layouts.params()] == [(2,), (3,)]
    assert layouts.is_owner(first.layers[0], member(1, 2))
    layouts.attach(first, lambda name, param: [0, 1])
    assert len(layouts.params()) == 2
    assert not layouts.is_owner(first.layers[0], member(1, 2))


def test_a_dropped_models_names_are_not_given_to_new_parameters():
    layouts = Layouts()
    for _ in range(50):
        layouts.attach(model_of(1), None)
        new = [nn.Parameter(torch.ones(1)) for _ in range(5)]
        assert {layouts.name_of(p) for p in new} == {"a parameter of shape (1,)"}
    assert layouts.params() == []


def test_names_are_clean_of_wrappers():
    model = nn.Sequential(nn.Linear(1, 1))
    wrapped = nn.Module()
    wrapped._orig_mod = nn.Module()
    wrapped._orig_mod._checkpoint_wrapped_module = model
    layouts = Layouts()
    layouts.attach(wrapped, None)
    assert [layouts.name_of(p) for p in model.parameters()] == ["0.weight", "0.bias"]


def test_describe_is_a_table():
    scaler = ShardedGradScaler("cpu", model=nn.Linear(3, 2))
    scaler.attach(keep := model_of(5))
    keep.scalar = nn.Parameter(torch.tensor(1.0))
    keep.frozen = nn.Parameter(torch.ones(2, 3), requires_grad=False)
    scaler.attach(keep)
    rows = [line.split("  ") for line in scaler.describe().splitlines()]
    table = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert table == [
        ["parameter", "local shape", "layout", "held by", "counted by", "kernel"],
        ["layers.0", "5", "plain", "rank 0", "rank 0", "native"],
        ["scalar", "scalar", "plain", "rank 0", "rank 0", "native"],
        ["frozen", "2x3", "plain", "rank 0", "nobody: frozen", "native"],
    ]  # the linear layer was dropped at once


def test_describe_says_what_is_unknown():
    def rank(comm):
        model = model_of(2)
        scaler = ShardedGradScaler("cpu", comm=comm, model=model)
        return scaler.describe()

    for index, table in enumerate(run_ranks(rank, 2)):
        assert " ".join(table.splitlines()[1].split()) == (
            f"layers.0 2 plain rank {index} at least unknown native"
        )


def test_describe_names_holders_and_owner(rank_of_4):
    """Held by ranks 0, 2 or 1, 3 as its mesh says, and each of these again by the other two."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    model = nn.Module()
    for name, axis in (("stage", "data"), ("both", "data")):
        param = DTensor.from_local(torch.ones(8), mesh[axis], [Replicate()], run_check=False)
        setattr(model, name, nn.Parameter(param))
    layouts = Layouts()
    layouts.attach(model, lambda name, _: mesh["model"].get_group() if name == "both" else None)
    table = layouts.describe(layouts.params(), member(rank_of_4, 4), str)
    rows = [[cell for cell in line.split("  ") if cell] for line in table.splitlines()[1:]]
    across, along = (rank_of_4 % 2, rank_of_4 % 2 + 2), (rank_of_4 // 2 * 2, rank_of_4 // 2 * 2 + 1)
    assert [cell.strip() for cell in rows[0][3:5]] == [
        f"ranks {across[0]}, {across[1]}",
        f"rank {across[0]}",
    ]
    assert [cell.strip() for cell in rows[1][3:5]] == [
        f"ranks {across[0]}, {across[1]}; copies: ranks {along[0]}-{along[1]}",
        "another rank" if rank_of_4 == 3 else "rank 0",
    ]


@pytest.fixture(params=range(4))
def rank_of_4(request):
    """Each rank of a pretended job in turn; nothing is sent anywhere."""
    dist.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=4)
    yield request.param
    dist.destroy_process_group()


def counts(model, rank, copies=None):
    """Whether this rank counts the model's parameters; they all have one answer."""
    layouts = Layouts()
    layouts.attach(model, copies)
    [answer] = {layouts.is_owner(p, member(rank, 4)) for p in model.parameters()}
    return answer


def test_of_a_ddp_model_the_first_rank_counts(rank_of_4):
    model = nn.parallel.DistributedDataParallel(nn.Linear(3, 2))
    assert counts(model, rank_of_4) == (rank_of_4 == 0)


@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.parametrize(
    ("strategy", "owners"),
    [("FULL_SHARD", {0, 1, 2, 3}), ("SHARD_GRAD_OP", {0, 1, 2, 3}), ("NO_SHARD", {0})],
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_an_fsdp1_unit_is_sharded_or_replicated(rank_of_4, strategy, owners, use_orig_params):
    model = FullyShardedDataParallel(
        nn.Linear(3, 2),
        sharding_strategy=ShardingStrategy[strategy],
        device_id=torch.device("cpu"),
        use_orig_params=use_orig_params,
    )
    assert counts(model, rank_of_4) == (rank_of_4 in owners)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_of_hybrid_shards_the_first_replica_counts(rank_of_4):
    """Shards over 0, 1 and 2, 3; replicas over 0, 2 and 1, 3."""
    shards = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank_of_4 // 2]
    replicas = [dist.new_group([0, 2]), dist.new_group([1, 3])][rank_of_4 % 2]
    model = FullyShardedDataParallel(
        nn.Linear(3, 2),
        process_group=(shards, replicas),
        sharding_strategy=ShardingStrategy.HYBRID_SHARD,
        device_id=torch.device("cpu"),
    )
    assert counts(model, rank_of_4) == (rank_of_4 < 2)


def test_a_ddp_model_over_some_of_the_ranks_needs_a_word(rank_of_4):
    """The other ranks may hold copies of it, or another stage."""
    half = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank_of_4 // 2]
    model = nn.parallel.DistributedDataParallel(nn.Linear(3, 2), process_group=half)
    with pytest.raises(LayoutError, match=r"weight \(DDP\) speaks of 2 of the group's 4 ranks"):
        counts(model, rank_of_4)
    assert counts(model, rank_of_4, distinct) == (rank_of_4 % 2 == 0)
    assert counts(model, rank_of_4, lambda name, param: [rank_of_4 % 2, rank_of_4 % 2 + 2]) == (
        rank_of_4 == 0
    )


@pytest.fixture
def rank_of_mesh(rank_of_4):
    """With a 2 × 2 mesh."""
    return rank_of_4, init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))


@pytest.mark.parametrize(
    ("placements", "owners"),
    [
        ([Shard(0), Shard(0)], {0, 1, 2, 3}),
        ([Replicate(), Shard(0)], {0, 1}),
        ([Shard(0), Replicate()], {0, 2}),
        ([Replicate(), Replicate()], {0}),
    ],
    ids=str,
)
def test_of_a_dtensors_replicas_the_first_counts(rank_of_mesh, placements, owners):
    rank, mesh = rank_of_mesh
    # Made by hand: what passes torch's cache of operators has the mesh of the first equal one,
    # which in this process is that of another rank.
    param = DTensor.from_local(torch.ones(8), mesh, placements, run_check=False)
    assert Layouts().is_owner(param, member(rank, 4)) == (rank in owners)


def test_a_mesh_that_is_not_the_whole_group_needs_a_word(rank_of_mesh):
    """Two of four ranks: the other two may hold copies, or another stage."""
    rank, mesh = rank_of_mesh
    model = nn.Module()
    model.w = nn.Parameter(
        DTensor.from_local(torch.ones(8), mesh["model"], [Shard(0)], run_check=False)
    )
    layouts = Layouts()
    layouts.attach(model, None)
    with pytest.raises(LayoutError, match=r"w \(DTensor .*speaks of 2 of the group's 4 ranks"):
        layouts.is_owner(model.w, member(rank, 4))
    layouts.attach(model, distinct)
    assert layouts.is_owner(model.w, member(rank, 4))
    layouts.attach(model, lambda name, param: mesh["data"].get_group())
    assert layouts.is_owner(model.w, member(rank, 4)) == (rank < 2)
    layouts.attach(model, None)  # what was declared stays
    assert layouts.is_owner(model.w, member(rank, 4)) == (rank < 2)


def test_copies_of_one_model_say_nothing_of_another(rank_of_4):
    layouts, one, other = Layouts(), model_of(2), model_of(3)
    layouts.attach(one, distinct)
    with pytest.raises(LayoutError, match="is not a parameter of an attached model"):
        layouts.is_owner(other.layers[0], member(rank_of_4, 4))
    layouts.attach(other, None)
    with pytest.raises(LayoutError, match="speaks of 1 of the group's 4 ranks"):
        layouts.is_owner(other.layers[0], member(rank_of_4, 4))


def test_copies_outside_the_group_are_refused(rank_of_4):
    layouts, model = Layouts(), model_of(2)
    layouts.attach(model, lambda name, param: range(4))
    half = Members(0, 2, rank_of_4, frozenset({rank_of_4, (rank_of_4 + 1) % 4}))
    with pytest.raises(LayoutError, match=r"agrees with ranks .* only"):
        layouts.is_owner(model.layers[0], half)


@pytest.mark.parametrize("is_attached", [False, True])
def test_a_mesh_that_reaches_out_of_the_group_is_refused(rank_of_mesh, is_attached):
    """Found whether or not a norm is asked for: the ranks outside would decide on their own."""
    rank, mesh = rank_of_mesh
    model = nn.Module()
    model.w = nn.Parameter(DTensor.from_local(torch.ones(8), mesh, [Shard(0)] * 2, run_check=False))
    layouts = Layouts()
    if is_attached:
        layouts.attach(model, distinct)
    row = frozenset(mesh["model"].mesh.tolist())
    with pytest.raises(LayoutError, match=r"held by ranks 0-3, but this scaler agrees with ranks"):
        layouts.require_inside([] if is_attached else [model.w], Members(0, 2, rank, row))
    layouts.require_inside([model.w], member(rank, 4))


@pytest.mark.parametrize("survivors", [0, 1])
def test_an_optimizer_of_parameters_that_wrapping_has_replaced_is_refused(survivors):
    """One that survived hides nothing; one of another shape may be another model's."""
    model = model_of(2, 2, 2)
    stale = list(model.parameters())
    for i in range(survivors, 3):
        model.layers[i] = nn.Parameter(torch.ones(2))
    layouts = Layouts()
    layouts.attach(model, None)
    layouts.require_in_use(stale)  # nobody has a gradient: it may be too early to tell
    for param in model.layers:
        param.grad = torch.ones(2)
    words = rf"{3 - survivors} of the 3 parameters.* no attached model.*layers\.{survivors}"
    with pytest.raises(LayoutError, match=words):
        layouts.require_in_use(stale)
    layouts.require_in_use([nn.Parameter(torch.ones(7))])
    layouts.require_in_use([])
    layouts.require_in_use(list(model.parameters()))
    layouts.require_in_use(stale)  # the attached ones are known to be in use


def test_copies_that_contradict_the_layout_are_refused(rank_of_mesh):
    """They are ranks that hold other shards of the same parameter."""
    rank, mesh = rank_of_mesh
    model = nn.Module()
    model.w = nn.Parameter(
        DTensor.from_local(torch.ones(8), mesh["model"], [Shard(0)], run_check=False)
    )
    layouts = Layouts()
    layouts.attach(model, lambda name, param: mesh["model"])
    with pytest.raises(
        LayoutError, match=r"but its layout, DTensor .*, has other parts on rank \d\."
    ):
        layouts.is_owner(model.w, member(rank, 4))


@pytest.mark.parametrize("answer", [7, "model", [], [0.5], object()], ids=repr)
def test_copies_that_are_no_ranks_are_refused(rank_of_4, answer):
    layouts, model = Layouts(), model_of(2)
    layouts.attach(model, lambda name, param: answer)
    with pytest.raises(LayoutError, match=r"copies= says .* for layers\.0, but must return"):
        layouts.is_owner(model.layers[0], member(rank_of_4, 4))


def test_copies_may_be_named_in_every_way(rank_of_mesh):
    """The two ranks of this one's column."""
    rank, mesh = rank_of_mesh
    column = [rank % 2, rank % 2 + 2]
    for answer in (mesh["data"], mesh["data"].get_group(), iter(column * 2), torch.tensor(column)):
        layouts, model = Layouts(), model_of(2)
        layouts.attach(model, lambda name, param: answer)  # noqa: B023
        assert layouts.is_owner(model.layers[0], member(rank, 4)) == (rank < 2)


def test_copies_must_be_a_function():
    with pytest.raises(ConfigError, match="copies is a list, but must be a function"):
        Layouts().attach(model_of(2), [0, 1])


@pytest.mark.parametrize("attached", [False, True])
def test_a_model_of_dtensors_can_still_be_moved(attached):
    """torch swaps their contents, which it refuses where a weak reference exists."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        model = nn.Linear(4, 4, bias=False)
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        layouts, members = Layouts(), member(0, 2)
        if attached:
            layouts.attach(model, distinct)
        layouts.require_inside(model.parameters(), members)
        assert all(layouts.is_owner(p, members) for p in model.parameters())
        model.to(torch.float64)
        [param] = model.parameters()
        assert layouts.name_of(param) == ("weight" if attached else "a parameter of shape (4, 4)")
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_names_are_clean_of_ddp_wherever_it_is(rank_of_4):
    inner = nn.Sequential(nn.Linear(2, 2))
    model = nn.ModuleDict({"module": nn.parallel.DistributedDataParallel(inner)})
    layouts = Layouts()
    layouts.attach(model, None)
    assert [layouts.name_of(p) for p in inner.parameters()] == ["module.0.weight", "module.0.bias"]


def test_dropped_models_leave_nothing_behind():
    layouts = Layouts()
    for _ in range(10):
        layouts.attach(model_of(1, 2, 3), None)
    assert len(layouts._known) <= 2 * 3
