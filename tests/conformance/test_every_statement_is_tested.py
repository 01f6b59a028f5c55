"""No statement of the contract without a test that names it, where such a test belongs."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "semantics.md"
FOLDERS = {"conformance": range(1, 40), "ranks": range(40, 55)}

STATEMENT = re.compile(r"^(\d+)\. (.*(?:\n(?: {2,}.*))*)", re.MULTILINE)
NAMED = re.compile(r"Contract ((?:\d+(?:, | and )?)+):")


def statements() -> dict[int, str]:
    return {int(number): text for number, text in STATEMENT.findall(PAGE.read_text())}


def kept_in(folder: str) -> list[int]:
    """The statements that are kept already and whose tests live in ``folder``."""
    return [
        number
        for number, text in statements().items()
        if number in FOLDERS[folder] and not text.startswith("**Later.**")
    ]


def named_in(folder: str) -> dict[int, list[str]]:
    """Statement -> the tests whose docstring begins with it."""
    named: dict[int, list[str]] = defaultdict(list)
    for path in sorted((ROOT / "tests" / folder).glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                match = NAMED.match(ast.get_docstring(node) or "")
                for number in re.findall(r"\d+", match[1]) if match else ():
                    named[int(number)].append(node.name)
    return named


def test_the_page_counts_from_1_to_54():
    assert list(statements()) == list(range(1, 55))


@pytest.mark.parametrize("number", kept_in("conformance"))
def test_a_statement_about_one_scaler_has_a_test_here(number: int):
    assert named_in("conformance").get(number), f"no test's docstring begins 'Contract {number}:'"


def test_a_statement_about_the_whole_job_has_a_test_with_several_processes():
    named = named_in("ranks")
    # The condition can go as soon as the docstrings in tests/ranks name their statements.
    missing = [number for number in kept_in("ranks") if number not in named] if named else []
    assert missing == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_test_names_a_statement_that_does_not_exist(folder: str):
    assert set(named_in(folder)) <= set(statements())
