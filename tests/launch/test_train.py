"""launch/train.py by itself: what it refuses, and how it stops and goes on."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shardscale.demo.options import OptionError, check_options

ROOT = Path(__file__).resolve().parents[2]


def start(*words: str | Path, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "launch/train.py", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_rank_that_is_told_to_stop_saves_and_the_next_one_goes_on(tmp_path: Path):
    log = tmp_path / "log"
    words = ["--step-log", log, "--checkpoint", tmp_path / "saved", "--inject", "0:2"]
    rank = start("--steps", "100000", *words, SHARDSCALE_STOP_SIGNAL="HUP")
    deadline = time.monotonic() + 90
    lines = log / "rank0.jsonl"
    # Beyond the step that overflows, which belongs to the first run.
    while not (lines.exists() and lines.read_text().count("\n") > 2) and rank.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    rank.send_signal(signal.SIGHUP)
    output, errors = rank.communicate(timeout=30)
    assert rank.returncode == 85, errors
    told = re.search(r"Told to stop: stopped after step (\d+), and saved in .*/saved", output)
    assert told
    stopped = int(told[1])

    rank = start("--steps", str(stopped + 3), *words)
    output, errors = rank.communicate(timeout=90)
    assert rank.returncode == 0, errors
    assert "rank 0 of 1 (local 0 of 1, node 0 of 1) by alone:" in output
    assert "agree: 1 of 1 ranks applied 3 of 3 steps, skipped 0" in output
    assert "No overflow was injected: this run began after step 2." in output
    entries = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [entry["step"] for entry in entries] == list(range(1, stopped + 4))
    assert [entry["step"] for entry in entries if entry["skipped"]] == [2]
    assert len({entry["digest"] for entry in entries}) == len(entries) - 1, "a step changed nothing"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of step 2."""
    folder = tmp_path_factory.mktemp("saved")
    rank = start("--steps", "2", "--checkpoint", folder)
    _, errors = rank.communicate(timeout=90)
    assert rank.returncode == 0, errors
    return folder


def test_fewer_steps_than_the_checkpoint_has_are_refused_on_every_rank(saved: Path):
    ranks = [
        start("--steps", "1", "--checkpoint", saved, **variables) for variables in two_of_torchrun()
    ]
    said = [rank.communicate(timeout=90) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], said
    assert said[0][1].endswith(
        f"launch/train.py: --steps is 1, but the newest checkpoint in {saved} is of step 2. "
        "Ask for more steps, or name another folder to begin anew.\n"
    )
    assert "launch/train.py" not in said[1][1]


def test_a_job_that_is_over_is_over_when_it_is_started_again(saved: Path):
    """As by a scheduler that has missed its end."""
    rank = start("--steps", "2", "--checkpoint", saved)
    output, errors = rank.communicate(timeout=90)
    assert rank.returncode == 0, errors
    assert "launch/train.py: goes on after step 2, which was the last\n" in output
    assert "applied 0 of 0 steps" in output


def two_of_torchrun() -> list[dict[str, str]]:
    """What torchrun tells its two ranks."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    both = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1"}
    both |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [both | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]


def test_what_is_wrong_is_said_before_torch_is_imported():
    """Within the first tenth of a second, where importing torch may take minutes."""
    for variables, sentence in [
        ({"SHARDSCALE_STOP_SIGNAL": "USR9"}, "the signal to stop is 'USR9', but must be one of "),
        ({"RANK": "0"}, "RANK is '0', but WORLD_SIZE is not set: "),
    ]:
        rank = start(PYTHONPROFILEIMPORTTIME="1", **variables)
        _, errors = rank.communicate(timeout=30)
        assert rank.returncode == 2
        assert f"\nlaunch/train.py: {sentence}" in errors
        assert "| torch\n" not in errors


@pytest.mark.parametrize(
    ("scaler", "comm", "checkpoint", "save_every", "sentence"),
    [
        (None, "nccl", None, 1, "--comm is 'nccl', but must be torch or mpi."),
        ("torch", "mpi", None, 1, "--checkpoint and --comm mpi need --scaler shardscale."),
        ("torch", "torch", Path("a"), 1, "--checkpoint and --comm mpi need --scaler shardscale."),
        (None, "torch", Path("a"), 0, "--save-every is 0, but must be at least 1."),
        (None, "torch", Path("a"), 1, None),
        ("torch", "torch", None, 1, None),
    ],
)
def test_options_that_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, scaler, comm, checkpoint, save_every, sentence
):
    monkeypatch.syspath_prepend(ROOT / "launch")  # as where it is run
    before = signal.getsignal(signal.SIGUSR2)
    train = importlib.import_module("launch.train")
    signal.signal(signal.SIGUSR2, before)
    options = check_options(ranks=2, wrap=None, optimizer=None, scaler=scaler, steps=3, inject=None)
    if sentence is None:
        train.check_more(options, comm, checkpoint, save_every)
        return
    with pytest.raises(OptionError) as refused:
        train.check_more(options, comm, checkpoint, save_every)
    assert str(refused.value) == sentence
