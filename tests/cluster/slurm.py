"""A real Slurm for the tests, as a user sees it: commands, jobs, and what becomes of them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.cluster.slurm_daemons import Daemons, started, until

__all__ = ["Job", "Slurm", "running"]

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def running(name: str, num_nodes: int, *, networks: bool = False) -> Iterator[Slurm]:
    """A Slurm whose nodes are idle; see ``started`` for the arguments."""
    with started(name, num_nodes, networks=networks, wait_s=60.0) as daemons:
        slurm = Slurm(daemons)
        slurm.until(lambda: slurm.num_idle() == num_nodes, "all nodes to be idle", 30)
        yield slurm


class Slurm:
    """A user's shell on the cluster, whose working directory is this checkout."""

    def __init__(self, daemons: Daemons) -> None:
        self.daemons = daemons
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
        self.environment = {
            **inherited,
            **daemons.mark,
            "SLURM_CONF": str(daemons.configuration),
            "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }

    def run(
        self, *command: str | Path, limit_s: float = 30.0, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """What came of a command; ``variables`` are set for it besides."""
        return subprocess.run(
            command,
            cwd=ROOT,
            env={**self.environment, **variables},
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )

    def submit(self, output: Path, *words: str | Path, **variables: str) -> Job:
        """Submit a job that prints into a file.

        Args:
            output: The file.
            words: Options of sbatch, the file to submit, and what it takes.
            variables: For the job's environment.
        """
        done = self.run("sbatch", "--parsable", f"--output={output}", *words, **variables)
        assert done.returncode == 0, done.stderr
        return Job(self, done.stdout.strip(), output)

    def num_idle(self) -> int:
        seen = self.run("sinfo", "--noheader", "--Node", "--states=idle", "--format=%N")
        return len(set(seen.stdout.split()))

    def until(self, holds: Callable[[], bool], what: str, limit_s: float) -> None:
        """Look again and again until something holds; if it does not, show the daemons' logs."""
        try:
            until(holds, what, limit_s)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.daemons.ends_of_logs()}") from None

    def left_running(self, within_s: float) -> dict[int, str]:
        """Command lines, by pid, of what the jobs have left when the time is over."""
        with suppress(TimeoutError):
            until(lambda: not self.daemons.jobs_processes(), "jobs to end", within_s)
        return self.daemons.jobs_processes()


class Job:
    """A job that was submitted, or one task of an array."""

    def __init__(self, slurm: Slurm, number: str, output: Path) -> None:
        self._slurm = slurm
        self.number = number
        self._output = output

    @property
    def output(self) -> str:
        return self._output.read_text() if self._output.exists() else ""

    def facts(self) -> dict[str, str]:
        """What Slurm knows about it: JobState, ExitCode, Restarts, ..."""
        shown = self._slurm.run("scontrol", "--oneliner", "show", "job", self.number).stdout
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def says(self, text: str, limit_s: float) -> None:
        """Wait until its output contains a text."""
        self._until(lambda: text in self.output, f"'{text}'", limit_s)

    def ended(self, limit_s: float) -> tuple[str, int]:
        """Wait for its end, and return the state it ended in and its exit code."""
        going = ("PENDING", "RUNNING", "COMPLETING", "REQUEUED")
        self._until(lambda: self.facts().get("JobState") not in going, "its end", limit_s)
        facts = self.facts()
        return facts["JobState"], int(facts["ExitCode"].split(":")[0])

    def signal(self, name: str) -> None:
        """Send a signal as Slurm does before the time limit: to the batch script."""
        done = self._slurm.run("scancel", "--batch", f"--signal={name}", self.number)
        assert done.returncode == 0, done.stderr

    def cancel(self) -> None:
        self._slurm.run("scancel", self.number)

    def _until(self, holds: Callable[[], bool], what: str, limit_s: float) -> None:
        try:
            self._slurm.until(holds, f"job {self.number}: {what}", limit_s)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\noutput:\n{self.output}") from None
