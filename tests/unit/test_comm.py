"""Communicators within one process, and what is decided without sending anything."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from shardscale.comm import Bond, Communicator, Solo
from shardscale.comm.attendance import Crew
from shardscale.comm.process_group import LARGE_FOR_GLOO, ProcessGroupComm, message_device
from shardscale.comm.register import Register
from shardscale.comm.roll_call import RollCall
from shardscale.errors import ConfigError
from shardscale.testing import run_ranks
from tests.comm_contract import check_contract, keep_contract


def test_solo_keeps_the_contract():
    check_contract([keep_contract(Solo())], 1)


@pytest.mark.parametrize("size", [2, 3])
def test_threads_keep_the_contract(size):
    check_contract(run_ranks(keep_contract, size, timeout_s=60), size)


def test_doubles_are_communicators():
    assert isinstance(Solo(), Communicator)
    assert run_ranks(lambda comm: isinstance(comm, Communicator), 1) == [True]


class Available:
    """A device that torch says is there."""

    is_available = staticmethod(lambda: True)


@pytest.mark.parametrize(
    ("config", "device"),
    [
        ("cpu:gloo", "cpu"),
        ("cuda:gloo,cpu:gloo", "cpu"),
        ("cpu:mpi", "cpu"),
        ("cpu:gloo,mps:anything", "cpu"),
        ("undefined", "cpu"),
        ("cpu:gloo,cuda:nccl", "cuda"),
        ("cuda:nccl", "cuda"),
        ("cpu:gloo,xpu:xccl", "xpu"),
    ],
)
def test_message_lives_where_the_group_has_a_transport_of_its_own(config, device, monkeypatch):
    """No accelerator is here, so torch is told that each named one is."""
    monkeypatch.setattr(torch, "get_device_module", lambda device: Available)

    assert message_device(config) == torch.device(device)


def test_message_stays_on_the_host_where_the_accelerator_is_missing():
    assert not torch.cuda.is_available()
    assert message_device("cpu:gloo,cuda:nccl") == torch.device("cpu")


class LargeGroup:
    """So many ranks of Gloo do not fit a test. It has no collective, so none can be made."""

    def __init__(self, size):
        self._size = size

    def rank(self):
        return self._size - 1

    def size(self):
        return self._size


@pytest.fixture
def comm_of(monkeypatch):
    """The communicator of a group with such a transport; the devices it names are there."""

    def make(group, config):
        module = "shardscale.comm.process_group"
        monkeypatch.setattr(torch, "get_device_module", lambda device: Available)
        monkeypatch.setattr(f"{module}.dist.get_backend_config", lambda group: config)
        monkeypatch.setattr(f"{module}._roll_call_of", lambda group, is_host: None)
        return ProcessGroupComm(group)

    return make


@pytest.mark.parametrize("config", ["cpu:gloo", "cpu:gloo,cuda:gloo", "cpu:gloo,mps:anything"])
def test_a_large_group_on_gloo_warns_once_of_what_a_verdict_costs(comm_of, config):
    group = LargeGroup(1_024)
    with pytest.warns(UserWarning, match="over Gloo") as warned:
        comm_of(group, config)
    comm_of(group, config)  # another scaler's; a warning would be an error here

    (warning,) = warned
    # 2 * 1023 steps of 50 us.
    assert "has 1024 ranks" in str(warning.message)
    assert "2046 steps, 0.1 s" in str(warning.message)
    assert "cuda:nccl" in str(warning.message)


def test_the_warning_begins_where_gloo_begins_to_cost(comm_of):
    comm_of(LargeGroup(LARGE_FOR_GLOO - 1), "cpu:gloo")
    with pytest.warns(UserWarning, match="254 steps"):
        comm_of(LargeGroup(LARGE_FOR_GLOO), "cpu:gloo")


@pytest.mark.parametrize(
    "config", ["cpu:gloo,cuda:nccl", "cuda:nccl", "cpu:fake,cuda:fake", "cpu:mpi", "undefined"]
)
def test_no_other_transport_warns(comm_of, config):
    """A warning would be an error here."""
    assert comm_of(LargeGroup(16_384), config).size == 16_384


def test_a_group_and_a_communicator_together_are_refused():
    with pytest.raises(ConfigError, match="both given"):
        Bond(process_group=object(), comm=Solo())


@pytest.mark.parametrize("timeout_s", [0, -1.0, float("inf"), float("nan")])
def test_a_timeout_that_is_no_time_is_refused(timeout_s):
    with pytest.raises(ConfigError, match="timeout_s"):
        Bond(timeout_s=timeout_s)


def test_scalers_are_numbered_in_the_order_they_are_made_on_each_communicator():
    one, other = Solo(), Solo()

    assert [Bond(comm=c).ordinal for c in (one, other, one, one)] == [0, 0, 1, 2]


def test_a_store_keeps_what_many_ranks_tell_alike_only_once():
    """More ranks than one request asks for; one says something else and one does not come."""
    size, odd, missing = 150, 5, 77
    store = dist.HashStore()
    said = [{"policy": "other" if rank == odd else "same"} for rank in range(size)]
    came = [rank for rank in range(size) if rank != missing]

    # One after the other, and nobody waits: the last one finds what all the others have written.
    calls = {}
    for rank in came:
        register = Register(rank, size)
        register.join(store)
        calls[rank] = RollCall(Crew(rank, size, "n1"), register, lambda: store, lambda: store)
    num_before = store.num_keys()
    *_, heard = [calls[rank].gather(said[rank], 0.0) for rank in came]

    assert heard == [said[rank] if rank != missing else None for rank in range(size)]
    keys_of_ranks, texts, alarms = size - 1, 2, 1
    assert store.num_keys() - num_before == keys_of_ranks + texts + alarms
