"""Which MPI a host has: what starts it, what mpi4py loads, and what srun can talk to."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

__all__ = ["MPI", "mpi_of_this_host", "trouble_with"]

_LIMIT_S = 10.0
# In a process of its own: what cannot be loaded may end it, and must not be loaded here.
_ASK_MPI4PY = (
    "import mpi4py; mpi4py.rc.initialize = False\n"
    "from mpi4py import MPI; print(MPI.Get_library_version())"
)
_FAMILIES = {"Open MPI": "Open MPI", "OpenRTE": "Open MPI", "MPICH": "MPICH", "HYDRA": "MPICH"}


class MPI(NamedTuple):
    """What was found; empty strings and lists where there is nothing."""

    launchers: list[str]
    """Each ``mpirun`` of the PATH with its family or first line, the one that runs first."""
    library: str
    """What mpi4py loads."""
    plugins: str
    """What ``srun --mpi=list`` says."""


def mpi_of_this_host() -> MPI:
    """Ask the programs that are there."""
    found = dict.fromkeys(
        str(path.resolve())
        for folder in os.environ.get("PATH", "").split(os.pathsep)
        if os.access(path := Path(folder, "mpirun"), os.X_OK)
    )
    return MPI(
        launchers=[f"{path}: {_shortly(_said(path, '--version'))}" for path in found],
        library=_shortly(_said(sys.executable, "-c", _ASK_MPI4PY)) if find_spec("mpi4py") else "",
        plugins=" ".join(_said("srun", "--mpi=list").split()) if shutil.which("srun") else "",
    )


def trouble_with(mpi: MPI, source: str) -> str | None:
    """What is wrong with a job that ``source`` started, as a sentence; None if nothing is."""
    if source not in ("openmpi", "mpich") or not mpi.launchers or not mpi.library:
        return None
    launcher, library = _family(mpi.launchers[0]), _family(mpi.library)
    if launcher == library or not launcher or not library:
        return None
    return (
        f"mpirun is {mpi.launchers[0]}, but mpi4py loads {mpi.library}: each process would be a "
        "world of its own. Install mpi4py for the MPI that starts the job, or put that MPI's "
        "mpirun first in PATH."
    )


def _family(text: str) -> str:
    return next((family for word, family in _FAMILIES.items() if word in text), "")


def _shortly(text: str) -> str:
    """The first line, or the two words that matter of a long text."""
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    version = next((line for line in lines if line.startswith("Version:")), "")
    if lines and _family(lines[0]) == "MPICH" and version and version not in lines[0]:
        return f"MPICH {version.removeprefix('Version:').strip()}"
    return lines[0].partition(", package")[0] if lines else ""


def _said(*command: str) -> str:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=_LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {_LIMIT_S:g} s"
    except OSError as error:
        return str(error)
    # srun lists its plugins on the error stream.
    said = done.stdout.strip() or done.stderr.strip()
    return said if done.returncode == 0 else f"exit code {done.returncode}: {said[-200:]}"
