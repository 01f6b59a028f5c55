"""Every launcher is recognised by its variables; wrong ones are named and cured."""

from __future__ import annotations

import contextlib
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardscale import ConfigError, RankEnv
from shardscale.comm import resolve
from shardscale.comm.env import check_mpi_size

# As the programs themselves set them (torch 2.13, Open MPI 5.0.11, MPICH 5.0.2, Slurm 22.05.8),
# less what says nothing about ranks.
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "39741",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
BY_HAND = {name: value for name, value in TORCHRUN.items() if "ELASTIC" not in name}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_NODE_RANK": "0",
    "PMIX_RANK": "2",
    "PMIX_NAMESPACE": "prterun-n1-15550@1",
}
MPICH = {
    "PMI_RANK": "2",
    "PMI_SIZE": "4",
    "PMI_FD": "11",
    "MPI_LOCALRANKID": "0",
    "MPI_LOCALNRANKS": "2",
}
BATCH = {
    "ENVIRONMENT": "BATCH",
    "SLURM_JOB_ID": "12",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
SRUN = {
    **BATCH,
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.99",
}
# A step of one task a node, as that of mpirun's daemons or of torchrun's agents.
AGENTS = {
    **SRUN,
    "SLURM_PROCID": "1",
    "SLURM_NTASKS": "2",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_TASKS_PER_NODE": "1(x2)",
}
PMI2 = {"PMI_RANK": "2", "PMI_SIZE": "4", "PMI_JOBID": "12.0", "PMI_FD": "11"}
PMIX = {"PMIX_RANK": "2", "PMIX_NAMESPACE": "slurm.pmix.12.0"}


def place(env: RankEnv) -> tuple[int, ...]:
    return env[:6]


@pytest.mark.parametrize(
    ("environ", "source", "expected", "address"),
    [
        ({}, "alone", (0, 1, 0, 1, 0, 1), None),
        ({"HOME": "/root", "RANK": ""}, "alone", (0, 1, 0, 1, 0, 1), None),
        (TORCHRUN, "torchrun", (3, 4, 1, 2, 1, 2), "n1:39741"),
        (BY_HAND, "torchrun", (3, 4, 1, 2, 1, 2), "n1:39741"),
        (OPENMPI, "openmpi", (2, 4, 0, 2, 1, 2), None),
        (MPICH, "mpich", (2, 4, 0, 2, 1, 2), None),
        (SRUN, "slurm", (2, 4, 0, 2, 1, 2), "n1:19212"),
        (
            {**PMIX, "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"},
            "pmix",
            (2, 4, 0, 2, 1, 2),
            None,
        ),
        # Nested: the inner launcher counts.
        ({**AGENTS, **TORCHRUN}, "torchrun", (3, 4, 1, 2, 1, 2), "n1:39741"),
        ({**AGENTS, **OPENMPI}, "openmpi", (2, 4, 0, 2, 1, 2), None),
        ({**AGENTS, **MPICH}, "mpich", (2, 4, 0, 2, 1, 2), None),
        ({**BATCH, **OPENMPI}, "openmpi", (2, 4, 0, 2, 1, 2), None),
        ({**BATCH, **MPICH}, "mpich", (2, 4, 0, 2, 1, 2), None),
        ({**BATCH, **BY_HAND}, "torchrun", (3, 4, 1, 2, 1, 2), "n1:39741"),
        ({**AGENTS, **BY_HAND}, "torchrun", (3, 4, 1, 2, 1, 2), "n1:39741"),
        ({**OPENMPI, **TORCHRUN}, "torchrun", (3, 4, 1, 2, 1, 2), "n1:39741"),
        # SLURM with a plugin for MPI: both speak of the same ranks.
        ({**SRUN, **PMI2}, "slurm", (2, 4, 0, 2, 1, 2), "n1:19212"),
        ({**SRUN, **PMIX}, "slurm", (2, 4, 0, 2, 1, 2), "n1:19212"),
        # What people export in a batch script, and what agrees with the step.
        ({**SRUN, "WORLD_SIZE": "4", "RANK": "2"}, "slurm", (2, 4, 0, 2, 1, 2), "n1:19212"),
        ({**SRUN, "MASTER_ADDR": "10.0.0.1"}, "slurm", (2, 4, 0, 2, 1, 2), "10.0.0.1:19212"),
        ({**SRUN, "MASTER_PORT": "4000"}, "slurm", (2, 4, 0, 2, 1, 2), "n1:4000"),
        (
            {**OPENMPI, "MASTER_ADDR": "n1", "MASTER_PORT": "4000"},
            "openmpi",
            (2, 4, 0, 2, 1, 2),
            "n1:4000",
        ),
    ],
)
def test_the_innermost_launcher_says_who_this_is(environ, source, expected, address):
    env = resolve(environ)
    assert (env.source, place(env), env.address) == (source, expected, address)


@pytest.mark.parametrize(
    "shell",
    [
        {"SLURM_JOB_ID": "12", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "n1"},
        {**BATCH, "SLURM_NTASKS": "1", "SLURM_NNODES": "1"},
        # The numbers of a batch script and of an interactive step, where Slurm gives them.
        {**BATCH, "SLURM_NTASKS": "1", "SLURM_NNODES": "1", "SLURM_STEP_ID": "4294967291"},
        {**BATCH, "SLURM_NTASKS": "1", "SLURM_NNODES": "1", "SLURM_STEP_ID": "4294967290"},
    ],
)
def test_a_shell_in_an_allocation_is_no_rank(shell):
    assert resolve(shell).source == "alone"


def test_uneven_steps_that_were_asked_for_are_counted_per_node():
    environ = {
        **SRUN,
        "SLURM_NTASKS": "7",
        "SLURM_STEP_NUM_TASKS": "7",
        "SLURM_STEP_NUM_NODES": "4",
        "SLURM_STEP_NODELIST": "n[1-4]",
        "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
        "SLURM_PROCID": "6",
        "SLURM_NODEID": "3",
    }
    assert place(resolve(environ)) == (6, 7, 0, 1, 3, 4)


@pytest.mark.parametrize(
    "host",
    [
        *("n1", "n1.example.org", "n1.example.org.", "gpu_1-ib0", "10.0.0.1", "127.0.0.1"),
        *("fe80::1%eth0", "2001:db8::7", "0", "n" * 63, "n." * 126 + "n"),
    ],
)
def test_a_master_is_any_name_or_address(host: str):
    one_host = {**SRUN, **TORCHRUN, "MASTER_ADDR": host}
    assert resolve(one_host).address == f"{host}:39741"


def test_a_step_of_very_many_nodes_is_not_written_out():
    """10^10 of them, of which each is found at once."""
    many = {
        **SRUN,
        "SLURM_NTASKS": "19999990000",
        "SLURM_STEP_NUM_TASKS": "19999990000",
        "SLURM_STEP_NUM_NODES": "9999990001",
        "SLURM_STEP_TASKS_PER_NODE": ",".join(["2(x999999)"] * 10_000 + ["10000"]),
        "SLURM_NODEID": "9999990000",
        "SLURM_LOCALID": "9999",
    }
    assert place(resolve(many))[2:5] == (9999, 10_000, 9_999_990_000)


def test_the_line_to_print_says_who_why_and_where():
    assert str(resolve(SRUN)) == (
        "rank 2 of 4 (local 0 of 2, node 1 of 2) by slurm: SLURM_PROCID and SLURM_NTASKS are set, "
        "in step 12.0; rendezvous n1:19212"
    )
    assert "count before those of SLURM job 12" in resolve({**AGENTS, **OPENMPI}).why
    assert "rendezvous" not in str(resolve({}))


UNEVEN = {"SLURM_STEP_TASKS_PER_NODE": "3,1", "SLURM_NTASKS_PER_NODE": ""}
ONE_WORLD_EACH = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        # No number, or none that can be.
        ({**TORCHRUN, "RANK": "two"}, ["RANK is 'two'", "integer", "unset"]),
        ({**TORCHRUN, "RANK": "1.0"}, ["RANK is '1.0'", "integer"]),
        ({**TORCHRUN, "RANK": "-1"}, ["RANK is '-1'", "at least 0"]),
        ({**TORCHRUN, "RANK": "4"}, ["RANK is 4", "WORLD_SIZE is 4", "from 0 to 3"]),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, ["LOCAL_RANK is 2", "LOCAL_WORLD_SIZE is 2"]),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "5"}, ["LOCAL_WORLD_SIZE is '5'", "from 1 to 4"]),
        ({**TORCHRUN, "WORLD_SIZE": "0"}, ["WORLD_SIZE is '0'", "at least 1"]),
        ({**TORCHRUN, "GROUP_RANK": "2"}, ["GROUP_RANK is 2", "GROUP_WORLD_SIZE is 2"]),
        ({**OPENMPI, "OMPI_COMM_WORLD_RANK": "4"}, ["OMPI_COMM_WORLD_RANK is 4"]),
        ({**MPICH, "PMI_RANK": "x"}, ["PMI_RANK is 'x'"]),
        ({**SRUN, "SLURM_PROCID": "4"}, ["SLURM_PROCID is 4", "SLURM_NTASKS is 4"]),
        ({**SRUN, "SLURM_LOCALID": "2"}, ["SLURM_LOCALID is 2", "tasks on this node is 2"]),
        ({**SRUN, "SLURM_NODEID": "2"}, ["SLURM_NODEID is 2", "number of nodes is 2"]),
        ({**SRUN, "SLURM_STEP_ID": "batch"}, ["SLURM_STEP_ID is 'batch'", "integer"]),
        ({**SRUN, "SLURM_JOB_ID": "j"}, ["SLURM_JOB_ID is 'j'", "integer"]),
        ({**TORCHRUN, "GROUP_WORLD_SIZE": "5"}, ["GROUP_WORLD_SIZE is '5'", "from 1 to 4"]),
        # No host.
        *(
            ({**launcher, "MASTER_ADDR": text}, [f"MASTER_ADDR is {text!r}", "unset it"])
            for launcher, text in itertools.product(
                (TORCHRUN, SRUN, OPENMPI),
                (
                    *("http://n1", "n1:29500", "n1/", "n1 ", "n 1", "n1\n", "n1\0", "n\x01", " "),
                    *(
                        "[fe80::1]",
                        "fe80::1%a b",
                        "..",
                        ".n1",
                        "n1..org",
                        "ñ1",
                        "n" * 64,
                        "n." * 128,
                    ),
                ),
            )
        ),
        # Ports.
        ({**TORCHRUN, "MASTER_PORT": "65536"}, ["MASTER_PORT is '65536'", "from 1 to 65535"]),
        ({**SRUN, "MASTER_PORT": "0"}, ["MASTER_PORT is '0'", "from 1 to 65535"]),
        ({**OPENMPI, "MASTER_PORT": "http"}, ["MASTER_PORT is 'http'", "integer"]),
        # Half of it.
        ({"RANK": "0"}, ["RANK is '0'", "WORLD_SIZE is not set", "torchrun"]),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "0"}, ["WORLD_SIZE is '2'", "RANK is not set"]),
        ({**TORCHRUN, "WORLD_SIZE": ""}, ["RANK is '3'", "WORLD_SIZE is not set"]),
        ({**BY_HAND, "MASTER_ADDR": ""}, ["RANK is 3", "MASTER_ADDR is not set"]),
        ({**BY_HAND, "MASTER_PORT": ""}, ["RANK is 3", "MASTER_PORT is not set"]),
        (PMI2, ["PMI_RANK is '2'", "MPI_LOCALRANKID is not set", "RANK, WORLD_SIZE"]),
        (PMIX, ["PMIX_RANK is '2'", "WORLD_SIZE is not set"]),
        ({**SRUN, "SLURM_PROCID": ""}, ["SLURM_PROCID is not", "srun"]),
        ({**SRUN, "SLURM_JOB_ID": ""}, ["SLURM_JOB_ID is not", "srun"]),
        (
            {**SRUN, "SLURM_STEP_NODELIST": "", "SLURM_JOB_NODELIST": ""},
            ["SLURM_STEP_NODELIST is not", "srun"],
        ),
        # Two that disagree.
        ({**SRUN, "WORLD_SIZE": "8"}, ["WORLD_SIZE is 8", "SLURM_NTASKS it is 4", "unset"]),
        ({**SRUN, **PMI2, "PMI_SIZE": "1"}, ["PMI_SIZE is 1", "SLURM_NTASKS it is 4"]),
        ({**SRUN, **PMIX, "PMIX_RANK": "0"}, ["PMIX_RANK is 0", "SLURM_PROCID it is 2"]),
        ({**OPENMPI, **MPICH, "PMI_SIZE": "8"}, ["PMI_SIZE is 8", "OMPI_COMM_WORLD_SIZE"]),
        ({**OPENMPI, "RANK": "0"}, ["RANK is 0", "OMPI_COMM_WORLD_RANK it is 2", "unset"]),
        ({**MPICH, "LOCAL_RANK": "1"}, ["LOCAL_RANK is 1", "MPI_LOCALRANKID it is 0"]),
        ({**SRUN, **ONE_WORLD_EACH}, ["WORLD_SIZE 1", "SLURM_NTASKS 4", "unset RANK"]),
        ({**OPENMPI, **ONE_WORLD_EACH}, ["WORLD_SIZE 1", "OMPI_COMM_WORLD_SIZE 4"]),
        ({**SRUN, **BY_HAND}, ["RANK is 3", "SLURM_PROCID is 2", "for each rank"]),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}, ["SLURM_STEP_NUM_TASKS is 1", "left over"]),
        # SLURM without srun, or not as asked for.
        (BATCH, ["SLURM_NTASKS is 4", "SLURM_STEP_ID", "srun", "unsetting SLURM_NTASKS"]),
        ({**BATCH, "WORLD_SIZE": "4"}, ["SLURM_NTASKS is 4", "srun"]),
        ({**BATCH, "SLURM_NTASKS": ""}, ["SLURM_NNODES is 2", "srun"]),
        ({**SRUN, **UNEVEN}, ["SLURM_STEP_TASKS_PER_NODE is '3,1'", "--ntasks-per-node"]),
        (
            {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "2(x2"},
            ["SLURM_STEP_TASKS_PER_NODE is '2(x2'", "'2(x3),1'"],
        ),
        (
            {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "2(x1000000000)"},
            ["SLURM_STEP_TASKS_PER_NODE is '2(x1000000000)'", "'2(x3),1'"],
        ),
        (
            {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "2(x999999),2"},
            ["SLURM_STEP_TASKS_PER_NODE is '2(x999999),2'", "4 tasks on 2 nodes"],
        ),
        (
            {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "2"},
            ["SLURM_STEP_TASKS_PER_NODE is '2'", "4 tasks on 2 nodes"],
        ),
        ({**SRUN, "SLURM_STEP_NODELIST": "n[1-"}, ["'n[1-'", "character"]),
        (
            {**SRUN, "SLURM_PROCID": "0"},
            ["SLURM_PROCID is 0", "SLURM_NODEID is 1", "n1", "MASTER_ADDR"],
        ),
        # A master that is another one on each host.
        *(
            ({**launcher, "MASTER_ADDR": host}, [f"MASTER_ADDR is '{host}'", "2 hosts"])
            for launcher, host in itertools.product(
                (BY_HAND, SRUN, OPENMPI, MPICH), ("127.0.0.1", "127.0.1.1", "localhost", "::1")
            )
        ),
    ],
)
def test_a_bad_environment_is_refused_by_variable_value_and_cure(environ, words):
    with pytest.raises(ConfigError) as caught:
        resolve(environ)
    message = str(caught.value)
    assert all(word in message for word in words), message
    # One sentence: what was found, what to do.
    assert message.count(": ") >= 1 and message.endswith(".") and ". " not in message


