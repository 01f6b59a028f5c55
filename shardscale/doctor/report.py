"""The report: shown as it grows, and written as JSON at the end."""

from __future__ import annotations

import json
import os
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from shardscale.doctor.codes import Code, Failure
from shardscale.doctor.sections import Judged, Section

__all__ = ["Report"]

_SCHEMA = 1


class Report:
    """What has been found so far.

    Args:
        out: Where it is shown.
        path: Where it is written; None for nowhere.
    """

    def __init__(self, out: TextIO, path: Path | None = None) -> None:
        self._out = out
        self._path = path
        self._title = ""
        self.failures: list[Failure] = []
        self.found: dict[str, dict[int, Any]] = {}
        """By part and by rank: what that rank found."""

    @property
    def code(self) -> Code:
        """The exit code: that of the first failure."""
        return self.failures[0].code if self.failures else Code.WELL

    def add(self, part: str, found: Mapping[int, Any], judged: Judged) -> None:
        """Keep what the ranks found, show and note what it means."""
        self.found[part] = dict(found)
        for section in judged.sections:
            self.show(section)
        self.failures += judged.failures

    def with_hosts(self, values: Mapping[int, str]) -> dict[int, str]:
        """Add to what is said of a rank where it runs, if that is known."""
        facts = self.found.get("facts", {})
        return {
            rank: f"{value} (on {facts[rank]['host']})" if rank in facts else value
            for rank, value in values.items()
        }

    def show(self, section: Section) -> None:
        """Print a table; those that follow each other under one title are one table."""
        if section.title != self._title:
            self._say(f"\n{section.title}")
        self._title = section.title
        for line in _lines(section.rows):
            self._say(line)

    def fail(self, failure: Failure) -> None:
        """Note something that is wrong; it is shown at the end, too."""
        self.failures.append(failure)

    def conclude(self) -> Code:
        """Print what is wrong and the exit code, which not every launcher hands on; write it, too.

        Returns:
            The exit code.
        """
        self._say("")
        if self._path is not None:
            try:
                self._write(self._path)
            except OSError as error:
                self.fail(Failure(Code.USAGE, f"--json {self._path}: {error}."))
        for failure in self.failures:
            text = f"{failure.code.name}: {failure.what}"
            self._say(textwrap.fill(text, _width(), subsequent_indent="  "))
        self._say("All is well." if self.code is Code.WELL else f"exit code {self.code.value}")
        return self.code

    def _write(self, path: Path) -> None:
        """Write all that was found; a reader never meets half a file."""
        text = json.dumps(
            {
                "schema": _SCHEMA,
                "code": self.code.value,
                "failures": [{"code": f.code.name, "what": f.what} for f in self.failures],
                "found": self.found,
            },
            indent=1,
        )
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")
        unfinished.write_text(text + "\n")
        unfinished.replace(path)

    def _say(self, line: str) -> None:
        try:
            self._out.write(line.rstrip() + "\n")
            self._out.flush()
        except BrokenPipeError:
            # As by `head`. The other ranks, the file and the exit code need the rest all the same.
            # The descriptor, because what is left in the buffer is written at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._out.fileno())


def _lines(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns side by side; the last one is wrapped."""
    if not rows:
        return []
    widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        start = "  " + "".join(
            cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=False)
        )
        room = max(_width() - len(start), 30)
        wrapped = textwrap.wrap(row[-1], room) or [""]
        lines += [start + wrapped[0], *(" " * len(start) + more for more in wrapped[1:])]
    return lines


def _width() -> int:
    return shutil.get_terminal_size((120, 24)).columns
