"""Files of the library stay small enough to be read in one go."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARY_FILES = sorted((ROOT / "shardscale").rglob("*.py"))

WITHOUT_REASON = 250
AT_MOST = 280
# File -> why it may have more than 250 lines of code. Never more than 280.
REASONS: dict[str, str] = {}

_NOT_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


def code_lines(source: str) -> int:
    """Count the lines that hold code: no blank line, no comment, no docstring."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NOT_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        # Strings that stand alone: docstrings, and those below an attribute.
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            lines.difference_update(range(node.lineno, node.end_lineno + 1))
    return len(lines)


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_only_code_is_counted():
    docstring = '"""Doc.\n\nMore.\n"""\n'
    source = f"{docstring}\n# why\nx = [  # list\n    1,\n]\n\n\ndef f():\n    {docstring}"
    assert code_lines(source) == 4


@pytest.mark.parametrize("path", LIBRARY_FILES, ids=label)
def test_a_file_is_short_or_has_a_reason(path: Path):
    count = code_lines(path.read_text())
    limit = AT_MOST if label(path) in REASONS else WITHOUT_REASON
    assert count <= limit, f"{label(path)} has {count} lines of code; split it"


@pytest.mark.parametrize("path", LIBRARY_FILES, ids=label)
def test_a_file_says_in_one_sentence_what_it_is(path: Path):
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    first = docstring.split("\n")[0]
    assert first.endswith("."), f"the first line of {label(path)} is not one sentence: {first!r}"


def test_every_reason_is_needed():
    for name in REASONS:
        assert code_lines((ROOT / name).read_text()) > WITHOUT_REASON, name
