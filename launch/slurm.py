"""Writes jobs for Slurm, and submits them: `python launch/slurm.py torchrun --nodes 4 --submit`.

Without --submit it prints the file for sbatch; those in slurm/ are what it prints if little is
asked. It needs Python alone, so it runs on a login node that has no torch.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from sbatch import Job, option, render

__all__ = ["main", "submit"]

# Said by sbatch (22.05) without a slurm.conf, and where its controller is not running.
_NO_ANSWER = re.compile(
    "Could not establish a configuration source|Unable to process configuration file"
    "|Unable to contact slurm controller"
)


def main(words: Sequence[str]) -> None:
    """Print the job that the words of the command line ask for, or submit it."""
    end = words.index("--") if "--" in words else len(words)
    words, arguments = words[:end], words[end + 1 :]
    parser = argparse.ArgumentParser(
        usage="%(prog)s LAUNCHER [options] [--submit [-- arguments of the program]]",
        description=(__doc__ or "").partition("\n")[0],
    )
    parser.add_argument("launcher", help="what starts the ranks: srun, torchrun or mpi")
    for each in fields(Job):
        if each.name != "launcher":
            kind = int if "int" in str(each.type) else str
            text = each.metadata["help"] + ("" if each.default in ("", None) else " (%(default)s)")
            parser.add_argument(option(each.name), type=kind, default=each.default, help=text)
    parser.add_argument("--submit", action="store_true", help="submit it instead of printing it")
    asked = vars(parser.parse_args(words))
    is_submitted = asked.pop("submit")
    if arguments and not is_submitted:
        parser.error(f"'{' '.join(arguments)}' is for the program, which runs only with --submit.")
    if asked["launcher"] == "requeue":  # a name in slurm/, beside those of the launchers
        parser.error(
            "requeue is an option of the launchers, as in: "
            "python launch/slurm.py srun --max-requeues 3"
        )
    try:
        job = Job(**asked)
    except ValueError as error:
        parser.error(str(error))
    print(submit(job, arguments) if is_submitted else render(job), end="")


def submit(job: Job, arguments: Sequence[str] = ()) -> str:
    """Submit a job, after Slurm has said that it could run, and return what Slurm says to it.

    Args:
        job: The job.
        arguments: For its program.

    Raises:
        SystemExit: Slurm is not here, does not answer or refuses the job; the text says why.
    """
    if shutil.which("sbatch") is None:
        sys.exit("There is no sbatch in PATH: submit on a login node of the cluster.")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{job.name}.sbatch"
        path.write_text(render(job))
        for test in (["--test-only"], []):
            done = subprocess.run(
                ["sbatch", *test, str(path), *arguments],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode == 0:
                continue
            if silent := _NO_ANSWER.search(done.stderr):
                sys.exit(f"No Slurm answers ({silent[0]}): submit on a login node of the cluster.")
            sys.exit(f"Slurm refuses the job: {done.stderr.strip()}")
    return done.stdout


if __name__ == "__main__":
    main(sys.argv[1:])
