"""Pages tell the truth: their links lead somewhere and their code runs."""

from __future__ import annotations

import doctest
import importlib
import json
import pkgutil
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(p for p in (ROOT / "docs").rglob("*.md") if "_build" not in p.parts)]
)

# The info string `python no-run` marks a block that needs what a test machine has not; it is
# compiled all the same. GitHub and Sphinx read only the first word.
FENCE = re.compile(
    r"^(?P<indent> *)(?P<ticks>```+)(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)(?P=ticks) *$",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"\[[^\]\n]*\]\((?P<target>[^)\s]+)\)")


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


def links_of(text: str) -> list[str]:
    """The relative links of a page, without those that only look like one inside code."""
    prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))
    targets = [match["target"] for match in LINK.finditer(prose)]
    return [t for t in targets if not re.match(r"[a-z]+:|#", t)]


def program_of(page: Path) -> str:
    """All python blocks of a page as one program, each on the lines where the page has it."""
    text = page.read_text()
    lines = [""] * (text.count("\n") + 1)
    for match in FENCE.finditer(text):
        words = match["info"].split()
        if words[:1] != ["python"]:
            continue
        assert words[1:] in ([], ["no-run"]), f"{label(page)}: unknown fence {match['info']!r}"
        first = text.count("\n", 0, match.start("body"))
        indent = len(match["indent"])
        body = [line[indent:] for line in match["body"].split("\n")[:-1]]
        compile("\n" * first + "\n".join(body), label(page), "exec")
        if not words[1:]:
            lines[first : first + len(body)] = body
    return "\n".join(lines)


# Reads {page: program} and runs each in a fork of a process that has imported torch once; a warning
# is an error, as in the tests.
RUNNER = """
import json, os, sys, traceback, warnings
import torch._dynamo  # the first optimizer of a process would import it
from shardscale import ShardedGradScaler, skip_on_device  # imported at their first use

outcomes = {}
for name, program in json.load(sys.stdin).items():
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            warnings.simplefilter("error")
            exec(compile(program, name, "exec"), {"__name__": "__main__"})
        except BaseException:
            os.write(writes, traceback.format_exc().encode())
            os._exit(1)
        os._exit(0)
    os.close(writes)
    error = open(reads, "rb").read().decode()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    outcomes[name] = error or (f"ended with {code}" if code else "")
print(json.dumps(outcomes))
"""


def errors_of(programs: dict[str, str], folder: Path) -> dict[str, str]:
    """What went wrong in each program, each run in a process of its own; empty if nothing did."""
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps(programs),
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def page_errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    programs = {label(page): program_of(page) for page in PAGES}
    return errors_of(programs, tmp_path_factory.mktemp("pages"))


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_relative_links_lead_somewhere(page: Path):
    for target in links_of(page.read_text()):
        path = page.parent / target.split("#")[0]
        assert path.exists(), f"{label(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_python_blocks_run_in_order(page: Path, page_errors: dict[str, str]):
    assert page_errors[label(page)] == ""


def test_a_wrong_page_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "[gone](no/such.md) [there](page.md) `[not](a link)`\n"
        "```python\nx = 1\n```\n```python no-run\nx = 2\n```\n```python\nassert x == 2\n```\n"
    )
    assert links_of(page.read_text()) == ["no/such.md", "page.md"]
    programs = {"page.md": program_of(page), "crash.md": "import os; os.abort()"}
    errors = errors_of(programs, tmp_path)
    assert 'File "page.md", line 9' in errors["page.md"]
    assert errors["crash.md"] == "ended with -6"

    page.write_text("```python no-run\nx =\n```\n")
    with pytest.raises(SyntaxError):
        program_of(page)


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "_static").glob("*.py")), ids=label)
def test_a_picture_is_what_its_script_draws(path: Path):
    script = runpy.run_path(str(path))
    assert script["PICTURE"].read_text() == script["picture"]()


def test_the_page_shows_the_table_that_the_model_of_latency_makes():
    model = runpy.run_path(str(ROOT / "docs" / "_static" / "latency.py"))
    assert model["table"]() in (ROOT / "docs" / "very-many-ranks.md").read_text()


def modules() -> list[str]:
    """Every module of the library by name, found without importing it."""
    root = ROOT / "shardscale"
    found = pkgutil.walk_packages([str(root)], "shardscale.", onerror=lambda name: None)
    return ["shardscale", *(each.name for each in found if not each.name.endswith("__main__"))]


@pytest.mark.parametrize("name", modules())
def test_examples_in_docstrings_run(name: str):
    module = importlib.import_module(name)
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0
