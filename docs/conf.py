"""The site's settings: Sphinx, Markdown pages, an API page made from the docstrings."""

from __future__ import annotations

import re
from importlib.metadata import version as installed_version

project = "shardscale"
author = "the shardscale developers"
copyright = "2026, the shardscale developers"
version = release = installed_version("shardscale")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "changes/*.*.md"]  # fragments are read at a release
html_theme = "furo"
html_title = f"shardscale {release}"
html_copy_source = False
myst_heading_anchors = 3  # lets one page link to a heading of another

add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
# What a class inherits from torch is torch's to document.
autodoc_inherit_docstrings = False
napoleon_numpy_docstring = False

_OUR_SECTION = re.compile(r"(Collective|Sync|Source):(.*)")
_ANY_SECTION = re.compile(r"\w[\w ]*:(\s|$)")


def _sections_to_fields(app, what, name, obj, options, lines: list[str]) -> None:
    """Turn our own docstring sections into fields, so that they stand with Args and Returns."""
    result: list[str] = []
    inside = False
    for line in lines:
        ours = _OUR_SECTION.match(line)
        if ours:
            if not inside:
                result.append("")
            result.append(f":{ours[1]}:{ours[2]}")
            inside = True
        elif inside and line and not line.startswith(" ") and not _ANY_SECTION.match(line):
            # The text of a section may go on below its name without being indented.
            inside = bool(result[-1])
            result.append(f"    {line}" if inside else line)
        else:
            if inside and line and not line.startswith(" "):
                result.append("")
                inside = False
            result.append(line)
    lines[:] = [*result, ""]


def _skip_tuple_fields(app, what, name, obj, skip, options) -> bool | None:
    """Leave out the fields of a NamedTuple: its signature lists them, with their types."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field") else None


def setup(app) -> None:
    """Register the two hooks; the first must come before napoleon's, which has priority 500."""
    app.connect("autodoc-process-docstring", _sections_to_fields, priority=400)
    app.connect("autodoc-skip-member", _skip_tuple_fields)
