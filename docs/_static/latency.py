"""Draw latency.svg: a model of the time of one small all-reduce, from 16 to 100,000 GPUs.

python docs/_static/latency.py          # draws, and prints the table of docs/very-many-ranks.md
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

PICTURE = Path(__file__).with_name("latency.svg")

GPUS_PER_NODE = 8
# NCCL's tuner, src/graph/tuning.cc at commit 01afd20: microseconds of the LL protocol, whose steps
# inside a node take 1.8 times as long where there are several.
TREE_BASE, TREE_NVLINK, TREE_NET = 4.4, 0.52 * 1.8, 5.0
RING_BASE, RING_NVLINK, RING_NET = 3.6, 0.47 * 1.8, 2.7
GLOO_STEP = 50.0  # measured: benchmarks/results/training-step
BAND = 3  # a real time is expected between the model's and this many times it


def num_nodes(num_gpus: int) -> int:
    return math.ceil(num_gpus / GPUS_PER_NODE)


def nccl_tree(num_gpus: int) -> float:
    """Up and down a chain inside each node and a binary tree of nodes; in microseconds."""
    hops = math.floor(math.log2(num_nodes(num_gpus)))
    return TREE_BASE + 2 * ((GPUS_PER_NODE - 1) * TREE_NVLINK + hops * TREE_NET)


def nccl_ring(num_gpus: int) -> float:
    """Twice round all GPUs; in microseconds."""
    num_steps, num_between_nodes = 2 * (num_gpus - 1), 2 * (num_nodes(num_gpus) - 1)
    inside = (num_steps - num_between_nodes) * RING_NVLINK
    return RING_BASE + inside + num_between_nodes * RING_NET


def gloo(num_gpus: int) -> float:
    """Twice round all ranks, on their hosts; in microseconds."""
    return 2 * (num_gpus - 1) * GLOO_STEP


class Curve(NamedTuple):
    """One transport."""

    name: str
    time_us: Callable[[int], float]
    kind: str
    """Its class in the picture."""


CURVES = [
    Curve("Gloo, ring", gloo, "gloo"),
    Curve("NCCL, ring", nccl_ring, "ring"),
    Curve("NCCL, tree", nccl_tree, "tree"),
]
NUM_GPUS = (16, 128, 1_024, 4_096, 16_384, 100_000)


def table() -> str:
    """The model's times as Markdown."""
    lines = ["| GPUs | nodes | NCCL, tree | NCCL, ring | Gloo, ring |", "|---|---|---|---|---|"]
    for num in NUM_GPUS:
        times = (f"{words(f(num))} – {words(BAND * f(num))}" for f in (nccl_tree, nccl_ring, gloo))
        lines.append(f"| {num:,} | {num_nodes(num):,} | {' | '.join(times)} |")
    return "\n".join(lines)


def words(time_us: float) -> str:
    """Two digits and a unit."""
    factor, unit = (1e6, "s") if time_us >= 1e6 else (1e3, "ms") if time_us >= 1e3 else (1, "µs")
    return f"{float(f'{time_us / factor:.2g}'):g} {unit}"


# --- The picture: both axes are logarithmic. ------------------------------------------------------

LEFT, TOP, WIDTH, HEIGHT = 74, 54, 520, 330
RIGHT = 120  # room for the names of the curves
X = (16, 100_000)
Y = (10.0, 1e8)
TICKS = [10.0**power for power in range(1, 9)]
STEP_PERCENT = 1e4  # 1 % of a training step of a second
POINTS = [round(16 * (100_000 / 16) ** (i / 60)) for i in range(61)]

