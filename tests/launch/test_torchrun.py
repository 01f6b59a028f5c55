"""torchrun as launch/ starts it: where its machines meet, and what its exit code says."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launch.torchrun import meeting_point

ROOT = Path(__file__).resolve().parents[2]
# A rank that says where it is and leaves; without torch, so that it takes no time.
RANK = r"""
import os, signal, sys
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK", "MASTER_ADDR")
line = " ".join(os.environ[name] for name in names)
os.write(1, f"{line}\n".encode())  # at once, not between the words of another rank
if len(sys.argv) > 2:
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def rank(tmp_path: Path) -> str:
    path = tmp_path / "rank.py"
    path.write_text(RANK)
    return str(path)


def start(*words: str, **variables: str) -> subprocess.Popen[str]:
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    return subprocess.Popen(
        words,
        cwd=ROOT,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*words: str, **variables: str) -> tuple[int, str, str]:
    """Exit code, output and errors."""
    process = start(*words, **variables)
    output, errors = process.communicate(timeout=100)
    return process.returncode, output, errors


def task(job: int, node: int = 0, restarts: int | None = None) -> dict[str, str]:
    """What a task of srun sees, one on each of three nodes."""
    counted = {} if restarts is None else {"SLURM_RESTART_COUNT": str(restarts)}
    return {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_NODELIST": "gpu[07-09]",
        "SLURM_NODEID": str(node),
        "SLURMD_NODENAME": f"gpu{7 + node:02}",
        **counted,
    }


def options(environ: dict[str, str]) -> dict[str, str]:
    return dict(option.removeprefix("--").split("=", 1) for option in meeting_point(environ))


def test_all_nodes_of_a_job_meet_on_the_first():
    on_each = [options(task(12, node)) for node in range(3)]
    assert [found["rdzv-endpoint"] for found in on_each] == ["gpu07:30012"] * 3
    assert [found["rdzv-conf"] for found in on_each] == ["is_host=1", "is_host=0", "is_host=0"]
    assert [found["local-addr"] for found in on_each] == ["gpu07", "gpu08", "gpu09"]
    assert {found["rdzv-backend"] for found in on_each} == {"c10d"}


def test_jobs_that_share_a_node_do_not_meet():
    jobs = [options(task(job)) for job in range(5000, 5200)]
    assert len({found["rdzv-endpoint"] for found in jobs}) == 200
    assert len({found["rdzv-id"] for found in jobs}) == 200
    ports = {int(found["rdzv-endpoint"].split(":")[1]) for found in jobs}
    assert min(ports) > 29_500, "torch's own"
    assert max(ports) < 32_768, "those that Linux gives away"


def test_a_job_that_is_started_anew_has_a_new_name():
    """Whatever the start before has left behind must not be taken for its own."""
    starts = [options(task(12, restarts=restarts)) for restarts in (None, 1, 2)]
    assert [found["rdzv-id"] for found in starts] == ["12.0", "12.1", "12.2"]


def test_outside_of_slurm_it_is_torchrun():
    assert meeting_point({}) == []
    assert meeting_point({"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "gpu07"}) == []


@pytest.mark.parametrize(("words", "code"), [(["85"], 85), (["0", "killed"], 137)], ids=str)
def test_it_ends_as_its_first_rank_did(rank: str, words: list[str], code: int):
    standalone = ["--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=1"]
    found, _, errors = run("python", "launch/torchrun.py", *standalone, rank, *words)
    assert found == code, errors


def test_one_machine_needs_nothing_but_the_program(rank: str):
    code, output, errors = run("launch/torchrun.sh", "--ranks-per-node", "2", rank, "0")
    assert code == 0, errors
    assert sorted(output.splitlines()) == ["0 2 0 0 127.0.0.1", "1 2 1 0 127.0.0.1"]


def test_two_machines_meet_at_the_endpoint(rank: str):
    with socket.create_server(("127.0.0.1", 0)) as free:
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    words = ["launch/torchrun.sh", "--nodes", "2", "--ranks-per-node", "1", "--node"]
    meeting = {"RDZV_ENDPOINT": endpoint, "RDZV_ID": "test"}
    machines = [start(*words, str(number), rank, "0", **meeting) for number in range(2)]
    said = [machine.communicate(timeout=100) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert sorted(output.split()[:4] for output, _ in said) == [
        ["0", "2", "0", "0"],
        ["1", "2", "0", "1"],
    ]


@pytest.mark.parametrize(
    ("words", "variables", "sentence"),
    [
        ([], {}, "no program is named, as in: "),
        (["no/such.py"], {}, f"there is no program 'no/such.py' in {ROOT}."),
        (["--nodes"], {}, "--nodes has no value."),
        (["--nodes", "two"], {}, "--nodes is 'two', but must be a number from 1 on."),
        (["--ranks-per-node", "0"], {}, "--ranks-per-node is '0', but must be a number from 1 on."),
        (["--max-restarts", "-1"], {}, "--max-restarts is '-1', but must be a number from 0 on."),
        (["--port", "1"], {}, "--port is unknown; there are --nodes, --ranks-per-node,"),
        (
            ["--node", "1", "launch/train.py"],
            {},
            "--node is 1, but the 1 nodes are counted from 0.",
        ),
        (
            ["--nodes", "2", "launch/train.py"],
            {},
            "RDZV_ENDPOINT is '', but for 2 nodes must be HOST:PORT, as node0:29400.",
        ),
        (
            ["--nodes", "2", "launch/train.py"],
            {"RDZV_ENDPOINT": "node0:99999"},
            "RDZV_ENDPOINT is 'node0:99999', but for 2 nodes must be HOST:PORT, as node0:29400.",
        ),
        (
            ["--nodes", "2", "launch/train.py"],
            {"RDZV_ENDPOINT": "node0:29400"},
            "RDZV_ID is not set, but 2 nodes find each other by it: any word, the same on all.",
        ),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_before_anything_starts(
    words: list[str], variables: dict[str, str], sentence: str
):
    code, output, errors = run("launch/torchrun.sh", *words, **variables)
    assert (code, output) == (2, "")
    assert errors.startswith(f"launch/torchrun.sh: {sentence}")


@pytest.mark.parametrize("script", ["torchrun", "mpirun"])
@pytest.mark.parametrize("word", ["-h", "--help"])
def test_a_script_shows_how_it_is_used(script: str, word: str):
    """With every option that it takes, and nothing of its code."""
    path = ROOT / "launch" / f"{script}.sh"
    code, output, errors = run(str(path), word)
    assert (code, errors) == (0, "")
    assert output.startswith("Starts ") and f"  launch/{script}.sh -" in output
    taken = re.findall(r"^        (--?[a-z-]+)\)", path.read_text(), re.MULTILINE)
    assert len(taken) > 2
    assert [option for option in taken if f"\n  {option} " not in output] == []
    assert "set -" not in output
