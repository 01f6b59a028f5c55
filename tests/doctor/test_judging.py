"""What the doctor makes of what ranks tell: pure functions, given what a bad cluster would say."""

from __future__ import annotations

import socket

import pytest

from shardscale.comm.env import resolve
from shardscale.doctor import names, roster, timing
from shardscale.doctor.checks import CHECKS, judge_ours, judge_torchs
from shardscale.doctor.codes import Code
from shardscale.doctor.facts import Device, Facts
from shardscale.doctor.interfaces import Interface, interfaces, trouble_with
from shardscale.doctor.mpi import MPI
from shardscale.doctor.mpi import trouble_with as mpi_trouble_with
from shardscale.doctor.sections import by_value
from shardscale.owners import say_ranks

THERE = [
    Interface("lo", True, ["127.0.0.1", "::1"]),
    Interface("eth0", True, ["10.0.0.1"]),
    Interface("eth1", True, ["10.1.0.1"]),
]
HYDRA = "/usr/bin/mpirun: MPICH 5.0.2"
OPEN = "Open MPI v5.0.11"


def codes(judged):
    return [failure.code for failure in judged.failures]


# ------------------------------------------------------------------------------------------- checks


@pytest.mark.parametrize("bad_rank", [0, 1, 2])
def test_one_rank_that_is_wrong_fails_our_check_wherever_it_is(bad_rank):
    check = CHECKS[0]
    seen = dict.fromkeys(range(3), check.right) | {bad_rank: "stepped, scale 4"}
    judged = judge_ours(check, seen)
    assert codes(judged) == [Code.CHECK]
    assert judged.failures[0].what.endswith(f"on rank {bad_rank}.")


def test_a_check_that_is_right_everywhere_is_no_failure():
    check = CHECKS[0]
    judged = judge_ours(check, dict.fromkeys(range(3), check.right))
    assert codes(judged) == []
    assert judged.sections[0].rows[0][1] == f"right: {check.right}"


def test_a_defect_of_torch_is_a_fact_that_says_which_rank_did_what():
    judged = judge_torchs(CHECKS[0], {0: "skipped", 1: "stepped", 2: "skipped"})
    assert codes(judged) == []
    assert judged.sections[0].rows[0][1] == "DEFECT: ranks 0, 2: skipped; rank 1: stepped"


# --------------------------------------------------------------------------------------- interfaces


@pytest.mark.parametrize(
    ("variable", "value", "num_nodes", "says"),
    [
        ("GLOO_SOCKET_IFNAME", "eth0", 2, None),
        ("GLOO_SOCKET_IFNAME", "eth0,eth1", 2, None),
        ("GLOO_SOCKET_IFNAME", "lo", 1, None),
        ("GLOO_SOCKET_IFNAME", "lo", 2, "'lo' is a loopback interface, but the job has 2 hosts"),
        (
            "GLOO_SOCKET_IFNAME",
            "eth",
            1,
            "there is no interface 'eth'. Name one of: lo, eth0, eth1",
        ),
        ("GLOO_SOCKET_IFNAME", "eth0,ib0", 1, "there is no interface 'ib0'"),
        ("GLOO_SOCKET_IFNAME", "^lo", 1, "excludes interfaces, as NCCL can; Gloo cannot"),
        ("NCCL_SOCKET_IFNAME", "eth", 2, None),
        ("NCCL_SOCKET_IFNAME", "=eth", 2, "there is no interface '=eth'"),
        ("NCCL_SOCKET_IFNAME", "=eth0", 2, None),
        ("NCCL_SOCKET_IFNAME", "^lo,docker", 2, None),
        ("NCCL_SOCKET_IFNAME", "^=lo", 2, None),
        ("NCCL_SOCKET_IFNAME", "^lo,eth", 2, "there is no interface '^lo,eth'"),
        ("NCCL_SOCKET_IFNAME", "ib", 1, "there is no interface 'ib'"),
    ],
)
def test_a_variable_that_names_interfaces_is_compared_with_those_there_are(
    variable, value, num_nodes, says
):
    trouble = trouble_with(variable, value, THERE, num_nodes)
    if says is None:
        assert trouble is None
    else:
        assert says in trouble
        assert f"{variable}={value!r}" in trouble


def test_the_loopback_interface_of_this_host_is_found():
    [lo] = [each for each in interfaces() if "127.0.0.1" in each.addresses]
    assert lo.is_up


# -------------------------------------------------------------------------------------------- names


def seen_by(host, own, interface=None):
    answers = {"n0": ["10.0.0.1"], "n1": ["10.0.0.2"]} | {host: own}
    return names.Seen(host, answers, interface)._asdict()


