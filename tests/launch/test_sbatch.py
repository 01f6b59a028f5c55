"""What launch/slurm.py writes: the files in slurm/, without a number that Slurm knows better."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launch.sbatch import Job, render

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "slurm").glob("*.sbatch"))
LAUNCHERS = ("srun", "torchrun", "mpi")
JOBS = [
    Job(launcher, max_requeues=requeues, array=array)
    for launcher, requeues, array in itertools.product(LAUNCHERS, (None, 3), ("", "1-3"))
]


def asked(job: Job) -> dict[str, str]:
    """The options that a file gives sbatch."""
    lines = render(job).splitlines()
    words = [line.split(" --")[1] for line in lines if line.startswith("#SBATCH ")]
    return dict(word.partition("=")[::2] for word in words)


def command_line(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "launch/slurm.py", *words],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def program(folder: Path, name: str, body: str) -> None:
    """A stand-in for a program of Slurm's."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


def test_there_is_a_file_for_each_launcher_and_one_that_is_requeued():
    assert [path.stem for path in FILES] == ["mpi", "requeue", "srun", "torchrun"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_is_what_its_own_command_writes(path: Path):
    [line] = [line for line in path.read_text().splitlines() if line.startswith("# Written by: ")]
    python, script, *words = shlex.split(line.removeprefix("# Written by: "))
    assert (python, script) == ("python", "launch/slurm.py")
    assert command_line(*words).stdout == path.read_text()


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_a_shell_reads_what_is_written(job: Job):
    done = subprocess.run(["bash", "-n"], input=render(job), text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "set -euo pipefail\n" in render(job)


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_the_number_of_nodes_stands_in_one_place(job: Job):
    """A copy elsewhere would be wrong as soon as somebody gives sbatch --nodes."""
    many = replace(job, nodes=77)
    changed = set(render(many).splitlines()) - set(render(job).splitlines())
    assert {line for line in changed if not line.startswith("# Written by")} == {
        "#SBATCH --nodes=77"
    }


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_tasks_are_always_asked_for_by_node(job: Job):
    """-N4 -n8 alone would put 4, 2, 1 and 1 tasks on the nodes."""
    options = asked(replace(job, ranks_per_node=3, cpus_per_rank=5))
    is_torchrun = job.launcher == "torchrun"
    assert options["ntasks-per-node"] == ("1" if is_torchrun else "3")
    assert options["cpus-per-task"] == ("15" if is_torchrun else "5")
    assert "ntasks" not in options


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_a_job_that_is_started_anew_keeps_what_it_has_printed(job: Job):
    options = asked(job)
    assert options["open-mode"] == "append"
    assert options["output"] == ("%x-%A_%a.out" if job.array else "%x-%j.out")
    assert ("requeue" in options) == (job.max_requeues is not None)


def test_slurm_sends_the_signal_that_the_ranks_wait_for():
    job = Job("srun", max_requeues=0, stop_signal="HUP", stop_ahead_s=33)
    assert asked(job)["signal"] == "B:HUP@33"
    assert "\nstop_signal=HUP\n" in render(job)


def test_what_is_not_asked_for_is_not_there():
    assert not {"partition", "account", "array", "gpus-per-node"} & asked(Job("srun")).keys()
    more = Job("srun", partition="gpu", account="a1", array="1-4", gpus_per_node=8)
    assert {"partition": "gpu", "account": "a1", "array": "1-4", "gpus-per-node": "8"}.items() <= (
        asked(more).items()
    )


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"launcher": "ssh"}, "the launcher is 'ssh', but must be one of srun, torchrun, mpi."),
        ({"launcher": ["srun"]}, "the launcher is ['srun'], but must be one of srun,"),
        ({"nodes": 0}, "--nodes is 0, but must be an integer from 1 to 2147483647."),
        ({"nodes": -4}, "--nodes is -4, but must be an integer from 1"),
        ({"nodes": "4"}, "--nodes is '4', but must be an integer from 1"),
        ({"nodes": True}, "--nodes is True, but must be an integer from 1"),
        ({"nodes": 4.0}, "--nodes is 4.0, but must be an integer from 1"),
        ({"nodes": None}, "--nodes is None, but must be an integer from 1"),
        ({"nodes": 10**12}, "--nodes is 1000000000000, but must be an integer from 1"),
        ({"ranks_per_node": -1}, "--ranks-per-node is -1, but must be an integer from 1"),
        ({"cpus_per_rank": 1.5}, "--cpus-per-rank is 1.5, but must be an integer from 1"),
        ({"gpus_per_node": -1}, "--gpus-per-node is -1, but must be an integer from 0"),
        ({"gpus_per_node": False}, "--gpus-per-node is False, but must be an integer from 0"),
        ({"max_restarts": -1}, "--max-restarts is -1, but must be an integer from 0"),
        ({"max_requeues": -1}, "--max-requeues is -1, but must be an integer from 0"),
        ({"max_requeues": True}, "--max-requeues is True, but must be an integer from 0"),
        ({"stop_ahead_s": 0}, "--stop-ahead-s is 0, but must be an integer from 1 to 65535."),
        ({"stop_ahead_s": 65536}, "--stop-ahead-s is 65536, but must be an integer from 1"),
        ({"time": "1:00; rm"}, "--time is '1:00; rm', but must be text that no shell misreads"),
        ({"time": 30}, "--time is 30, but must be text that no shell misreads"),
        ({"program": "$HOME/x.py"}, "--program is '$HOME/x.py', but must be text that no shell"),
        ({"program": ""}, "--program is '', but must be the file that each rank runs."),
        ({"program": Path("x.py")}, f"--program is {Path('x.py')!r}, but must be text that no"),
        ({"name": "a\nb"}, "--name is 'a\\nb', but must be text that no shell misreads"),
        *(
            ({"stop_signal": name}, f"--stop-signal is {name!r}, but must be one of USR1, USR2,")
            for name in ("FOO", "KILL", "STOP", "TERM", "SEGV", "_DFL", "usr2", "SIGUSR2", "10", "")
        ),
        ({"stop_signal": 10}, "--stop-signal is 10, but must be text"),
        ({"max_restarts": 2}, "--max-restarts is given, but only torchrun starts ranks anew."),
        (
            {"launcher": "torchrun", "max_restarts": 2, "max_requeues": 1},
            "--max-restarts and --max-requeues are both given",
        ),
    ],
    ids=str,
)
def test_a_job_that_cannot_be_meant_is_refused(fields: dict, sentence: str):
    with pytest.raises(ValueError, match="^" + re.escape(sentence)):
        Job(**{"launcher": "srun", **fields})


