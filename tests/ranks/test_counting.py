"""The counters: each way to launch a collective is seen, and each request to the store."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

from tests.ranks.counting import count_collectives
from tests.ranks.rank import store


def _ways_to_launch(rank, size):
    """Name -> (what it launches, number of collectives, operators the dispatcher must name)."""
    world, x = dist.group.WORLD, torch.ones(3)
    gloo = world._get_backend(torch.device("cpu"))
    sub = dist.new_group(list(range(size)))

    def in_a_thread():
        thread = threading.Thread(target=lambda: dist.all_reduce(x))
        thread.start()
        thread.join()

    reduce = "c10d.allreduce_"
    return {
        "nothing": (lambda: x.mul_(1), 0, []),
        "all_reduce": (lambda: dist.all_reduce(x), 1, [reduce]),
        "asynchronous": (lambda: dist.all_reduce(x, async_op=True).wait(), 1, [reduce]),
        "two": (lambda: (dist.all_reduce(x), dist.all_reduce(x)), 2, [reduce, reduce]),
        "subgroup": (lambda: dist.all_reduce(x, group=sub), 1, [reduce]),
        "ProcessGroup binding": (lambda: world.allreduce([x]).wait(), 1, [reduce]),
        "functional": (
            lambda: functional.all_reduce(x, "sum", world) + 1,
            1,
            ["_c10d_functional.all_reduce"],
        ),
        "functional coalesced": (
            lambda: [t + 1 for t in functional.all_reduce_coalesced([x, x], "sum", world)],
            1,
            ["_c10d_functional.all_reduce_coalesced"],
        ),
        "coalesced": (
            lambda: world.allreduce_coalesced([x, x]).wait(),
            1,
            ["c10d.allreduce_coalesced_"],
        ),
        "object": (
            lambda: dist.all_gather_object([None] * size, "object"),
            2,
            ["c10d.allgather_"] * 2,
        ),
        "broadcast": (lambda: dist.broadcast(x, 0), 1, ["c10d.broadcast_"]),
        "barrier": (lambda: dist.barrier(), 1, ["c10d.barrier"]),
        "backend object": (lambda: gloo.allreduce([x]).wait(), 1, []),
        "other thread": (in_a_thread, 1, []),
        "all_reduce in backward": (lambda: _backward_with_hook(x), 1, [reduce]),
    }


def _backward_with_hook(x):
    leaf = x.clone().requires_grad_()
    leaf.register_hook(lambda grad: dist.all_reduce(grad))
    leaf.sum().backward()


def count_each_way(rank, size):
    found = {}
    for name, (launch, num, ops) in _ways_to_launch(rank, size).items():
        with count_collectives() as counted:
            launch()
        found[name] = ((counted.num, counted.ops), (num, ops))
    return found


@pytest.mark.parametrize("size", [1, 3])
def test_every_way_to_launch_a_collective_is_counted(ranks, size):
    for found in ranks.run(count_each_way, size):
        assert {name: counted for name, (counted, _) in found.items()} == {
            name: expected for name, (_, expected) in found.items()
        }


def count_two_backends(rank, size):
    with count_collectives() as counted:
        dist.all_reduce(torch.ones(1))
    return counted.num, counted.launched


def test_a_group_of_two_backends_is_counted(ranks):
    assert ranks.run(count_two_backends, 2, backend="cpu:gloo,cuda:gloo") == [(1, 1)] * 2


def use_the_store(rank, size):
    made = len(store().requests)
    store().requests.clear()
    dist.all_reduce(torch.ones(1))
    idle = list(store().requests)
    default = dist.distributed_c10d._get_default_store()
    default.set(f"mine {rank}", "1")
    default.add(f"sum {rank}", 2)
    default.wait([f"mine {rank}"])
    found = default.get(f"mine {rank}"), default.check([f"mine {rank}"])
    asked = [(method, key.rpartition("/")[2]) for method, key in store().requests]
    store().requests.clear()
    dist.new_group([0, 1])
    return made, idle, found, asked, len(store().requests)


def test_the_counting_store_sees_every_request_of_the_group(ranks):
    for rank, (made, idle, found, asked, new_group) in enumerate(
        ranks.run(use_the_store, 2, store="counting")
    ):
        assert made > 0
        assert new_group > 0
        assert idle == []
        assert found == (b"1", True)
        mine = f"mine {rank}"
        assert asked == [
            ("set", mine),
            ("add", f"sum {rank}"),
            ("wait", mine),
            ("get", mine),
            ("check", mine),
        ]
