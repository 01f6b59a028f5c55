"""Draw how near each way to unscale comes to the roofline, by the size of one gradient.

    python benchmarks/plot_roofline.py RESULT.json OUT.png

RESULT.json is what benchmarks/cpu.py or benchmarks/gpu.py recorded. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["draw", "lines"]

# Way -> colour and marker; told apart without colours, too.
WAYS = {
    "ours: unscale_": ("#0a58b6", "o"),
    "ours: unscale_ with the sum": ("#8250df", "s"),
    "torch: unscale_": ("#bc4c00", "^"),
}
LABELS = {
    "ours: unscale_": "shardscale, unscale_",
    "ours: unscale_ with the sum": "shardscale, unscale_ and the norm",
    "torch: unscale_": "torch, unscale_",
}
KIB, MIB, GIB = 2**10, 2**20, 2**30
# Type of device -> the field of the record, and its name. On a CPU a copy reads what it writes,
# too, so that it is no roofline for work in place.
ROOFLINES = {
    "cuda": ("of_copy_", "copy_ of as many bytes"),
    "cpu": ("of_mul_", "mul_ in place of as many bytes"),
}
# What is higher is cut off: one round that was disturbed must not flatten all lines.
HIGHEST = 3
STAND_IN = " (torch: _foreach_mul_, unchecked)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, help="a recorded JSON")
    parser.add_argument("picture", type=Path, help="where the PNG goes")
    chosen = parser.parse_args()
    print(draw(json.loads(chosen.result.read_text()), chosen.picture))


def lines(result: Mapping[str, Any]) -> dict[tuple[str, str], list[tuple[int, list[float]]]]:
    """By dtype and way: bytes of the gradient; median, p20, p80 of its fraction of the roofline.

    Args:
        result: What was recorded.
    """
    field, _ = ROOFLINES[result["device_type"]]
    found: dict[tuple[str, str], list[tuple[int, list[float]]]] = {}
    for point in result["roofline"]:
        if point["way"] in WAYS:
            line = found.setdefault((point["dtype"], point["way"]), [])
            line.append((point["nbytes"], point[field]))
    return {key: sorted(line) for key, line in found.items()}


def draw(result: Mapping[str, Any], picture: Path) -> str:
    """One panel for each dtype, one line for each way; a sentence that says what became of it.

    Args:
        result: What was recorded.
        picture: Where the PNG goes.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        return "No plot was drawn, because matplotlib is not installed."
    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = lines(result)
    dtypes = list(dict.fromkeys(dtype for dtype, _ in found))
    sizes = sorted({nbytes for line in found.values() for nbytes, _ in line})
    highest = max(middle for line in found.values() for _, (middle, _, _) in line)
    figure, panels = pyplot.subplots(
        1,
        len(dtypes),
        figsize=(1.2 + 3.8 * len(dtypes), 4.3),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for panel, dtype in zip(panels[0], dtypes, strict=True):
        panel.axhline(1, color="#57606a", linewidth=1, linestyle="--")
        for way, (colour, marker) in WAYS.items():
            line = found.get((dtype, way), [])
            x = [nbytes for nbytes, _ in line]
            middle, low, high = zip(*(fraction for _, fraction in line), strict=True)
            panel.plot(x, middle, color=colour, marker=marker, markersize=4, label=LABELS[way])
            panel.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        panel.set_xscale("log", base=2)
        panel.set_xticks(sizes[::2], [size_of(nbytes) for nbytes in sizes[::2]], fontsize=8)
        panel.minorticks_off()
        panel.set_ylim(0, min(max(1.1, 1.08 * highest), HIGHEST))
        points = [point for point in result["roofline"] if point["dtype"] == dtype]
        stands_in = not all(point["torch_checks"] for point in points)
        panel.set_title(dtype + (STAND_IN if stands_in else ""), fontsize=11)
        panel.grid(color="#d0d7de", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    _, roofline = ROOFLINES[result["device_type"]]
    panels[0][0].set_ylabel(f"speed, as a fraction of\n{roofline}")
    panels[0][len(dtypes) // 2].set_xlabel("size of one gradient")
    figure.suptitle(f"{result['device']}, torch {result['torch']}", fontsize=11)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=150)
    pyplot.close(figure)
    return f"The plot is in {picture}."


def size_of(nbytes: int) -> str:
    """``16 KiB`` for 16384."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB")):
        if nbytes >= unit:
            return f"{nbytes // unit} {name}"
    return f"{nbytes // KIB} KiB"


if __name__ == "__main__":
    main()
