"""Unscaling and clipping on the CPU by one thread, beside torch's.

    python benchmarks/cpu.py [--quick] [--only llama sweep] [--rounds N] [--memory GIB]
                             [--to FOLDER] [--plot PNG]

The sets are larger than any cache, as far as the memory allows. What was measured is written after
each set, so a run may be stopped at any time.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import memory
import record
import scaler_host_time
import torch
from clocks import Clock
from gradient_sets import SETS, SWEEP_BYTES
from kernel_bench import Bench, Limits
from side_by_side import Row

from shardscale.kernels import backend_name

GIB = 2**30
FOLDER = record.RESULTS / "kernels"
# A set in memory: its gradients, then parameters and two moments; the rest is for all else.
NUM_COPIES = 5
QUICK_NUMEL = 2**18
MORE = ("allocations", "host")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sets, nothing recorded")
    words = ("sweep", *SETS, *MORE)
    parser.add_argument("--only", nargs="+", choices=words, default=words, help="what to measure")
    parser.add_argument("--rounds", type=int, help="how often each way is timed")
    parser.add_argument("--memory", type=float, default=10, help="GiB to stay within")
    parser.add_argument("--to", type=Path, help="the folder to record in")
    parser.add_argument("--plot", type=Path, help="the plot's file, if not beside the result")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    num_rounds = chosen.rounds or (3 if chosen.quick else 11)
    max_bytes = int(chosen.memory * GIB / NUM_COPIES)
    limits = Limits(
        num_rounds,
        max_bytes,
        max_numel=QUICK_NUMEL if chosen.quick else 2**31,
        sweep_bytes=[n for n in SWEEP_BYTES if n <= (2**20 if chosen.quick else max_bytes)],
    )
    env = record.environment(
        record.cpu_name(),
        device_type="cpu",
        backend=backend_name(torch.device("cpu")),
        threads=1,
        memory_gib=chosen.memory,
        rounds=num_rounds,
    )
    for key, value in env.items():
        print(f"{key}: {value}")
    tables: dict[str, tuple[str, Callable[[], list[Row]]]] = {
        "allocations": ("Allocations", memory.rows),
        "host": (
            "Host time of the scaler",
            functools.partial(scaler_host_time.rows, 5 if chosen.quick else 50),
        ),
    }
    more = dict(tables[word] for word in chosen.only if word in tables)
    only = [word for word in chosen.only if word not in tables]
    folder = chosen.to or (None if chosen.quick else FOLDER)
    clock = Clock(torch.device("cpu"))
    return Bench(clock, limits, env, "kernels", folder, chosen.plot).run(only, more)


if __name__ == "__main__":
    sys.exit(main())
