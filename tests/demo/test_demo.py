"""The demo as people run it: real ranks, real training, exit codes, closing lines."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from multiprocessing import active_children
from pathlib import Path

import pytest

from shardscale import cli
from shardscale.demo.options import check_options
from shardscale.demo.start import RankError, launch, start_jobs
from tests.demo.failing import fail_on_rank_one, interrupt_the_launcher

ROOT = Path(__file__).resolve().parents[2]
DEMO = [sys.executable, "-c", "from shardscale.cli import main; main()", "demo"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("FORCE_COLOR", None)
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )


def test_the_demo_ends_in_agreement_beside_a_run_that_diverged(tmp_path: Path):
    path = tmp_path / "outcome.json"
    done = run(*DEMO, "--steps", "30", "--ranks", "3", "--json", str(path))
    assert done.returncode == 0, done.stderr
    *_, of_torch, closing = done.stdout.splitlines()
    assert closing.startswith(
        "agree: 3 of 3 ranks applied 29 of 30 steps, skipped 1, and ended at scale 32768; "
    )
    assert of_torch.startswith(
        "torch ShardedGradScaler, FSDP1, adamw: DIVERGED: of 30 steps "
        "ranks 0, 2 skipped 0 (scale 65536); rank 1 skipped 1 (scale 32768); "
    )
    assert re.search(r"^shardscale  step 15/30 .* skips 1  <- skipped$", done.stdout, re.MULTILINE)
    assert "Overflowed at step 15: rank 1, its shard of first.weight." in done.stdout

    record = json.loads(path.read_text())
    assert record["schema"] == 1
    assert record["versions"].keys() == {"shardscale", "torch", "python"}
    assert record["options"] == {
        "ranks": 3,
        "wrap": "fsdp2",
        "optimizer": "adamw",
        "scaler": "shardscale",
        "steps": 30,
        "inject": {"rank": 1, "step": 15, "param": None},
    }
    assert record["agree"] is True
    assert record["closing_line"] == closing
    assert [row["rank"] for row in record["ranks"]] == [0, 1, 2]
    assert {(row["scale"], row["applied"], row["skipped"]) for row in record["ranks"]} == {
        (32768.0, 29, 1)
    }
    assert len({row["digest"] for row in record["ranks"]}) == 3, "the ranks hold no shards"
    assert [tick["step"] for tick in record["losses"]] == list(range(1, 31))
    assert record["losses"][-1]["loss"] < record["losses"][0]["loss"]
    [compared] = record["comparison"]
    assert compared["agree"] is False
    assert of_torch.endswith(compared["closing_line"])
    assert [row["applied"] for row in compared["ranks"]] == [30, 29, 30]


def test_a_run_that_diverges_ends_with_3(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    words = ["demo", "--wrap", "fsdp1", "--scaler", "torch", "--steps", "12", "--ranks", "2"]
    monkeypatch.setattr(sys, "argv", ["shardscale", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 3
    said = capsys.readouterr().out
    assert said.splitlines()[-1].startswith(
        "DIVERGED: of 12 steps rank 0 skipped 0 (scale 65536); rank 1 skipped 1 (scale 32768); "
    )
    assert "agree" not in said, "a run that was asked for by name stands alone"


def test_the_same_program_runs_under_torchrun(tmp_path: Path):
    path = tmp_path / "outcome.json"
    program = ["launch/train.py", "--wrap", "fsdp1", "--steps", "12", "--json", str(path)]
    done = run(*TORCHRUN, *program, "--inject", "0:3:head.bias")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(
        "agree: 2 of 2 ranks applied 11 of 12 steps, skipped 1, and ended at scale 32768; "
    )
    # FSDP1 cuts a layer into equal runs of elements, so rank 1 has all of its bias.
    moved = "rank 0, its shard of first.weight (it holds nothing of head.bias)."
    assert moved in done.stdout
    assert json.loads(path.read_text())["comparison"] == []


def test_torchrun_is_told_of_a_divergence():
    done = run(*TORCHRUN, "launch/train.py", "--wrap", "ddp", "--scaler", "torch", "--steps", "6")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].startswith("DIVERGED: of 6 steps rank 0 skipped 0 ")
    assert re.search(r"exitcode +: 3 ", done.stderr)


def test_the_model_learns_whatever_its_scaler_and_optimizer():
    """All ways to train, in one launch; with replicas, because they are the quickest."""
    first, *others = [
        check_options(
            ranks=2, wrap=wrap, optimizer=optimizer, scaler=scaler, steps=steps, inject="none"
        )
        for wrap, optimizer, scaler, steps in [
            ("ddp", "adamw", "shardscale", 150),
            ("ddp", "adamw", "torch", 150),
            ("fsdp2", "adamw-foreach", "shardscale", 10),
            ("fsdp1", "adamw-loop", "torch", 10),
            ("fsdp2", "adam", "torch", 10),
            ("fsdp1", "sgd", "shardscale", 10),
            ("fsdp2", "adagrad", "shardscale", 10),
        ]
    ]
    ticks: list[tuple[int, int]] = []
    learnt, twin, *short = start_jobs(
        [first, *others], lambda number, tick: ticks.append((number, tick.step))
    )
    assert all(row.accuracy >= 0.95 for row in learnt.rows)
    assert learnt.rows == twin.rows, "where nothing diverges the scalers do the same, bit for bit"
    for result in short:
        assert result.ticks[-1].loss < result.ticks[0].loss
        assert {(row.applied, row.skipped) for row in result.rows} == {(10, 0)}
    assert ticks == [
        (number, step)
        for number, job in enumerate([first, *others])
        for step in range(1, job.steps + 1)
    ]


def test_a_rank_that_fails_is_named_and_the_others_are_ended():
    with pytest.raises(RankError, match=r"(?s)^rank 1 failed: .*ValueError: I am broken$"):
        launch(2, fail_on_rank_one)
    assert active_children() == []


def test_ctrl_c_ends_the_ranks():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        launch(2, interrupt_the_launcher)
    assert active_children() == []
    assert signal.getsignal(signal.SIGINT) is before
