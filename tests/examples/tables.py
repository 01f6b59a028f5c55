"""Put what `describe()` prints in each example into the page on groups and norms.

python -m tests.examples.tables
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.examples.play import NAMES, play
from tests.ranks.pool import RankPool

__all__ = ["PAGE", "RANKS", "names_in", "with_tables"]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "which-group-which-norm.md"
RANKS = 4

# A comment names the example; the block below it is the table of its rank 0.
_PLACE = re.compile(r"(<!-- table: (\w+) -->\n```text\n).*?(^```$)", re.MULTILINE | re.DOTALL)


def names_in(page: str) -> list[str]:
    """The examples whose tables a page shows."""
    return [match[2] for match in _PLACE.finditer(page)]


def with_tables(page: str, tables: Mapping[str, str]) -> str:
    """The page with these tables in their places."""
    return _PLACE.sub(lambda match: f"{match[1]}{tables[match[2]]}\n{match[3]}", page)


def main() -> None:
    """Run every example and rewrite the page."""
    with tempfile.TemporaryDirectory() as folder:
        pool = RankPool(Path(folder))
        try:
            tables = {name: play(pool, name, RANKS).table for name in NAMES}
        finally:
            pool.close()
    PAGE.write_text(with_tables(PAGE.read_text(), tables))


if __name__ == "__main__":
    main()
