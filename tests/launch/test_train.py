"""launch/train.py by itself: what it refuses, and how it stops and goes on."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
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