def test_a_loopback_master_is_fine_on_one_host():
    one_host = {**BY_HAND, "RANK": "1", "WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "", "GROUP_RANK": ""}
    assert resolve({**one_host, "MASTER_ADDR": "localhost"}).address == "localhost:39741"


def test_agents_of_torchrun_have_met_so_they_may_share_a_machine():
    assert resolve({**TORCHRUN, "MASTER_ADDR": "localhost"}).address == "localhost:39741"


def port_of(job: int, step: int) -> int:
    environ = {**SRUN, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}
    return int(resolve(environ).address.rpartition(":")[2])


def test_neighbouring_jobs_and_steps_have_different_ports():
    ports = [port_of(job, step) for job in range(100_000, 100_097, 8) for step in range(101)]
    assert len(set(ports)) == len(ports)


def test_ports_stay_off_those_that_others_choose():
    ports = {port_of(job, step) for job in (1, 99, 12_345, 2**26) for step in (0, 7, 9_999)}
    assert min(ports) >= 18_000
    # Torch's own are 29400 and 29500, Linux gives out those from 32768 on.
    assert max(ports) < 29_400


@pytest.mark.parametrize(
    ("environ", "library", "words"),
    [
        (SRUN, "MPICH Version: 5.0.2", ["SLURM_NTASKS is 4", "4 worlds of 1", "--mpi=pmi2"]),
        (SRUN, "Open MPI v5.0.11", ["SLURM_NTASKS is 4", "4 worlds of 1", "--mpi=pmix"]),
        (MPICH, "Open MPI v5.0.11", ["PMI_SIZE is 4", "4 worlds of 1", "mpirun of Open MPI"]),
        (OPENMPI, "MPICH Version: 5.0.2", ["OMPI_COMM_WORLD_SIZE is 4", "mpirun of MPICH"]),
        (TORCHRUN, "MPICH Version: 5.0.2", ["WORLD_SIZE is 4", "4 worlds of 1", "torchrun"]),
    ],
)
def test_several_worlds_of_one_are_refused(environ, library, words):
    with pytest.raises(ConfigError) as caught:
        check_mpi_size(environ, 1, library)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_what_init_distributed_has_set_does_not_hide_the_launcher():
    afterwards = {**SRUN, **BY_HAND, "RANK": "2", "LOCAL_RANK": "0"}
    with pytest.raises(ConfigError, match=r"SLURM_NTASKS is 4, .* --mpi=pmi2"):
        check_mpi_size(afterwards, 1, "MPICH")


def test_another_size_is_refused_without_talk_of_worlds_of_one():
    with pytest.raises(ConfigError, match=r"SLURM_NTASKS is 4, but MPI has 2 ranks: start"):
        check_mpi_size(SRUN, 2, "MPICH")


@pytest.mark.parametrize(
    ("environ", "size"), [({}, 1), ({}, 4), (BATCH, 1), (SRUN, 4), ({**AGENTS, **OPENMPI}, 4)]
)
def test_an_mpi_that_agrees_or_has_nobody_to_disagree_with_is_fine(environ, size):
    check_mpi_size(environ, size, "MPICH")


# What stands in variables by mistake, and what is meant.
ODD = st.one_of(
    st.sampled_from(
        [
            *("", "0", "1", "2", "3", "4", "-1", " 1", "1 ", "+1", "1e3", "0x1", "1_0", "\u0661"),
            *("None", "none", "n[1-2]", "n1", "n[1-999999]", "n[1-999999,1-999999]", "n[", "2(x2)"),
            *("2(x2),", "(x2)", "2(x999999)", "2(x0)", "1(x2)", "4294967291", "9" * 18, "9" * 5000),
            *("localhost", "::1", "0.0.0.0", "http://n1", "n1:80", "n1\0", "65536", "True"),
            ",".join(["n[1-65536]"] * 100),
            ",".join(["2(x999999)"] * 100),
        ]
    ),
    st.text(max_size=8),
    st.integers(-2, 9).map(str),
)
READ = sorted(
    {*TORCHRUN, *OPENMPI, *MPICH, *SRUN, *PMI2, *PMIX, "SLURM_NTASKS_PER_NODE", "SLURM_NNODES"}
)
LAUNCHERS = (TORCHRUN, BY_HAND, OPENMPI, MPICH, BATCH, SRUN, AGENTS, PMI2, PMIX)


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.sampled_from(LAUNCHERS), max_size=2),
    st.dictionaries(st.sampled_from(READ), ODD, max_size=4),
    st.sets(st.sampled_from(READ), max_size=2),
)
def test_any_environment_is_a_place_or_a_config_error(launchers, odd, gone):
    environ = {name: value for launcher in launchers for name, value in launcher.items()}
    environ = {name: value for name, value in (environ | odd).items() if name not in gone}
    for size in (1, 4):
        with contextlib.suppress(ConfigError):
            check_mpi_size(environ, size, "MPICH")
    with contextlib.suppress(ConfigError):
        env = resolve(environ)
        assert 0 <= env.rank < env.world_size
        assert 0 <= env.local_rank < env.local_world_size <= env.world_size
        assert 0 <= env.node < env.num_nodes
        assert str(env).startswith(f"rank {env.rank} of {env.world_size} ")
