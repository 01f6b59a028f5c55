"""The support table speaks of the tests that there are, and of no failed one."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.ranks import support


def test_every_row_is_a_test_and_every_test_a_row():
    """Regenerate the page with `make support`."""
    paths = [f"tests/ranks/{file}" for file in support.FILES]
    collected = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *paths],
        cwd=support.ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    tests = {line for line in collected.stdout.splitlines() if "::" in line}
    assert support.ids_on_the_page() == tests


def test_every_row_passed():
    rows = [line for line in support.PAGE.read_text().splitlines() if "`tests/ranks/" in line]
    assert rows
    assert [row for row in rows if not row.endswith("| passed |")] == []


@pytest.mark.parametrize(
    ("child", "outcome"),
    [("", "passed"), ("<failure/>", "failed"), ("<error/>", "failed"), ("<skipped/>", "skipped")],
)
def test_a_result_is_read_as_it_was(tmp_path, child, outcome):
    report = tmp_path / "report.xml"
    report.write_text(
        "<testsuites><testsuite><testcase classname='tests.ranks.test_every_layout' "
        f"name='test_a_call[HSDP-8]'>{child}</testcase></testsuite></testsuites>"
    )
    [result] = support.read(report)
    assert result.id == "tests/ranks/test_every_layout.py::test_a_call[HSDP-8]"
    row = f"| a call | HSDP, 8 ranks | `{result.id}` | {outcome} |"
    assert row in support.page([result]).splitlines()
