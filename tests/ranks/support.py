"""Write the support table of the docs from the results of the tests.

    python tests/ranks/support.py     # runs the tests of parallelisms, then writes docs/support.md

Every row is a test: what it shows, on how many ranks, its id and its result in this run.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "support.md"
# Files whose tests show what is supported -> what they are about.
FILES = {
    "test_every_layout.py": "One layout on a number of ranks, beside one process",
    "test_pipelines.py": "Pipeline schedules",
    "test_tensor_parallel.py": "Tensor and sequence parallelism",
    "test_experts.py": "Experts",
    "test_context_parallel.py": "Context parallelism",
    "test_mixed_models.py": "Several layouts in one model",
    "test_partial_training.py": "Frozen parameters and ranks without gradients",
    "test_accumulation.py": "Accumulation over micro-batches",
    "test_real_loops.py": "Loops in the shapes of well-known trainers",
    "test_devices.py": "Devices",
    "test_torch_clips.py": "torch's own clipping",
    "test_extremes.py": "Extreme gradients",
    "test_bad_layouts.py": "What is refused",
    "test_withheld.py": "Gradients that no_sync holds back",
}
_ID = re.compile(r"`(tests/ranks/\S+?::[^`]+)`")
_HEAD = """\
# What is supported

Every row is a test on real processes over Gloo, and its result when this page was written by
`make support`. An id runs again with `make test PYTEST_FLAGS="'ID'"`.
"""


class Result(NamedTuple):
    """What became of one test."""

    file: str
    name: str  # with its parameters
    outcome: str  # passed, failed, skipped

    @property
    def id(self) -> str:
        """As pytest takes it."""
        return f"tests/ranks/{self.file}::{self.name}"


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        flags = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        paths = [f"tests/ranks/{file}" for file in FILES]
        ended = subprocess.run(
            [sys.executable, "-m", "pytest", *flags, *paths], cwd=ROOT, check=False
        )
        results = list(read(report))
    PAGE.write_text(page(results))
    print(f"{len(results)} tests; the table is in {PAGE.relative_to(ROOT)}")
    return ended.returncode


def read(report: Path) -> Iterator[Result]:
    """The results in a junit report, in the order of the run."""
    for case in ElementTree.parse(report).iter("testcase"):
        bad = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        outcome = {"skipped": "skipped"}.get(bad[0], "failed") if bad else "passed"
        yield Result(
            f"{case.get('classname', '').split('.')[-1]}.py", case.get("name", ""), outcome
        )


def page(results: list[Result]) -> str:
    """The page as it is committed."""
    parts = [_HEAD, *_overview(results)]
    for file, title in FILES.items():
        rows = [result for result in results if result.file == file]
        parts.append(f"## {title}\n\n| what | on | test | result |\n|---|---|---|---|")
        parts += [f"| {_what(r)} | {_on(r)} | `{r.id}` | {r.outcome} |" for r in rows]
        parts.append("")
    return "\n".join(parts)


def _overview(results: list[Result]) -> list[str]:
    """Layouts by numbers of ranks: whether all of their tests passed."""
    passed: dict[str, dict[int, bool]] = {}
    for result in results:
        if result.file == "test_every_layout.py":
            layout, _, size = _parameters(result).rpartition("-")
            row = passed.setdefault(layout, {})
            row[int(size)] = row.get(int(size), True) and result.outcome == "passed"
    sizes = sorted({size for row in passed.values() for size in row})
    if not sizes:
        return []
    marks = {True: "passed", False: "**failed**", None: ""}
    lines = [
        "Training, skips, norms in float32 and bfloat16, and the number of collectives, by number",
        "of ranks; an empty field is a number that a mesh does not allow, or that is not tested:\n",
        f"| layout | {' | '.join(map(str, sizes))} |",
        "|---" * (len(sizes) + 1) + "|",
    ]
    for layout, row in passed.items():
        lines.append(f"| {layout} | {' | '.join(marks[row.get(size)] for size in sizes)} |")
    return [*lines, ""]


def ids_on_the_page() -> set[str]:
    """The tests that the committed table speaks of."""
    return set(_ID.findall(PAGE.read_text()))


def _what(result: Result) -> str:
    """The test's name as a sentence."""
    name, _, _ = result.name.partition("[")
    return name.removeprefix("test_").replace("_", " ")


def _on(result: Result) -> str:
    """Its parameters: for a layout, its name and number of ranks."""
    if result.file == "test_every_layout.py":
        layout, _, size = _parameters(result).rpartition("-")
        return f"{layout}, {size} rank{'s' if size != '1' else ''}"
    return _parameters(result).replace("-", ", ")


def _parameters(result: Result) -> str:
    return result.name.partition("[")[2].removesuffix("]")


if __name__ == "__main__":
    sys.exit(main())
