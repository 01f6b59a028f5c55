"""Draw meshes.svg: on which rank of a mesh which part of a model lies, and who counts it.

python docs/_static/meshes.py
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

PICTURE = Path(__file__).with_name("meshes.svg")


class Mesh(NamedTuple):
    """Four ranks in rows; a part in brackets is a copy that another rank counts."""

    title: str
    says: str
    down: str
    """The axis along which the rows follow one another, if there are several."""
    across: str
    ranks: list[list[list[str]]]


MESHES = [
    Mesh("DDP", "every rank holds all", "", "dp", [[["W"], ["(W)"], ["(W)"], ["(W)"]]]),
    Mesh("FSDP", "every rank holds some rows", "", "dp", [[["W₀"], ["W₁"], ["W₂"], ["W₃"]]]),
    Mesh(
        "HSDP",
        "the nodes hold copies",
        "replicate",
        "shard",
        [[["W₀"], ["W₁"]], [["(W₀)"], ["(W₁)"]]],
    ),
    Mesh(
        "Pipeline and FSDP2",
        "the stages hold other layers: copies=distinct",
        "pp",
        "dp",
        [[["first₀"], ["first₁"]], [["last₀"], ["last₁"]]],
    ),
    Mesh(
        "Tensor parallelism",
        "a layer is split, a norm is not",
        "",
        "tp",
        [[["up₀", "norm"], ["up₁", "(norm)"], ["up₂", "(norm)"], ["up₃", "(norm)"]]],
    ),
    Mesh(
        "Experts",
        "experts have ranks of their own: copies=distinct",
        "",
        "ep",
        [[[f"router{i}", f"expert{i}"] for i in "₀₁₂₃"]],
    ),
    Mesh(
        "FSDP2 and tensor parallelism",
        "a head outside the plan: copies= its tp group",
        "dp",
        "tp",
        [
            [["up₀₀", "head₀"], ["up₀₁", "(head₀)"]],
            [["up₁₀", "head₁"], ["up₁₁", "(head₁)"]],
        ],
    ),
    Mesh(
        "Pipeline",
        "the stages hold other layers: copies=distinct",
        "",
        "pp",
        [[[f"layer {i}"] for i in range(4)]],
    ),
]
COLUMNS, PANEL, MARGIN, GUTTER = 2, 348, 16, 16
AXIS = 34  # room on the left for the name of the axis that goes down
LINE, PART = 14, 20

# The picture brings its own ground, so that it can be read on a light page and on a dark one.
STYLE = """
  text { font-family: system-ui, sans-serif; font-size: 12px; fill: #1f2328 }
  .ground { fill: #ffffff; stroke: #d0d7de }
  .title { font-weight: 600; font-size: 13px }
  .dim { fill: #57606a; font-size: 11px }
  .rank { fill: #f6f8fa; stroke: #8c959f }
  .axis { stroke: #57606a; fill: none }
  .tip { fill: #57606a }
  .counted { fill: #0a58b6 }
  .on { fill: #ffffff; font-weight: 600 }
  .copy { fill: none; stroke: #57606a; stroke-dasharray: 3 2 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 }
    .ground { fill: #161b22; stroke: #30363d }
    .dim { fill: #a3adb8 }
    .rank { fill: #21262d; stroke: #6e7681 }
    .axis { stroke: #a3adb8 }
    .tip { fill: #a3adb8 }
    .counted { fill: #79b8ff }
    .on { fill: #0d1117 }
    .copy { stroke: #a3adb8 }
  }
"""


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, kind: str) -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" class="{kind}"/>'
    )


def part(x: float, y: float, width: float, name: str) -> list[str]:
    """One part of the model on one rank: filled where it is counted, dashed where it is not."""
    is_copy = name.startswith("(")
    return [
        box(x, y, width, PART - 4, "copy" if is_copy else "counted"),
        text(x + width / 2, y + 12, name.strip("()"), "" if is_copy else "on", "middle"),
    ]


def arrow(x: float, y: float, length: float, name: str, goes_down: bool) -> list[str]:
    """The name of an axis, and the way in which its ranks follow one another."""
    if goes_down:
        middle = y + length / 2
        turned = f'transform="rotate(-90 {x - 7:g} {middle:g})"'
        return [
            f'<path d="M{x:g} {y:g}v{length - 4:g}" class="axis"/>',
            f'<path d="M{x - 4:g} {y + length - 6:g}h8l-4 6z" class="tip"/>',
            text(x - 7, middle, name, "dim", "middle").replace("<text", f"<text {turned}"),
        ]
    begin = x + 7 * len(name) + 4
    return [
        text(x, y + 4, name, "dim"),
        f'<path d="M{begin:g} {y:g}H{x + length - 4:g}" class="axis"/>',
        f'<path d="M{x + length - 6:g} {y - 4:g}v8l6 -4z" class="tip"/>',
    ]


def rank_height(mesh: Mesh) -> float:
    return LINE + 8 + PART * max(len(parts) for row in mesh.ranks for parts in row)


def panel_height(mesh: Mesh) -> float:
    return 62 + len(mesh.ranks) * (rank_height(mesh) + 8)


def panel(mesh: Mesh, x: float, y: float) -> list[str]:
    """One mesh: title, axes, ranks and what they hold."""
    left = x + (AXIS if mesh.down else 10)
    width = x + PANEL - 10 - left
    across = len(mesh.ranks[0])
    step = (width + 8) / across
    top, high = y + 62, rank_height(mesh)
    drawn = [
        text(x + 10, y + 18, mesh.title, "title"),
        text(x + 10, y + 34, mesh.says, "dim"),
        *arrow(left, y + 49, width, mesh.across, goes_down=False),
    ]
    if mesh.down:
        length = len(mesh.ranks) * (high + 8) - 8
        drawn += arrow(left - 10, top, length, mesh.down, goes_down=True)
    for i, row in enumerate(mesh.ranks):
        for j, parts in enumerate(row):
            at, below = left + j * step, top + i * (high + 8)
            drawn.append(box(at, below, step - 8, high, "rank"))
            drawn.append(text(at + 6, below + LINE, f"rank {i * across + j}", "dim"))
            for number, name in enumerate(parts):
                drawn += part(at + 6, below + LINE + 6 + PART * number, step - 20, name)
    return drawn


def picture() -> str:
    """All meshes, two in a row, with a legend below."""
    rows = [MESHES[i : i + COLUMNS] for i in range(0, len(MESHES), COLUMNS)]
    width = 2 * MARGIN + COLUMNS * PANEL + (COLUMNS - 1) * GUTTER
    drawn: list[str] = []
    y = MARGIN
    for row in rows:
        high = max(map(panel_height, row))
        for j, mesh in enumerate(row):
            x = MARGIN + j * (PANEL + GUTTER)
            drawn += [box(x, y, PANEL, high, "ground"), *panel(mesh, x, y)]
        y += high + GUTTER
    drawn += [*part(MARGIN + 10, y, 60, "part"), text(MARGIN + 78, y + 12, "this rank counts it")]
    drawn += [
        *part(MARGIN + 240, y, 60, "(part)"),
        text(MARGIN + 308, y + 12, "a copy; another does"),
    ]
    height = y + PART + MARGIN - 4
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
            'role="img" aria-labelledby="what">',
            '<title id="what">Meshes of four ranks, and which rank counts which part.</title>',
            f"<style>{STYLE}</style>",
            f'<rect width="{width:g}" height="{height:g}" class="ground" stroke="none"/>',
            *drawn,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    PICTURE.write_text(picture())
