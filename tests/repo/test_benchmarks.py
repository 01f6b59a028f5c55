"""The kernel benchmarks run end to end, keep what they have, and measure what they say."""

from __future__ import annotations

import importlib.util
import json
import math
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"


def load(name: str) -> ModuleType:
    """A file of the benchmarks, which are no package."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sets = load("gradient_sets")


def command(folder: Path, *more: str) -> list[str]:
    """A dry run of the program for GPUs that is recorded in ``folder``."""
    program = str(BENCHMARKS / "gpu.py")
    return [sys.executable, program, "--dry-run", "--rounds", "1", "--to", str(folder), *more]


def recorded(folder: Path) -> dict:
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


def test_a_dry_run_goes_from_end_to_end(tmp_path: Path):
    done = subprocess.run(
        command(tmp_path, "--only", "many_small", "sweep"),
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    result = recorded(tmp_path)
    dtypes = ["float32", "bfloat16", "float16"]
    for dtype in dtypes:
        ways = result["times"][f"3000 gradients of 21 elements, {dtype}"]
        assert "ours: fold_clip + fused AdamW" in ways, "the step was not measured"
        assert all(way["device_us"][0] > 0 and way["host_us"][0] > 0 for way in ways.values())
    sizes = {(point["dtype"], point["nbytes"]) for point in result["roofline"]}
    assert sizes == {(dtype, nbytes) for dtype in dtypes for nbytes in sets.SWEEP_BYTES[:4]}
    (table,) = tmp_path.glob("*.md")
    assert all(f"## {title}\n" in table.read_text() for title in result["rows"])
    has_plot = bool(list(tmp_path.glob("*.png")))
    assert has_plot == ("matplotlib is not installed" not in done.stdout)


def test_a_run_that_is_stopped_keeps_what_it_has(tmp_path: Path):
    with subprocess.Popen(
        command(tmp_path, "--only", "sweep", "llama", "many_small", "--rounds", "3"),
        stdout=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stdout is not None
        for line in running.stdout:
            if line.startswith("kept in"):  # the first of nine sets, by far the shortest
                running.send_signal(signal.SIGTERM)
                break
        rest = running.stdout.read()

    assert running.returncode == 0, rest
    assert "Stopped before the end." in rest
    result = recorded(tmp_path)
    assert result["stopped"] == "before the end, by a signal"
    assert next(iter(result["rows"])) == "single gradients, float32"
    assert len(result["rows"]) < 9


def test_without_a_gpu_it_says_so(tmp_path: Path):
    env = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu.py"), "--to", str(tmp_path)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout == ("There is no GPU here that torch can use, so nothing was measured.\n")
    assert not list(tmp_path.iterdir())


def numels(gradients) -> Sequence[int]:
    return [math.prod(shape) for shape in gradients.shapes]


def test_llama_is_the_model_cut_eight_ways():
    cut = sets.llama(2**31)

    # 8,030,261,248 is what the model's own card counts, in 291 tensors.
    assert len(cut.shapes) == 291
    assert cut.numel * 8 == 8_030_261_248


def test_llama_is_cut_further_where_memory_is_short():
    cut = sets.llama(2**29)

    assert cut.name == "Llama-3-8B cut 16 ways"
    assert cut.numel * 16 == 8_030_261_248


def test_three_thousand_are_three_thousand():
    assert sets.many_small(2**31).shapes == [(4096,)] * 3000


@pytest.mark.parametrize("max_numel", [2**18, 2**28, 2**31])
def test_uneven_sizes_are_as_many_and_as_different_as_they_say(max_numel: int):
    found = numels(sets.uneven(max_numel))
    room = min(10**9, max_numel)

    assert 0.75 * room <= sum(found) <= room
    assert min(found) == 1 and max(found) == min(10**8, room // 4)
    assert found == numels(sets.uneven(max_numel)), "the sizes are not the same each time"


@pytest.mark.parametrize("max_numel", [2**16, 2**28, 2**31])
def test_odd_sizes_fit_no_vector_and_lie_off_alignment(max_numel: int):
    gradients = sets.odd(max_numel)

    assert all(numel % 4 == 1 for numel in numels(gradients))
    assert gradients.shift == 1
    assert 0.75 * min(2**29, max_numel) <= gradients.numel <= max_numel


def test_the_sweep_is_from_4_kib_to_1_gib():
    assert sets.SWEEP_BYTES[0] == 4 * 2**10 and sets.SWEEP_BYTES[-1] == 2**30
    assert sets.single(2**30, 2).numel == 2**29