def test_the_command_line_says_what_is_wrong():
    done = command_line("srun", "--nodes", "0")
    assert done.returncode == 2
    assert done.stderr.endswith("--nodes is 0, but must be an integer from 1 to 2147483647.\n")
    done = command_line("srun", "--", "--steps", "3")
    assert done.returncode == 2
    assert done.stderr.endswith("'--steps 3' is for the program, which runs only with --submit.\n")
    done = command_line("requeue")
    assert done.returncode == 2
    assert done.stderr.endswith("as in: python launch/slurm.py srun --max-requeues 3\n")


def test_a_job_is_tested_before_it_is_submitted(tmp_path: Path):
    log = tmp_path / "log"
    program(tmp_path / "bin", "sbatch", f'echo "$@" >>{log}; cat "${{@: -3:1}}" >{tmp_path}/file')
    words = ("torchrun", "--nodes", "4", "--submit", "--", "--steps", "3")
    done = command_line(*words, PATH=f"{tmp_path}/bin:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    tested, submitted = log.read_text().splitlines()
    file = tested.split()[1]
    assert tested == f"--test-only {file} --steps 3"
    assert submitted == f"{file} --steps 3"
    assert (tmp_path / "file").read_text() == render(Job("torchrun", nodes=4))


def test_a_job_that_slurm_refuses_is_not_submitted(tmp_path: Path):
    log = tmp_path / "log"
    refusal = f'echo "$@" >>{log}; echo "sbatch: error: no such partition" >&2; exit 1'
    program(tmp_path / "bin", "sbatch", refusal)
    done = command_line("srun", "--submit", PATH=f"{tmp_path}/bin:{os.environ['PATH']}")
    assert done.returncode == 1
    assert done.stderr == "Slurm refuses the job: sbatch: error: no such partition\n"
    assert len(log.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    "last",
    [
        "sbatch: fatal: Could not establish a configuration source",
        "sbatch: fatal: Unable to process configuration file",
        "allocation failure: Unable to contact slurm controller (connect failure)",
    ],
)
def test_where_no_slurm_answers_it_says_where_to_go(tmp_path: Path, last: str):
    """In the words of sbatch 22.05, of which the first lines tell nobody anything."""
    said = (
        f'echo "sbatch: error: fetch_config: DNS SRV lookup failed" >&2; echo "{last}" >&2; exit 1'
    )
    program(tmp_path / "bin", "sbatch", said)
    done = command_line("srun", "--submit", PATH=f"{tmp_path}/bin:{os.environ['PATH']}")
    assert done.returncode == 1
    reason = last.split(": ")[-1].removesuffix(" (connect failure)")
    assert done.stderr == f"No Slurm answers ({reason}): submit on a login node of the cluster.\n"


def test_without_sbatch_it_says_where_to_go(tmp_path: Path):
    done = command_line("srun", "--submit", PATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == "There is no sbatch in PATH: submit on a login node of the cluster.\n"
