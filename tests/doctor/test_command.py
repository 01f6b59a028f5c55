"""The command as people start it: alone, under torchrun, and in an environment that is wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shardscale import cli
from shardscale.doctor import command
from shardscale.doctor.codes import Code, Failure
from shardscale.doctor.report import Report

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3"]
# As where shardscale was installed without extras.
CORE_ALONE = """
import sys
for name in ("typer", "rich", "sklearn"):
    sys.modules[name] = None
from shardscale.cli import main
main()
"""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=90
    )


def test_under_torchrun_every_rank_is_heard_and_torchs_defects_are_facts(tmp_path: Path):
    path = tmp_path / "report.json"
    done = run(*TORCHRUN, "-m", "shardscale", "doctor", "--json", str(path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "All is well."
    assert "one rank alone" not in done.stdout
    for title in ("launcher", "ranks", "devices", "versions", "network", "MPI", "process group"):
        assert re.search(f"^{title}$", done.stdout, re.MULTILINE), title
    assert re.search(r"^  F1  a fused .*  right: skipped, scale 2$", done.stdout, re.MULTILINE)
    assert "DEFECT: ranks 0-1: stepped, scale 4; rank 2: skipped, scale 2" in done.stdout

    report = json.loads(path.read_text())
    assert (report["schema"], report["code"], report["failures"]) == (1, 0, [])
    found = report["found"]
    assert [found["facts"][rank]["env"]["local_rank"] for rank in "012"] == [0, 1, 2]
    assert {found["facts"][rank]["env"]["source"] for rank in "012"} == {"torchrun"}
    assert found["facts"]["0"]["versions"].keys() >= {"torch", "numpy", "mpi4py", "NCCL"}
    assert [name for name in found if name.endswith("torch")] == [
        f"F{n} torch" for n in ("1", "2", "2b", "3", "4", "4b", "5", "6", "8", "9", "10", "7")
    ]
    assert all(0 < found["all-reduce"][rank]["cpu"] < 20 for rank in "012")
    for check in found:
        if check.endswith("shardscale"):
            assert len(set(found[check].values())) == 1, check
    assert found["F3 torch"] == {
        "0": "stepped, scale 4",
        "1": "skipped, scale 2",
        "2": "stepped, scale 4",
    }
    assert found["F10 torch"] == dict.fromkeys("012", "wrote Inf or NaN into parameters")


def test_alone_and_without_extras_it_works_and_says_which_checks_need_more_ranks():
    done = run(sys.executable, "-c", CORE_ALONE, "doctor")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^  F1  a fused .* needs 2 ranks$", done.stdout, re.MULTILINE)
    assert re.search(r"^  F5  plain and .* right: stepped, scale 4$", done.stdout, re.MULTILINE)
    assert "rank 0 of 1" in done.stdout
    assert re.search(r"^one rank alone\n  .* Start it on two or more, ", done.stdout, re.MULTILINE)


def test_a_wrong_environment_is_one_sentence_and_its_own_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    monkeypatch.setenv("RANK", "two")
    monkeypatch.setenv("WORLD_SIZE", "4")
    path = tmp_path / "report.json"
    with pytest.raises(SystemExit) as end:
        command.main(["--json", str(path)])
    assert end.value.code == Code.ENVIRONMENT
    said = capsys.readouterr().out
    assert "RANK" in said and "'two'" in said
    assert said.endswith(f"exit code {Code.ENVIRONMENT}\n")
    assert json.loads(path.read_text())["failures"][0]["code"] == "ENVIRONMENT"


def test_a_report_that_cannot_be_written_is_an_option_that_cannot_be_used(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    report = Report(sys.stdout, tmp_path / "no" / "folder")
    assert report.conclude() == Code.USAGE
    assert "USAGE: --json " in capsys.readouterr().out


def test_a_report_that_nobody_reads_to_its_end_is_written_all_the_same(tmp_path: Path):
    """As by `shardscale doctor | head -3`."""
    reader, writer = os.pipe()
    path = tmp_path / "report.json"
    with os.fdopen(writer, "w") as out:
        report = Report(out, path)
        os.close(reader)
        report.fail(Failure(Code.GROUP, "no group"))
        assert report.conclude() == Code.GROUP
    assert json.loads(path.read_text())["code"] == Code.GROUP


def test_the_help_of_the_command_line_names_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """It is no command of typer's, which would list it."""
    monkeypatch.setattr(sys, "argv", ["shardscale", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "shardscale doctor examines a job" in capsys.readouterr().out


def test_the_table_of_exit_codes_is_that_of_the_documentation():
    page = (ROOT / "docs" / "doctor.md").read_text()
    told = dict(re.findall(r"^\| (\d+) \| `([A-Z_]+)`", page, re.MULTILINE))
    assert told == {str(code.value): code.name for code in Code}
