"""Measure shardscale beside torch's own scalers and record the result.

    python benchmarks/run.py [--quick] [--only collectives many_shards] [--to FOLDER] [--theme NAME]

Every number of ours stands beside torch's from the same run, taken in turns. Without ``--quick``
the result goes to ``benchmarks/results``; ``--quick`` shows that the benchmarks run, and records
nothing unless told where to.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import bring_up
import collectives
import compiled
import growth
import host_reads
import many_shards
import memory
import one_process
import record
import verdict_time
import waiting
from side_by_side import Row

# Name -> (title, rows as a function of the number of rounds, rounds, rounds if quick).
GROUPS: dict[str, tuple[str, Callable[[int], list[Row]], int, int]] = {
    "collectives": ("Collectives per call", lambda _: collectives.rows(), 0, 0),
    "host_reads": ("Host reads per iteration", lambda _: host_reads.rows(), 0, 0),
    "compiled": ("A training step compiled", lambda _: compiled.rows(), 0, 0),
    "memory": ("Memory", lambda _: memory.rows(), 0, 0),
    "many_shards": ("Many shards, two ranks", many_shards.rows, 300, 20),
    "one_process": ("One process", one_process.rows, 500, 30),
    "growth": ("Time beside the number of parameters, two ranks", growth.rows, 30, 3),
    "waiting": ("Not waiting for the device", waiting.rows, 100, 3),
    "bring_up": ("Starting torch.distributed", bring_up.rows, 100, 5),
    "verdict_time": ("A verdict beside its all-reduce", verdict_time.rows, 200, 10),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds, nothing recorded")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--to", type=Path, help="the folder to record in")
    parser.add_argument(
        "--theme", default="versus-torch", help="the beginning of the result's name"
    )
    chosen = parser.parse_args()

    groups = {}
    for name in chosen.only:
        title, rows, num_rounds, num_if_quick = GROUPS[name]
        started = time.monotonic()
        groups[title] = rows(num_if_quick if chosen.quick else num_rounds)
        seconds = time.monotonic() - started
        print(f"\n## {title} ({seconds:.0f} s)\n\n{record.table(groups[title])}", flush=True)

    folder = chosen.to or (None if chosen.quick else record.RESULTS)
    if folder is not None:
        rounds = {
            name: GROUPS[name][3 if chosen.quick else 2] for name in chosen.only if GROUPS[name][2]
        }
        env = record.environment(record.cpu_name(), threads=1, backend="gloo", rounds=rounds)
        print(f"\nrecorded in {record.keep(chosen.theme, env, groups, folder)}")


if __name__ == "__main__":
    main()