@pytest.mark.parametrize(
    ("own", "says"),
    [
        (["127.0.1.1"], "n1 looks up its own name and gets: 127.0.1.1."),
        ("unknown", "gets: unknown"),
    ],
)
def test_a_host_whose_own_name_leads_to_itself_fails_a_job_of_several(own, says):
    judged = names.judge({0: seen_by("n0", ["10.0.0.1"]), 1: seen_by("n1", own)})
    assert codes(judged) == [Code.NAMES]
    assert says in judged.failures[0].what


def test_its_own_name_does_not_matter_if_gloo_is_told_the_interface():
    told = {0: seen_by("n0", ["127.0.1.1"], "eth0"), 1: seen_by("n1", ["10.0.0.2"])}
    assert codes(names.judge(told)) == []


def test_its_own_name_does_not_matter_on_one_host():
    seen = names.Seen("n0", {"n0": ["127.0.1.1"]}, None)._asdict()
    assert codes(names.judge({0: seen})) == []


def test_a_loopback_answer_for_another_host_is_marked():
    judged = names.judge(
        {0: names.Seen("n0", {"n0": ["10.0.0.1"], "n1": ["127.0.1.1"]}, None)._asdict()}
    )
    assert judged.sections[0].rows[1] == ("n1", "! loopback: 127.0.1.1")


def test_every_host_is_looked_up_and_one_that_is_not_found_says_why(monkeypatch):
    really = socket.getaddrinfo

    def resolver(host, *args, **kwargs):
        if host != "localhost":
            raise socket.gaierror("nobody knows it")
        return really(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", resolver)
    answers = names.look_up(["localhost", "n1"]).answers
    assert answers["n1"] == "nobody knows it"
    assert set(answers["localhost"]) <= {"127.0.0.1", "::1"}


# ----------------------------------------------------------------------------------------- the rest


def facts(rank, host="n0", **changes):
    env = resolve({})._replace(rank=rank, world_size=2)
    plain = Facts(
        env,
        host,
        {"shardscale": "1", "python": "3.11", "torch": "2.13", "NCCL": "not used"},
        [Device("cpu", "2 cores", "native")],
        THERE,
        {},
        None,
    )
    return plain._replace(**changes)


def test_what_ranks_know_of_themselves_survives_being_sent():
    mpi = MPI([HYDRA], OPEN, "pmi2")
    sent = facts(1, mpi=mpi, variables={"GLOO_SOCKET_IFNAME": "eth0"})
    assert Facts.of_json(sent.as_json()) == sent


def test_ranks_with_another_torch_are_named():
    other = facts(1, versions=facts(1).versions | {"torch": "2.11", "python": "3.12"})
    judged = roster.judge({0: facts(0), 1: other})
    assert codes(judged) == [Code.VERSIONS]
    assert (
        "torch is not the same everywhere: rank 0: 2.13; rank 1: 2.11." in judged.failures[0].what
    )


def test_a_wrong_interface_on_one_rank_is_a_failure_that_names_it():
    other = facts(1, host="n1", variables={"GLOO_SOCKET_IFNAME": "ib0"})
    judged = roster.judge({0: facts(0), 1: other})
    assert codes(judged) == [Code.INTERFACE]
    assert judged.failures[0].what.startswith("rank 1: GLOO_SOCKET_IFNAME='ib0', but")
    assert judged.hand_on == {"n0": 0, "n1": 1}


@pytest.mark.parametrize(
    ("source", "library", "is_trouble"),
    [
        ("mpich", OPEN, True),
        ("mpich", "MPICH Version: 5.0.2", False),
        ("torchrun", OPEN, False),
        ("mpich", "", False),
    ],
)
def test_mpirun_and_mpi4py_have_to_be_of_one_family(source, library, is_trouble):
    trouble = mpi_trouble_with(MPI([HYDRA], library, ""), source)
    assert (trouble is not None) == is_trouble


def test_an_all_reduce_with_a_wrong_sum_is_a_failure():
    judged = timing.judge({0: {"cpu": 1e-4}, 1: {"cpu": "got 2 in place of 3"}})
    assert codes(judged) == [Code.ALL_REDUCE]


def test_the_slowest_rank_is_named():
    judged = timing.judge({0: {"cpu": 1e-4}, 1: {"cpu": 3e-4}, 2: {"cpu": 2e-4}})
    assert judged.sections[0].rows == [("cpu", "median 200 us", "slowest rank 1: 300 us")]


def test_ranks_are_put_into_words():
    assert say_ranks([5, 0, 1, 2]) == "ranks 0-2, 5"
    assert say_ranks([3]) == "rank 3"
    assert by_value({0: "a", 1: "a"}) == "a"
    assert by_value({1: "a", 0: "b", 2: "a"}) == "rank 0: b; ranks 1-2: a"
    of_many = by_value({rank: str(rank) for rank in range(100)})
    assert of_many.endswith("; rank 7: 7; more on ranks 8-99")
