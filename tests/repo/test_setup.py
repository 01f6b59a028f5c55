"""What a newcomer types works, or fails with one plain sentence."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def make(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    # Without the variables of the make that may be running these tests.
    inherited = ("MAKE", "MFLAGS", "PYTHON", "TORCH")
    env = {k: v for k, v in os.environ.items() if not k.startswith(inherited)}
    return subprocess.run(
        ["make", *args], cwd=folder, env=env, capture_output=True, text=True, check=False
    )


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The files that set-up reads, in a folder of their own."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    return tmp_path


def fake_python(folder: Path, body: str) -> str:
    path = folder / "fake-python"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_help_lists_every_target(clone: Path):
    listed = {line.split()[0] for line in make(clone).stdout.split("\n")[1:] if line}
    text = (clone / "Makefile").read_text()
    phony = text.split(".PHONY:")[1].split("\n")[0].split()
    assert listed == {name for name in phony if not name.startswith("env-")}


def test_a_missing_python_is_one_sentence(clone: Path):
    done = make(clone, "PYTHON=no-such-python", "demo")
    assert done.returncode != 0
    assert "no-such-python was not found; install Python 3.10 or newer" in done.stderr
    assert not (clone / ".venv").exists()


def test_an_old_python_is_one_sentence(clone: Path):
    # It answers --version, runs an empty program, and says no to the question for its version.
    body = 'case "$*" in *--version*) echo Python 3.9.2;; *version_info*) exit 1;; esac'
    done = make(clone, f"PYTHON={fake_python(clone, body)}", "test")
    assert done.returncode != 0
    assert "is Python 3.9.2, but 3.10 or newer is needed" in done.stderr


def test_a_python_without_venv_names_the_package(clone: Path):
    body = 'case "$*" in *"import venv"*) exit 1;; esac'
    done = make(clone, f"PYTHON={fake_python(clone, body)}", "test")
    assert done.returncode != 0
    assert "apt-get install python3-venv" in done.stderr


def fake_venv(clone: Path, log: Path) -> None:
    """A .venv whose python writes down what it is asked to install, and installs nothing."""
    (clone / ".venv" / "bin").mkdir(parents=True)
    body = (
        f'case "$*" in *"pip install"*) echo "$*" >>{log};; -) exit 1;; '
        f'"- "*) exit 1;; *urlopen*) exit 1;; *) exec {sys.executable} "$@";; esac'
    )
    os.rename(fake_python(clone, body), clone / ".venv" / "bin" / "python")


def test_torch_is_pinned_and_installed_first_and_once(clone: Path, tmp_path: Path):
    log = tmp_path / "installed"
    fake_venv(clone, log)

    assert make(clone, "env-test").returncode == 0
    torch_first, project = log.read_text().split("\n")[:-1]
    assert torch_first.endswith(" torch==2.13.0")
    assert project.endswith(" -e .[test]")

    assert make(clone, "env-test").returncode == 0
    assert log.read_text().count("\n") == 2, "the second call installed something again"

    with (clone / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert make(clone, "env-test").returncode == 0
    assert log.read_text().count("-e .[test]") == 2, "a changed pyproject.toml was not noticed"
