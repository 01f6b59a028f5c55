"""What SLURM says about one task of a step."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from typing import NamedTuple

from shardscale.comm.nodelist import expand
from shardscale.comm.variables import index, number
from shardscale.errors import ConfigError

__all__ = ["SlurmTask", "in_step", "meeting_point", "step", "task", "tasks_without_step"]

# Numbers from here on stand for what is not started by srun: the batch script, an interactive
# shell (SLURM_BATCH_SCRIPT and its neighbours in slurm.h).
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
# Below Linux's ephemeral ports, from 32768 on, and off those that torch takes by default, 29400 and
# 29500. A prime number of them, for the reason that `meeting_point` gives.
_FIRST_PORT = 18_000
_NUM_PORTS = 9_973
_STEPS = 101


class SlurmTask(NamedTuple):
    """One task of a step."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node: int
    num_nodes: int


def in_step(environ: Mapping[str, str]) -> bool:
    """Whether ``srun`` started this process, as opposed to a batch script or a shell."""
    if "SLURM_STEP_ID" not in environ:
        return False
    return number(environ, "SLURM_STEP_ID", 0) < _FIRST_SPECIAL_STEP


def tasks_without_step(environ: Mapping[str, str]) -> str | None:
    """The variable by which a job has several tasks or nodes, none of which is this process.

    A batch script or a shell in an allocation has the variables of its job, but ``srun`` has not
    started it.
    """
    if "SLURM_JOB_ID" not in environ:
        return None
    for name in ("SLURM_NTASKS", "SLURM_NNODES"):
        if name in environ and number(environ, name, 1) > 1:
            return name
    return None


def step(environ: Mapping[str, str]) -> str:
    """The step as Slurm writes it, ``job.step``; empty outside of one."""
    return f"{environ['SLURM_JOB_ID']}.{environ['SLURM_STEP_ID']}" if in_step(environ) else ""


def task(environ: Mapping[str, str]) -> SlurmTask:
    """Read the variables of a task, which is :func:`in_step`.

    Raises:
        ConfigError: One is missing or wrong, or the tasks are spread unevenly and nobody asked for
            it.
    """
    for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"):
        if name not in environ:
            raise _missing(name)
    world_size = number(environ, "SLURM_NTASKS", 1)
    if "SLURM_STEP_NUM_TASKS" in environ:
        of_the_step = number(environ, "SLURM_STEP_NUM_TASKS", 1)
        if of_the_step != world_size:
            raise ConfigError(
                f"SLURM_STEP_NUM_TASKS is {of_the_step}, but SLURM_NTASKS is {world_size}: the "
                "step's variables are left over from the shell that submitted the job; start the "
                "program with srun."
            )
    num_nodes = number(environ, _either(environ, "SLURM_STEP_NUM_NODES", "SLURM_NNODES"), 1)
    node = index(environ, "SLURM_NODEID", "the number of nodes", num_nodes)
    num_here = _tasks_on(environ, node, world_size, num_nodes)
    return SlurmTask(
        rank=index(environ, "SLURM_PROCID", "SLURM_NTASKS", world_size),
        world_size=world_size,
        local_rank=index(environ, "SLURM_LOCALID", "the number of tasks on this node", num_here),
        local_world_size=num_here,
        node=node,
        num_nodes=num_nodes,
    )


def meeting_point(environ: Mapping[str, str]) -> tuple[str, int]:
    """The host of rank 0 and the port it listens on, known to all tasks of a step without a word.

    Two steps that run on a node at the same time are of one job, or of jobs with numbers close to
    each other. With fewer than 98 between the numbers of the jobs and fewer than 101 steps in each,
    they never share a port; others do once in 9,973 times.
    """
    name = _either(environ, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST")
    job, step = number(environ, "SLURM_JOB_ID", 0), number(environ, "SLURM_STEP_ID", 0)
    return expand(environ[name])[0], _FIRST_PORT + (job * _STEPS + step) % _NUM_PORTS


def _either(environ: Mapping[str, str], of_the_step: str, of_the_job: str) -> str:
    """The first of two variables that is set; older Slurm sets fewer for the step."""
    for name in (of_the_step, of_the_job):
        if name in environ:
            return name
    raise _missing(of_the_step)


def _missing(name: str) -> ConfigError:
    return ConfigError(
        f"SLURM_STEP_ID is set, but {name} is not: start the program with srun, which sets both, "
        "and let them through where something filters variables, as --export= or a container does."
    )


def _tasks_on(environ: Mapping[str, str], node: int, world_size: int, num_nodes: int) -> int:
    """How many tasks a node has, by a list such as ``2(x3),1``.

    The list is not written out: what it counts may be more than fits a memory.
    """
    name = _either(environ, "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
    text = environ[name]
    runs: list[tuple[int, int]] = []  # tasks on each, number of nodes
    for item in text.split(","):
        found = re.fullmatch(r"([0-9]{1,6})(?:\(x([1-9][0-9]{0,5})\))?", item)
        if not found:
            raise ConfigError(
                f"{name} is {text!r}, but must be a list such as '2(x3),1': start the program with "
                "srun, which sets it."
            )
        runs.append((int(found[1]), int(found[2] or 1)))
    ends = list(accumulate(length for _, length in runs))
    if ends[-1] != num_nodes or sum(tasks * length for tasks, length in runs) != world_size:
        raise ConfigError(
            f"{name} is {text!r}, but there are {world_size} tasks on {num_nodes} nodes: the "
            "variables are those of different steps; start the program with srun."
        )
    if len({tasks for tasks, _ in runs}) > 1 and "SLURM_NTASKS_PER_NODE" not in environ:
        raise ConfigError(
            f"{name} is {text!r}, so the nodes have different numbers of tasks: pass "
            "--ntasks-per-node to sbatch or srun, the same number for all or the largest one."
        )
    return runs[bisect_right(ends, node)][0]
