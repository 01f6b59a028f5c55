"""torch.distributed comes up from every launcher's variables, or says in time why it cannot."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout
from torch.distributed.distributed_c10d import _get_default_store

from shardscale import ConfigError, init_distributed
from shardscale.bring_up import _common_backend
from tests.ranks.rank import outcome, scratch

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = re.compile(
    r"RANK|WORLD_SIZE|(LOCAL_|GROUP_|MASTER_|TORCHELASTIC_|SLURM_|OMPI_|PMI|MPI_)\w*"
)


def set_environ(**variables: object) -> None:
    """Nothing of a launcher is left in the environment but these."""
    for name in [name for name in os.environ if LAUNCHERS.fullmatch(name)]:
        del os.environ[name]
    os.environ.update({name: str(value) for name, value in variables.items()})


def by_slurm(rank: int, size: int, job: int, **more: object) -> None:
    set_environ(
        SLURM_JOB_ID=job,
        SLURM_STEP_ID=0,
        SLURM_PROCID=rank,
        SLURM_LOCALID=rank,
        SLURM_NODEID=0,
        SLURM_NTASKS=size,
        SLURM_STEP_NUM_NODES=1,
        SLURM_STEP_TASKS_PER_NODE=size,
        SLURM_STEP_NODELIST="localhost",
        **more,
    )


def by_hand(rank: int, size: int, port: int) -> None:
    set_environ(
        RANK=rank,
        WORLD_SIZE=size,
        LOCAL_RANK=rank,
        LOCAL_WORLD_SIZE=size,
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=port,
    )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def summed(value: float) -> float:
    total = torch.tensor(value)
    dist.all_reduce(total)
    return total.item()


# ---------------------------------------------------------------------------------------- comes up


def up_by_slurm(rank, size, job):
    by_slurm(rank, size, job)
    before = dict(os.environ)
    env = init_distributed(timeout_s=20)
    after = {name: v for name, v in os.environ.items() if before.get(name) != v}
    gloo = dist.group.WORLD._get_backend(torch.device("cpu"))
    timeouts = {gloo.options._timeout, _get_default_store().timeout}
    return env, summed(rank), dist.get_backend(), dist.get_rank(), after, timeouts


def test_a_slurm_step_meets_on_its_first_host(ranks):
    found = ranks.run(up_by_slurm, 3, backend=None, job=os.getpid())
    for rank, (env, total, backend, group_rank, after, timeouts) in enumerate(found):
        assert (env.rank, env.world_size, env.source) == (rank, 3, "slurm")
        host, port = env.address.split(":")
        assert host == "localhost"
        assert 18_000 <= int(port) < 32_768
        assert (total, backend, group_rank) == (0 + 1 + 2, "gloo", rank)
        assert after == {
            "RANK": str(rank),
            "WORLD_SIZE": "3",
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": "3",
            "MASTER_ADDR": host,
            "MASTER_PORT": port,
        }
        assert timeouts == {default_pg_timeout}  # as torch makes a group, however long we waited


def up_again_and_by_env(rank, size, port):
    """As a program does that loses its group, and a library that knows nothing of ours."""
    by_hand(rank, size, port)
    sources = [init_distributed(timeout_s=20).source, summed(1)]
    dist.destroy_process_group()
    sources += [init_distributed(timeout_s=20).source, summed(1)]
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method="env://")
    return [*sources, summed(1)]


def test_a_group_can_be_made_again_and_env_finds_the_same_place(ranks):
    found = ranks.run(up_again_and_by_env, 2, backend=None, port=free_port())
    assert found == [["torchrun", 2, "torchrun", 2, 2]] * 2


def up_alone(rank, size):
    set_environ()
    first = init_distributed()
    total = summed(3)
    dist.destroy_process_group()
    # The variables that it has set do not make it another launcher's.
    second = init_distributed()
    return first, total, second, os.environ["RANK"], os.environ["WORLD_SIZE"]


def test_a_process_alone_becomes_a_group_of_one(ranks):
    [(first, total, second, rank, world_size)] = ranks.run(up_alone, 1, backend=None)
    assert first.source == second.source == "alone"
    assert (total, rank, world_size) == (3, "0", "1")


class Card:
    def __init__(self, uuid):
        self.uuid = uuid


def up_with_gpus(rank, size, port, gpus):
    """``gpus``: by rank, what it sees. There is no GPU, so nothing may be done with one."""
    by_hand(rank, size, port)
    torch.cuda.device_count = lambda: len(gpus[rank])
    torch.cuda.get_device_properties = lambda index: Card(gpus[rank][index])
    init_distributed(timeout_s=20)
    return dist.get_backend()


@pytest.mark.parametrize(
    "gpus",
    [
        pytest.param([["a", "b"], []], id="one host has none"),
        pytest.param([["a"], ["a"]], id="both see the same one"),
    ],
)
def test_all_ranks_take_gloo_unless_each_has_a_gpu_to_itself(ranks, gpus):
    found = ranks.run(up_with_gpus, 2, backend=None, port=free_port(), gpus=gpus)
    assert found == ["gloo", "gloo"]


@pytest.mark.parametrize(
    ("gpus", "backend"),
    [
        (["a", "b"], "cpu:gloo,cuda:nccl"),
        (["a"], "cpu:gloo,cuda:nccl"),
        (["a", "b", "a"], "gloo"),
        (["a", ""], "gloo"),
    ],
)
def test_rank_0_chooses_the_backend_from_the_gpus_of_all(gpus, backend):
    assert _common_backend(gpus) == backend


def in_a_group(rank, size):
    set_environ()
    before = dist.group.WORLD
    found = outcome(init_distributed)
    return found.error, found.message, dist.group.WORLD is before, summed(1), "RANK" in os.environ


def test_a_group_that_is_up_already_is_left_alone(ranks):
    for rank, (error, message, same, total, is_set) in enumerate(ranks.run(in_a_group, 2)):
        assert error == "StageError"
        assert f"rank {rank} of 2" in message and "gloo" in message
        assert (same, total, is_set) == (True, 2, False)


# --------------------------------------------------------------------------------- cannot come up


def timed(call):
    started = time.monotonic()
    found = outcome(call)
    return found.error, found.message, time.monotonic() - started


def port_taken(rank, size, port):
    by_slurm(rank, size, 7, MASTER_PORT=port)
    return timed(lambda: init_distributed(timeout_s=1))


def test_a_taken_port_is_named_at_once_and_nobody_waits_for_ever(ranks):
    """The other program takes connections and says nothing, so torch's own client would hang."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        first, second = ranks.run(port_taken, 2, backend=None, port=port)
    assert first[0] == "ConfigError"
    assert f"Port {port}" in first[1] and "set MASTER_PORT" in first[1]
    assert first[2] < 5
    assert second[0] == "MissingRankError"
    assert f"host localhost, port {port}" in second[1] and "MASTER_PORT" in second[1]
    assert second[2] < 5


