"""Plant each defect of ``mutants.py`` in a copy of the tree and see that the tests catch it.

    python tests/mutants/run.py [words]     # only mutants whose name holds one of these words

A mutant is caught when each test that it names fails on it, in its call: a test that cannot be
collected or set up shows nothing, and neither does a mutant that is no longer valid Python or, if
it is in C, does not compile. All the tests named must pass on an unmutated copy.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))
from mutants import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("shardscale", "launch", "tests", "pyproject.toml", "docs", "README.md", "CONTRIBUTING.md")
NOT_COPIED = shutil.ignore_patterns("__pycache__", "_build")
AT_ONCE = 2
LIMIT_S = 150  # for the tests that a mutant names
UNMUTATED_LIMIT_S = 900  # for those that all of them do
# What a typing error in the mutant itself would look like; such a mutant shows nothing.
BROKEN = re.compile(r"\b(SyntaxError|IndentationError|NameError|ImportError|ModuleNotFoundError)\b")


class Run(NamedTuple):
    """What one run of pytest came to."""

    outcomes: list[dict[str, str]] | None  # None: it hung, or ended before it could say
    hung: bool
    output: str
    seconds: float


class Judged(NamedTuple):
    """One mutant's fate in words."""

    caught: bool
    line: str


def main(words: Sequence[str]) -> int:
    chosen = [m for m in MUTANTS if not words or any(word in m.name for word in words)]
    stale = [complaint for m in chosen if (complaint := why_stale(m))]
    if stale:
        print("\n".join(stale))
        return 1
    started = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="mutants-") as folder,
        ThreadPoolExecutor(AT_ONCE) as pool,
    ):
        sane = baseline(chosen, Path(folder), pool)
        if not sane:
            return 1
        jobs = [
            pool.submit(judge, mutant, Path(folder) / str(i)) for i, mutant in enumerate(chosen)
        ]
        caught = 0
        for job in jobs:
            judged = job.result()
            caught += judged.caught
            print(judged.line, flush=True)
    print(f"{caught} of {len(chosen)} mutants caught in {time.monotonic() - started:.0f} s")
    return 0 if caught == len(chosen) else 1


def why_stale(mutant: Mutant) -> str | None:
    """Why the mutant cannot be planted any more, or None."""
    path = ROOT / mutant.file
    if not path.exists():
        return f"STALE   {mutant.name}: {mutant.file} does not exist; mend it in mutants.py"
    text = path.read_text()
    found = text.count(mutant.old)
    if found != 1:
        return (
            f"STALE   {mutant.name}: its text occurs {found} times in {mutant.file}, not once; "
            f"mend it in mutants.py. It is\n{mutant.old}"
        )
    if is_in_c(mutant):
        return None  # the compiler will say
    try:
        ast.parse(text.replace(mutant.old, mutant.new))
    except SyntaxError as error:
        return f"STALE   {mutant.name}: the mutated {mutant.file} is not Python: {error}"
    return None


def is_in_c(mutant: Mutant) -> bool:
    return mutant.file.endswith((".c", ".h"))


def baseline(mutants: Sequence[Mutant], folder: Path, pool: ThreadPoolExecutor) -> bool:
    """Whether every test that is named exists and passes on the tree as it is."""
    named = sorted({test for mutant in mutants for test in mutant.caught_by})
    missing = [test for test in named if not (ROOT / test.split("::")[0]).exists()]
    if missing:
        print("There is no such test:", *missing, sep="\n  ")
        return False
    halves = [half for i in range(AT_ONCE) if (half := named[i::AT_ONCE])]
    trees = [folder / f"unmutated{i}" for i in range(len(halves))]
    run_all = functools.partial(run_tests, limit_s=UNMUTATED_LIMIT_S)
    runs = list(pool.map(run_all, trees, halves))
    sane = True
    for half, run in zip(halves, runs, strict=True):
        outcomes = run.outcomes or []
        failed = [o["nodeid"] for o in outcomes if o["outcome"] == "failed"]
        not_run = [test for test in half if not matching(test, outcomes)]
        if run.outcomes is None or failed or not_run:
            sane = False
            print(run.output[-6000:])
            print("On the unmutated tree these fail:", *failed, sep="\n  ")
            print("and these did not run:", *not_run, sep="\n  ")
    if sane:
        seconds = max(run.seconds for run in runs)
        num = sum(len(run.outcomes or []) for run in runs)
        print(f"unmutated: {num} tests pass ({seconds:.0f} s)", flush=True)
    return sane


