"""The floors of the library: a module knows what lies below it, and nothing else."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "shardscale"

# Unit (a module or a subpackage of shardscale) -> floor.
FLOORS = {
    "records": 0,
    "caller": 0,
    "capturing": 0,
    "errors": 0,
    "policy": 1,
    "kernels": 1,
    "comm": 1,
    "holders": 1,
    "owners": 1,
    "preemption": 1,
    "saved_values": 1,
    "withheld": 1,
    "untraced": 1,
    "metrics": 1,
    "arguments": 2,
    "backward": 2,
    "bring_up": 2,
    "outputs": 2,
    "fused": 2,
    "shards": 2,
    "layouts": 2,
    "placements": 2,
    "replay": 2,
    "stages": 2,
    "stamps": 2,
    "verdict": 2,
    "drift": 2,
    "factors": 2,
    "ledger": 2,
    "diagnose": 2,
    "saved_state": 2,
    "checkpoint": 3,
    "dispute": 3,
    "examine": 3,
    "gate": 3,
    "judge": 3,
    "obey": 3,
    "scaler": 3,
    "stopping": 3,
    "torch_names": 3,
    "": 3,  # shardscale/__init__.py
    # What runs the library and what tests it: they may know all of it, and none of it knows them.
    "testing": 4,
    "demo": 4,
    "cli": 4,
    "doctor": 4,
    "__main__": 4,
}
# The floors on which one unit may import another.
OPEN_FLOORS = {0, 3, 4}
# (importer, imported) -> why this import within a closed floor is right all the same.
EXCEPTIONS: dict[tuple[str, str], str] = {}
# What every unit may import; torch itself depends on typing_extensions.
CORE = {"shardscale", "torch", "numpy", "typing_extensions"}
# Unit -> the libraries besides torch, numpy and the standard library that it may import.
GUESTS = {
    "comm": {"mpi4py"},  # where MPIComm is made, and where ranks under mpirun meet
    "cli": {"typer", "rich"},
    "demo": {"typer", "rich", "sklearn"},
    "kernels": {"triton"},  # where it is installed, and never at import
}
# What people run uses what people may use, so the demo and the command line count as programs.
PROGRAMS = (
    "launch",
    "slurm",
    "examples",
    "benchmarks",
    "shardscale/demo",
    "shardscale/cli.py",
)
# The demo, and the programs that start it in another way.
RUN_THE_DEMO = ("shardscale/demo/", "shardscale/cli.py", "launch/")
# Program -> what it may import besides, because that is what it is about.
ABOUT = {
    "benchmarks/ahead_of_time.py": {"shardscale.kernels.triton"},
    "launch/torchrun.py": {"shardscale.comm.nodelist"},
    "shardscale/cli.py": {"shardscale.doctor.command"},
}
PUBLIC_MODULES = {
    "shardscale",
    "shardscale.checkpoint",
    "shardscale.comm",
    "shardscale.kernels",
    "shardscale.metrics",
    "shardscale.policy",
    "shardscale.testing",
}


class Import(NamedTuple):
    """One imported module, with the name taken from it if there is one."""

    module: str
    name: str | None
    line: int


def imports_of(source: str, package: str) -> Iterator[Import]:
    """Every import in ``source``, at whatever depth, with relative ones made absolute.

    Imports under ``if TYPE_CHECKING`` count too: what a type needs, a reader needs.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, None, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                module = importlib.util.resolve_name("." * node.level + module, package)
            for alias in node.names:
                yield Import(module, alias.name, node.lineno)


def unit_of(path: Path) -> str:
    """``shardscale/comm/base.py`` -> ``comm``; ``shardscale/scaler.py`` -> ``scaler``."""
    first = path.relative_to(LIBRARY).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def package_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).parent.parts)


def unit_imported(found: Import) -> str | None:
    """The unit of the library that an import reaches, or None if it reaches outside."""
    parts = found.module.split(".")
    if parts[0] != "shardscale":
        return None
    if len(parts) > 1:
        return parts[1]
    return found.name if found.name in FLOORS else ""


def breaches(unit: str, package: str, source: str) -> list[str]:
    """What ``source``, as a file of ``unit``, imports although its floor does not allow it."""
    floor = FLOORS[unit]
    found = []
    for each in imports_of(source, package):
        other = unit_imported(each)
        if other is None or other == unit or (unit, other) in EXCEPTIONS:
            continue
        allowed = FLOORS[other] < floor or (FLOORS[other] == floor and floor in OPEN_FLOORS)
        if not allowed:
            found.append(f"line {each.line}: {unit or '__init__'} imports {other or 'shardscale'}")
    return found


LIBRARY_FILES = sorted(LIBRARY.rglob("*.py"))
PROGRAM_FILES = sorted(
    path
    for name in PROGRAMS
    for path in ([ROOT / name] if name.endswith(".py") else (ROOT / name).rglob("*.py"))
)


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_every_unit_has_a_floor():
    units = {unit_of(path) for path in LIBRARY_FILES}
    assert units, "no library was found"
    assert units - FLOORS.keys() == set()


@pytest.mark.parametrize("path", LIBRARY_FILES, ids=label)
def test_a_module_imports_only_what_lies_below(path: Path):
    assert breaches(unit_of(path), package_of(path), path.read_text()) == []


@pytest.mark.parametrize(
    ("unit", "line"),
    [
        ("records", "from .policy import DynamicScale"),
        ("policy", "import shardscale.kernels"),
        ("comm", "def f():\n    from ..verdict import agree"),
        ("shards", "from shardscale import verdict"),
        ("verdict", "from shardscale import ShardedGradScaler"),
        ("scaler", "from shardscale.testing import inject"),
    ],
)
def test_a_breach_is_seen(unit: str, line: str):
    package = "shardscale.comm" if unit == "comm" else "shardscale"
    assert len(breaches(unit, package, line)) == 1


def test_every_exception_is_needed():
    """An exception that nobody uses any more is a hole in the floor."""
    used = set()
    for path in LIBRARY_FILES:
        for each in imports_of(path.read_text(), package_of(path)):
            used.add((unit_of(path), unit_imported(each)))
    stale = {pair for pair in EXCEPTIONS if pair not in used}
    assert stale == set()


@pytest.mark.parametrize("path", LIBRARY_FILES, ids=label)
def test_the_core_needs_torch_and_numpy_alone(path: Path):
    allowed = CORE | GUESTS.get(unit_of(path), set())
    for each in imports_of(path.read_text(), package_of(path)):
        library = each.module.split(".")[0]
        assert library in allowed or library in sys.stdlib_module_names, (
            f"line {each.line} imports {library}"
        )


@pytest.mark.parametrize("path", PROGRAM_FILES, ids=label)
def test_programs_use_only_public_names(path: Path):
    of_the_demo = label(path).startswith(RUN_THE_DEMO)
    for each in imports_of(path.read_text(), package_of(path)):
        if each.module.split(".")[0] != "shardscale":
            continue
        if each.module.startswith("shardscale.demo") or each.name == "demo":
            assert of_the_demo, f"line {each.line} imports {each.module}"
            continue
        if ABOUT.get(label(path), set()) & {each.module, f"{each.module}.{each.name}"}:
            continue
        assert each.module in PUBLIC_MODULES, f"line {each.line} imports {each.module}"
        offered = importlib.import_module(each.module).__all__
        assert each.name in (None, *offered), f"line {each.line} imports {each.name}"