def nobody_listens(rank, size, port):
    if rank == 0:
        return None
    by_hand(rank, size, port)
    return timed(lambda: init_distributed(timeout_s=0.5))


def test_a_host_that_does_not_answer_is_named(ranks):
    port = free_port()
    _, (error, message, seconds) = ranks.run(nobody_listens, 2, backend=None, port=port)
    assert error == "MissingRankError"
    assert "rank 1 of 2" in message and f"host 127.0.0.1, port {port}" in message
    assert "firewall" in message and "MASTER_ADDR" in message
    assert seconds < 5


def last_stays_away(rank, size, port):
    if rank == size - 1:
        return None
    by_hand(rank, size, port)
    return timed(lambda: init_distributed(timeout_s=1))


def test_ranks_that_do_not_come_are_named_by_all_who_wait(ranks):
    found = ranks.run(last_stays_away, 3, backend=None, port=free_port())
    for rank, (error, message, seconds) in enumerate(found[:-1]):
        assert error == "MissingRankError"
        assert f"rank {rank} of 3: rank 2 did not come" in message
        assert seconds < 5


def pipe(name: str) -> Path:
    """A named pipe that the ranks of a case share: reading from it waits for who writes to it."""
    try:
        os.mkfifo(scratch() / name)
    except FileExistsError:
        pass
    return scratch() / name


def two_jobs(rank, size, port):
    """Ranks 0 and 2 are of one job. Rank 1 is of another, which was given the same port, and finds
    the first one's rank 0 there, still waiting for its own."""
    gave_up = pipe("gave_up")
    if rank == 1:
        by_slurm(1, 2, job=7, MASTER_PORT=port)
        found = timed(lambda: init_distributed(timeout_s=1))
        gave_up.write_text("gave up")
        return found
    if rank == 2:
        gave_up.read_text()
    by_slurm(rank // 2, 2, job=6, MASTER_PORT=port)
    init_distributed(timeout_s=20)
    return summed(1)


def test_two_jobs_with_one_port_do_not_mix(ranks):
    first, (error, message, _), second = ranks.run(two_jobs, 3, backend=None, port=free_port())
    assert (first, second) == (2, 2)
    assert error == "MissingRankError" and "rank 0 has not come" in message


def on_the_second_node(rank, size, by_agent, host, port):
    set_environ(
        RANK=1,
        WORLD_SIZE=2,
        LOCAL_RANK=0,
        LOCAL_WORLD_SIZE=1,
        GROUP_RANK=1,
        GROUP_WORLD_SIZE=2,
        MASTER_ADDR=host,
        MASTER_PORT=port,
    )
    if by_agent:
        os.environ.update(TORCHELASTIC_RUN_ID="x", TORCHELASTIC_USE_AGENT_STORE="True")
    return timed(lambda: init_distributed(timeout_s=20))


# "127.1" stands for any name that the host's own files map to a loopback address.
@pytest.mark.parametrize(
    ("by_agent", "host"), [(False, "localhost"), (False, "127.1"), (True, "127.0.0.1")]
)
def test_a_master_that_is_this_host_on_another_node_is_refused_at_once(ranks, by_agent, host):
    [(error, message, seconds)] = ranks.run(
        on_the_second_node, 1, backend=None, by_agent=by_agent, host=host, port=free_port()
    )
    assert error == "ConfigError"
    assert f"MASTER_ADDR is '{host}'" in message and "set it to" in message
    assert seconds < 5


def test_a_timeout_must_be_positive():
    with pytest.raises(ConfigError, match="timeout_s is 0"):
        init_distributed(timeout_s=0)


# ----------------------------------------------------------------------------------------- torchrun

PROGRAM = """
import os, torch, torch.distributed as dist, shardscale
env = shardscale.init_distributed(timeout_s=30)
total = torch.tensor(float(env.rank))
dist.all_reduce(total)
life = os.environ["TORCHELASTIC_RESTART_COUNT"]
os.write(1, f"life {life}: {env}, sum {total.item():g}\\n".encode())  # print might mix lines
dist.barrier()
os._exit(life == "0")
"""


def test_torchrun_and_its_restart_of_all_ranks(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "--max-restarts", "1", str(program)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    lines = sorted(done.stdout.splitlines())
    assert len(lines) == 4
    for line, (life, rank) in zip(lines, ((0, 0), (0, 1), (1, 0), (1, 1)), strict=True):
        assert line.startswith(f"life {life}: rank {rank} of 2 (local {rank} of 2, node 0 of 1)")
        assert "by torchrun" in line and line.endswith("sum 1")
