"""Keep a result as JSON for programs and as a table in Markdown for people."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from side_by_side import Row

import shardscale

__all__ = ["environment", "keep", "table"]

RESULTS = Path(__file__).resolve().parent / "results"


def environment(device: str, **more: Any) -> dict[str, Any]:
    """What a reader must know to repeat it."""
    return {
        "device": device,
        "date": datetime.date.today().isoformat(),
        "shardscale": shardscale.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": " ".join(["python", *sys.argv]),
        **more,
    }


def cpu_name() -> str:
    """The processor's name and how many cores of it there are."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"model name\s*: (.*)", info.read_text())):
        name = found[1]
    return f"{name}, {os.cpu_count()} cores"


def keep(
    theme: str,
    env: Mapping[str, Any],
    groups: Mapping[str, Sequence[Row]],
    folder: Path = RESULTS,
    times: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``theme_hardware_date.json`` and ``.md``; the path of the second.

    Args:
        theme: The beginning of the name.
        env: What :func:`environment` returned.
        groups: Rows by the title of their table.
        folder: Where to.
        times: More for programs to read, by its name in the JSON.
    """
    hardware = re.sub(r"[^a-z0-9]+", "-", env["device"].lower()).strip("-")
    path = folder / f"{theme}_{hardware}_{env['date']}"
    rows = {name: [row._asdict() for row in group] for name, group in groups.items()}
    folder.mkdir(parents=True, exist_ok=True)
    document = {**env, "rows": rows, **(times or {})}
    replace(path.with_suffix(".json"), json.dumps(document, indent=1) + "\n")
    title = theme.replace("_", " ").capitalize()
    facts = "\n".join(f"- {key}: {value}" for key, value in env.items())
    tables = "\n\n".join(f"## {name}\n\n{table(group)}" for name, group in groups.items())
    replace(path.with_suffix(".md"), f"# {title}\n\n{facts}\n\n{tables}\n")
    return path.with_suffix(".md")


def replace(path: Path, text: str) -> None:
    """Write a file as a whole or not at all, so that a stopped program leaves the one before."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(text)
    beside.replace(path)


def table(rows: Sequence[Row]) -> str:
    """Markdown; the notes stand below."""
    lines = ["| what | ours | against | ratio (p20 – p80) | goal | |", "|---|---|---|---|---|---|"]
    notes: list[str] = []
    for row in rows:
        mark = ""
        if row.note:
            if row.note not in notes:
                notes.append(row.note)
            mark = f" [{notes.index(row.note) + 1}]"
        ratio = ""
        if row.ratio is not None:
            middle, low, high = row.ratio
            ratio = f"{row.of} = **{middle:.2f}** ({low:.2f} – {high:.2f})"
        reached = {None: "", True: "reached", False: "missed"}[row.reached]
        cells = (row.what + mark, _number(row.ours, row.unit), _number(row.theirs, row.unit))
        lines.append(f"| {' | '.join(cells)} | {ratio} | {row.goal} | {reached} |")
    lines += [f"\n[{i}] {note}" for i, note in enumerate(notes, 1)]
    return "\n".join(lines)


def _number(value: float | str | None, unit: str) -> str:
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    digits = 0 if unit == "" or abs(value) >= 100 else 1 if abs(value) >= 1 else 3
    return f"{value:.{digits}f} {unit.replace('us', 'µs')}".rstrip()
