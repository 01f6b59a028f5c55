"""What the files in slurm/ do and say where something is amiss; Slurm's programs are stand-ins."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.sbatch import Job, render

ROOT = Path(__file__).resolve().parents[2]
# What the scripts use that is no program of Slurm's.
TOOLS = ("bash", "date", "sleep", "grep", "cat")


class Node:
    """The first node of a job, with a PATH of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log"
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.started: list[subprocess.Popen[str]] = []
        self.left_alone_s = 0  # a step at first; the 5 s of the script would have to be waited for
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        (self.bin / "python").symlink_to(sys.executable)
        self.variables = {
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_NTASKS": "2",
        }
        for name in ("srun", "scontrol", "scancel"):
            self.has(name, "")

    def has(self, name: str, body: str) -> None:
        """Put a program there that logs how it is called."""
        (self.bin / name).write_text(f'#!/bin/bash\necho "{name} $*" >>{self.log}\n{body}\n')
        (self.bin / name).chmod(0o755)

    def lacks(self, name: str) -> None:
        (self.bin / name).unlink()

    def start(self, job: Job, *words: str) -> subprocess.Popen[str]:
        script = render(job).replace("step_began + 5", f"step_began + {self.left_alone_s}")
        process = subprocess.Popen(
            ["bash", "-c", script, "file.sbatch", *words],
            cwd=ROOT,
            env={"PATH": str(self.bin), **self.variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def run(self, job: Job, *words: str) -> tuple[int, str, str]:
        """Exit code, output and errors."""
        process = self.start(job, *words)
        output, errors = process.communicate(timeout=20)
        return process.returncode, output, errors

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path)
    yield node
    for process in node.started:
        process.kill()


@pytest.mark.parametrize("launcher", ["srun", "torchrun", "mpi"])
def test_outside_of_slurm_it_says_how_to_submit(node: Node, launcher: str):
    del node.variables["SLURM_JOB_ID"]
    code, _, errors = node.run(Job(launcher))
    assert code == 2
    assert errors == "This is a job for Slurm; submit it with: sbatch file.sbatch\n"
    assert node.calls == []


def test_a_program_that_is_not_there_is_named(node: Node):
    code, _, errors = node.run(Job("srun", program="no/such.py"))
    assert code == 2
    assert errors == f"There is no no/such.py in {ROOT}; call sbatch in the folder that has it.\n"


def test_a_missing_python_is_named(node: Node):
    node.lacks("python")
    code, _, errors = node.run(Job("srun"))
    assert code == 2
    assert errors == "There is no python in PATH; activate its environment first.\n"


def test_one_failed_rank_ends_all(node: Node):
    node.has("srun", "exit 143")
    code, output, _ = node.run(Job("srun"), "--steps", "3")
    assert code == 143
    assert node.calls == [
        "srun --kill-on-bad-exit=1 --wait=60 --label python launch/train.py --steps 3"
    ]
    first, last = output.splitlines()
    assert first.endswith("START job 7, restart 0, on n[1-2]")
    assert last.endswith("END exit code 143")


def test_torchrun_is_started_once_a_node(node: Node):
    node.variables["SLURM_NTASKS"] = "8"
    code, _, errors = node.run(Job("torchrun"))
    assert code == 2
    assert errors == (
        "There are 8 tasks for 2 nodes, but a torchrun starts all ranks of its node. Give sbatch "
        "--ntasks-per-node=1, and no --ntasks.\n"
    )
    assert node.calls == []


def test_torchrun_takes_the_number_of_nodes_from_slurm(node: Node):
    node.variables.update({"SLURM_NTASKS": "5", "SLURM_JOB_NUM_NODES": "5"})
    node.run(Job("torchrun", nodes=2, ranks_per_node=3, max_restarts=1), "--steps", "3")
    [call] = node.calls
    assert call.endswith(
        " python launch/torchrun.py --nnodes 5 --nproc-per-node 3 --max-restarts 1"
        " launch/train.py --steps 3"
    )


def mpi(node: Node, library: str, plugins: str) -> tuple[int, str, str]:
    """Run the MPI job where mpi4py is linked to a library and srun has some plugins."""
    node.lacks("python")
    node.has("python", f"echo '{library}'")
    node.has("srun", f'[[ $* != --mpi=list ]] || echo "MPI plugin types are... {plugins}"')
    return node.run(Job("mpi"))


@pytest.mark.parametrize(
    ("library", "plugin"),
    [("MPICH Version: 5.0.2", "pmi2"), ("Open MPI v5.0.11", "pmix"), ("Intel(R) MPI", "pmi2")],
)
def test_srun_speaks_as_the_mpi_does(node: Node, library: str, plugin: str):
    code, _, errors = mpi(node, library, "none pmi2 pmix pmix_v4")
    assert (code, errors) == (0, "")
    assert f" --mpi={plugin} python -m mpi4py launch/train.py --comm mpi" in node.calls[-1]


@pytest.mark.parametrize(
    ("library", "plugins", "sentence"),
    [
        (
            "Open MPI v5.0.11",
            "none pmi2",
            "srun --mpi=list has no pmix, but this MPI needs it: Open MPI v5.0.11. Install it: on "
            "Debian slurm-wlm-basic-plugins and libpmix-dev.\n",
        ),
        (
            "MPICH Version: 5.0.2",
            "none pmix_v4 pmix",
            "srun --mpi=list has no pmi2, but this MPI needs it: MPICH Version: 5.0.2. Install it: "
            "on Debian slurm-wlm-basic-plugins, elsewhere slurm-libpmi.\n",
        ),
    ],
)
def test_a_missing_plugin_is_named_with_its_package(
    node: Node, library: str, plugins: str, sentence: str
):
    code, _, errors = mpi(node, library, plugins)
    assert (code, errors) == (2, sentence)


def test_a_missing_mpi4py_is_named(node: Node):
    (node.folder / "mpi4py.py").write_text("raise ImportError('no MPI here')")
    node.variables["PYTHONPATH"] = str(node.folder)
    code, _, errors = node.run(Job("mpi"))
    assert code == 2
    assert errors == (
        "mpi4py does not load (no MPI here). To install it with an MPI: pip install mpi4py mpich\n"
    )


def test_a_requeue_needs_scontrol(node: Node):
    node.lacks("scontrol")
    code, _, errors = node.run(Job("srun", max_requeues=3))
    assert code == 2
    assert errors == "There is no scontrol in PATH, which requeues the job.\n"
    assert node.calls == []


def test_ranks_that_were_told_to_stop_are_requeued(node: Node):
    node.has("srun", "exit 85")
    code, output, errors = node.run(Job("srun", max_requeues=3), "--steps", "3")
    assert (code, errors) == (0, "")
    run, requeue = node.calls
    assert run.endswith(" rank python launch/train.py --checkpoint checkpoints/7 --steps 3")
    assert requeue == "scontrol requeue 7"
    assert output.splitlines()[-1].endswith("REQUEUE job 7")


def test_a_task_of_an_array_is_called_by_both_its_numbers(node: Node):
    node.variables.update({"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"})
    node.has("srun", "exit 85")
    node.run(Job("srun", max_requeues=3, array="1-3"))
    run, requeue = node.calls
    assert "--checkpoint checkpoints/5_2" in run
    assert requeue == "scontrol requeue 5_2"


def test_a_job_is_not_requeued_for_ever(node: Node):
    node.variables["SLURM_RESTART_COUNT"] = "3"
    node.has("srun", "exit 85")
    code, _, errors = node.run(Job("srun", max_requeues=3))
    assert code == 85
    assert errors == (
        "The ranks have saved and left as they were told, but were requeued 3 times, of 3 at most. "
        "To go on: sbatch FILE --checkpoint checkpoints/7\n"
    )
    assert len(node.calls) == 1


@pytest.mark.parametrize("code", [0, 1, 3, 137, 143])
def test_ranks_that_end_otherwise_are_not_requeued(node: Node, code: int):
    node.has("srun", f"exit {code}")
    assert node.run(Job("srun", max_requeues=3))[0] == code
    assert len(node.calls) == 1


def test_the_signal_is_repeated_until_the_ranks_have_ended(node: Node):
    """One that came while a rank started Python was lost."""
    heard = node.folder / "heard"
    is_over = f"[[ $(cat {heard} 2>/dev/null) == ..* ]] || ! kill -0 $PPID"
    node.has("srun", f"until {is_over}; do sleep 0.05; done; exit 85")
    node.has("scancel", f"echo -n . >>{heard}")
    process = node.start(Job("srun", max_requeues=3))
    assert process.stdout is not None
    assert "START" in process.stdout.readline()
    while not node.calls:  # srun has been started, so the shell waits or is about to
        assert process.poll() is None
    process.send_signal(signal.SIGUSR2)
    output, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (0, "")
    assert [call for call in node.calls if not call.startswith("srun")] == [
        *["scancel --quiet --signal=USR2 7"] * 2,
        "scontrol requeue 7",
    ]
    assert "STOP USR2" in output


def test_a_step_that_has_just_begun_is_not_signalled(node: Node):
    """A task of it may not have come as far as to the shell that ignores the signal."""
    node.left_alone_s = 1_000
    looks = node.folder / "looks"
    node.lacks("sleep")
    node.has("sleep", f"echo -n . >>{looks}")
    node.has(
        "srun", f"kill -USR2 $PPID; until [[ $(cat {looks} 2>&1) == ..* ]]; do :; done; exit 85"
    )
    _, output, _ = node.run(Job("srun", max_requeues=3))
    assert "STOP USR2" in output
    assert not [call for call in node.calls if call.startswith("scancel")]


def test_a_rank_that_has_no_handler_yet_outlives_the_signal(node: Node):
    """The shell between srun and Python ignores it, and what it starts inherits that."""
    node.has("srun", 'while [[ $1 == --* ]]; do shift; done; exec "$@"')
    node.lacks("python")
    node.has("python", "kill -USR2 $$; exit 85")
    node.run(Job("srun", max_requeues=3))
    assert node.calls[-1] == "scontrol requeue 7"
