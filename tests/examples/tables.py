"""Put what the examples print into the pages that show it: tables of layouts, outputs of patterns.

python -m tests.examples.tables
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.examples.play import NAMES, play
from tests.ranks.pool import RankPool

__all__ = ["LAYOUTS", "PATTERNS", "RANKS", "excerpts", "outputs", "shown", "with_blocks"]

DOCS = Path(__file__).resolve().parents[2] / "docs"
LAYOUTS = DOCS / "which-group-which-norm.md"
PATTERNS = DOCS / "patterns.md"
RANKS = 4

# A comment names the example; the block below it is its rank 0's table, or all that it printed
# before that, or lines of its program.
_BLOCK = re.compile(
    r"(<!-- (table|output|lines): (\w+) -->\n```[^\n]+\n)(.*?)(^```)$", re.MULTILINE | re.DOTALL
)


def shown(page: str, kind: str) -> list[tuple[str, str]]:
    """Name and text of each block of a kind."""
    return [
        (match[3], match[4].rstrip("\n")) for match in _BLOCK.finditer(page) if match[2] == kind
    ]


def outputs(page: str) -> dict[str, str]:
    """What a page says that each example prints."""
    return dict(shown(page, "output"))


def excerpts(page: str) -> list[tuple[str, str]]:
    """The lines of examples that a page shows, each with the example's name."""
    return shown(page, "lines")


def with_blocks(page: str, kind: str, texts: Mapping[str, str]) -> str:
    """The page with these texts in the blocks of a kind."""

    def new(match: re.Match[str]) -> str:
        text = f"{texts[match[3]]}\n" if match[2] == kind else match[4]
        return f"{match[1]}{text}{match[5]}"

    return _BLOCK.sub(new, page)


def main() -> None:
    """Run every example and rewrite the pages."""
    with tempfile.TemporaryDirectory() as folder:
        pool = RankPool(Path(folder))
        try:
            printed = {name: play(pool, name, RANKS) for name in NAMES}
        finally:
            pool.close()
    tables = {name: found.table for name, found in printed.items()}
    LAYOUTS.write_text(with_blocks(LAYOUTS.read_text(), "table", tables))
    texts = {name: found.text for name, found in printed.items()}
    PATTERNS.write_text(with_blocks(PATTERNS.read_text(), "output", texts))


if __name__ == "__main__":
    main()