# The picture brings its own ground, so that it can be read on a light page and on a dark one.
STYLE = """
  text { font-family: system-ui, sans-serif; font-size: 12px; fill: #1f2328 }
  .ground { fill: #ffffff }
  .title { font-weight: 600; font-size: 13px }
  .dim { fill: #57606a; font-size: 11px }
  .grid { stroke: #d0d7de; fill: none }
  .mark { stroke: #57606a; stroke-dasharray: 4 3; fill: none }
  .line { fill: none; stroke-width: 2 }
  .band { opacity: .18 }
  .line.tree { stroke: #0a58b6 } .line.ring { stroke: #8250df } .line.gloo { stroke: #bc4c00 }
  .band.tree { fill: #0a58b6 } .band.ring { fill: #8250df } .band.gloo { fill: #bc4c00 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 }
    .ground { fill: #161b22 }
    .dim { fill: #a3adb8 }
    .grid { stroke: #30363d }
    .mark { stroke: #a3adb8 }
    .line.tree { stroke: #79b8ff } .line.ring { stroke: #d2a8ff } .line.gloo { stroke: #ffa657 }
    .band.tree { fill: #79b8ff } .band.ring { fill: #d2a8ff } .band.gloo { fill: #ffa657 }
  }
"""


def x_of(num_gpus: float) -> float:
    return LEFT + WIDTH * math.log(num_gpus / X[0]) / math.log(X[1] / X[0])


def y_of(time_us: float) -> float:
    return TOP + HEIGHT * (1 - math.log(time_us / Y[0]) / math.log(Y[1] / Y[0]))


def text(x: float, y: float, says: str, kind: str = "", anchor: str = "start") -> str:
    said = escape(says)
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{said}</text>'


def path(points: list[tuple[float, float]], kind: str, is_closed: bool = False) -> str:
    drawn = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path d="M{drawn}{"Z" if is_closed else ""}" class="{kind}"/>'


def curve(each: Curve) -> list[str]:
    """The model's time, the band above it, and its name at the right end."""
    low = [(x_of(num), y_of(each.time_us(num))) for num in POINTS]
    high = [(x_of(num), y_of(BAND * each.time_us(num))) for num in POINTS]
    x, y = low[-1]
    return [
        path(low + high[::-1], f"band {each.kind}", is_closed=True),
        path(low, f"line {each.kind}"),
        text(x + 8, (y + high[-1][1]) / 2 + 4, each.name),
    ]


def axes() -> list[str]:
    drawn = []
    for time_us in TICKS:
        drawn.append(path([(LEFT, y_of(time_us)), (LEFT + WIDTH, y_of(time_us))], "grid"))
        drawn.append(text(LEFT - 8, y_of(time_us) + 4, words(time_us), "dim", "end"))
    for num in NUM_GPUS:
        drawn.append(path([(x_of(num), TOP), (x_of(num), TOP + HEIGHT)], "grid"))
        drawn.append(text(x_of(num), TOP + HEIGHT + 18, f"{num:,}", "dim", "middle"))
    drawn.append(text(LEFT + WIDTH / 2, TOP + HEIGHT + 36, "GPUs, 8 a node", "dim", "middle"))
    return drawn


def picture() -> str:
    """The three curves, and where 1 % of a step of a second is."""
    width, height = LEFT + WIDTH + RIGHT, TOP + HEIGHT + 48
    y = y_of(STEP_PERCENT)
    drawn = [
        text(LEFT, 22, "One all-reduce of two numbers: a model, not a measurement", "title"),
        text(LEFT, 38, f"line: the model; band: up to {BAND} times it", "dim"),
        *axes(),
        *(part for each in CURVES for part in curve(each)),
        path([(LEFT, y), (LEFT + WIDTH, y)], "mark"),
        text(LEFT + WIDTH - 6, y + 14, "1 % of a step of one second", "dim", "end"),
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            'role="img" aria-labelledby="what">',
            '<title id="what">Modelled time of a small all-reduce from 16 to 100,000 GPUs: on '
            "NCCL's tree it stays below half a millisecond, on rings it grows with the GPUs."
            "</title>",
            f"<style>{STYLE}</style>",
            f'<rect width="{width}" height="{height}" class="ground"/>',
            *drawn,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    PICTURE.write_text(picture())
    print(table())
