"""Compiled for four GPUs, none of which is here, the kernels are what they are written to be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels import cases

ROOT = Path(__file__).resolve().parents[2]

# Each of these moves 16 bytes.
VECTORS = {
    "ld.global.v4.b32",
    "st.global.v4.b32",
    "ld.global.v2.b64",
    "st.global.v2.b64",
    "global_load_dwordx4",
    "global_store_dwordx4",
}
# A thread of 128 may have 64 while eight programs are to fit on a processor of 65536.
MOST_REGISTERS = 64


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    """What the program reports; in a process of its own, whose Triton does not interpret."""
    folder = tmp_path_factory.mktemp("compiled")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(folder / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "benchmarks/ahead_of_time.py", "--to", str(folder)]
    done = subprocess.run(
        [*command, *([] if cases.FULL else ["--few"])],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    print(done.stdout)
    [path] = folder.glob("*.json")
    return json.loads(path.read_text())["rows"]


def those_that(rows: list[dict], breaks) -> list[dict]:
    cases.checked(len(rows))
    return [row for row in rows if breaks(row)]


def loops(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["variant"] != "sum"]


def test_all_targets_and_all_kernels_are_compiled(rows):
    assert {row["target"] for row in rows} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    titles = {row["variant"].split(",")[0] for row in rows}
    whole = {"unscale", "check", "scale", "count", "unscale and squares", "check and squares"}
    assert titles == {*whole, "sum"}
    assert len(rows) >= (4 * 25 if cases.FULL else 2 * 13 + 2 * 2)


def test_whole_blocks_are_read_and_written_128_bits_at_a_time(rows):
    def is_narrow(row):
        return not row["loads"] or not {*row["loads"], *row["stores"]} <= VECTORS

    assert those_that(loops(rows), is_narrow) == []


def test_what_multiplies_stores_as_much_as_it_loads_and_nothing_else_stores(rows):
    def is_uneven(row):
        loaded, stored = (sum(row[key].values()) for key in ("loads", "stores"))
        return stored != (loaded if row["variant"].startswith(("unscale", "scale")) else 0)

    assert those_that(loops(rows), is_uneven) == []


def test_threads_do_not_meet_in_the_main_loop(rows):
    assert those_that(loops(rows), lambda row: row["exchanges"]) == []


def test_nothing_is_spilled_and_few_registers_are_used(rows):
    assert those_that(rows, lambda row: row["spills"]) == []
    assert those_that(rows, lambda row: not 0 < row["registers"] <= MOST_REGISTERS) == []


def test_denormals_are_kept(rows):
    assert those_that(rows, lambda row: row["flushes_denormals"]) == []


def test_no_float_is_added_atomically(rows):
    """The order of such additions is not the same twice."""
    assert those_that(rows, lambda row: row["float_atomics"]) == []