def judge(mutant: Mutant, tree: Path) -> Judged:
    """Plant the mutant in a copy and see whether each test that it names fails."""
    run = run_tests(tree, mutant.caught_by, mutant)
    shutil.rmtree(tree)
    if run.hung:
        return Judged(True, f"caught  {mutant.name}: the tests hang ({run.seconds:.0f} s)")
    outcomes = run.outcomes
    if outcomes is None:
        return Judged(False, f"ESCAPED {mutant.name}: pytest ended early\n{run.output[-3000:]}")
    by, silent = [], []
    for test in mutant.caught_by:
        failed = [o for o in matching(test, outcomes) if catches(o)]
        (by if failed else silent).append(test)
    if silent:
        excuses = {o["text"][-600:] for o in outcomes if o["outcome"] == "failed"}
        return Judged(
            False,
            f"ESCAPED {mutant.name}: not caught by {', '.join(silent)} ({run.seconds:.0f} s)\n"
            + "\n".join(excuses),
        )
    names = ", ".join(test.rsplit("/")[-1] for test in by)
    return Judged(True, f"caught  {mutant.name}: by {names} ({run.seconds:.0f} s)")


def matching(test: str, outcomes: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """The outcomes of a node id, and of what lies below it."""
    return [o for o in outcomes if re.match(re.escape(test) + r"($|\[|::)", o["nodeid"])]


def catches(outcome: dict[str, str]) -> bool:
    """Whether a test failed as a test: in its call, and not because the mutant is no program."""
    failed = outcome["when"] == "call" and outcome["outcome"] == "failed"
    return failed and not BROKEN.search(outcome["text"])


def run_tests(
    tree: Path, tests: Sequence[str], mutant: Mutant | None = None, limit_s: float = LIMIT_S
) -> Run:
    """Run tests in a copy of the tree, mutated or not."""
    copy_tree(tree)
    if mutant is not None:
        path = tree / mutant.file
        path.write_text(path.read_text().replace(mutant.old, mutant.new))
        if is_in_c(mutant) and (complaint := rebuild(path.parent)):
            return Run(None, False, complaint, 0.0)
    kept = tree / "outcomes.json"
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree),
        "MUTANT_TREE": str(tree),
        "MUTANT_OUTCOMES": str(kept),
        "TRITON_INTERPRET": "1",  # other tests of the same run may import Triton first
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.mutants.guard"]
    command += ["-p", "no:cacheprovider", "--timeout=60", *tests]
    started = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=tree,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
        hung = False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        hung = True
    outcomes = json.loads(kept.read_text()) if kept.exists() else None
    return Run(outcomes, hung, output, time.monotonic() - started)


def rebuild(folder: Path) -> str | None:
    """Compile the extension whose sources lie in ``folder``; why that cannot be done, or None."""
    built = list(folder.glob("*.so"))
    if len(built) != 1:
        return f"{folder} holds {len(built)} compiled extensions, not one; is there a compiler?"
    built[0].unlink()
    command = ["cc", "-shared", "-fPIC", "-std=c11", "-O2", "-ffp-contract=off", "-pthread"]
    command += ["-I", sysconfig.get_path("include"), "-o", str(built[0])]
    command += map(str, sorted(folder.glob("*.c")))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"the mutant does not compile\n{done.stderr}" if done.returncode else None


def copy_tree(to: Path) -> None:
    to.mkdir(parents=True)
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=NOT_COPIED)
        elif source.exists():
            shutil.copy2(source, to / name)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
