"""Unscaling and clipping on a GPU, beside torch's.

    python benchmarks/gpu.py [--quick] [--only llama sweep] [--rounds N] [--minutes M]
                             [--to FOLDER] [--plot PNG] [--dry-run]

Needs torch 2.11 or newer and, for the plot alone, matplotlib. Without a GPU it says so and ends
well; ``--dry-run`` goes the same way on the host with tiny sets, to show that the program runs.
What was measured is written after each set, so a run may be stopped at any time.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import record
import torch
from clocks import Clock
from gradient_sets import SWEEP_BYTES
from kernel_bench import Bench, Limits

from shardscale.kernels import backend_name

FOLDER = record.RESULTS / "kernels"
# How many tensors and blocks one launch of torch's takes: with CUDA 13 the first of two numbers.
HEADER = Path("include/ATen/native/cuda/MultiTensorApply.cuh")
ORDER = ["llama", "many_small", "sweep", "odd", "uneven", "huge"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds, nothing recorded")
    parser.add_argument("--only", nargs="+", choices=ORDER, default=ORDER, help="the sets")
    parser.add_argument("--rounds", type=int, help="how often each way is timed")
    parser.add_argument("--minutes", type=float, default=8.5, help="no set begins after these")
    parser.add_argument("--to", type=Path, help="the folder to record in")
    parser.add_argument("--plot", type=Path, help="the plot's file, if not beside the result")
    parser.add_argument("--dry-run", action="store_true", help="tiny sets on the host")
    chosen = parser.parse_args()
    if not chosen.dry_run and not torch.cuda.is_available():
        print("There is no GPU here that torch can use, so nothing was measured.")
        return 0
    is_short = chosen.quick or chosen.dry_run
    limits = Limits(
        num_rounds=chosen.rounds or (3 if is_short else 30),
        max_bytes=8 * 2**30,
        max_numel=2**31,
        deadline_s=60 * chosen.minutes,
    )
    device = torch.device("cuda", torch.cuda.current_device()) if not chosen.dry_run else None
    if device is None:
        torch.set_num_threads(1)
        limits = limits._replace(max_numel=2**16, sweep_bytes=SWEEP_BYTES[:4])
    clock = Clock(device or torch.device("cpu"))
    env = environment(clock.device, limits.num_rounds)
    for key, value in env.items():
        print(f"{key}: {value}")
    print("".join(f"{HEADER.name}: {line}\n" for line in table_sizes()), flush=True)
    folder = chosen.to or (None if is_short else FOLDER)
    theme = "kernels-dry-run" if chosen.dry_run else "kernels"
    return Bench(clock, limits, env, theme, folder, chosen.plot).run(chosen.only, {})


def environment(device: torch.device, num_rounds: int) -> dict[str, object]:
    """What a reader must know, and what explains the numbers."""
    is_gpu = device.type == "cuda"
    try:
        import triton
    except ModuleNotFoundError:
        version = "none"
    else:
        version = triton.__version__
    return record.environment(
        torch.cuda.get_device_name(device) if is_gpu else f"dry run on {record.cpu_name()}",
        device_type=device.type,
        backend=backend_name(device),
        triton=version,
        cuda=torch.version.cuda,
        hip=torch.version.hip,
        torch_tables=table_sizes(),
        rounds=num_rounds,
    )


def table_sizes() -> list[str]:
    """The lines of torch's header that say how many tensors and blocks one launch takes."""
    header = Path(torch.__file__).parent / HEADER
    if not header.exists():
        return ["not among the installed headers"]
    words = ("CUDART_VERSION", "constexpr int depth_to_max_tensors[", "int depth_to_max_blocks[")
    lines = header.read_text().splitlines()
    return [line.strip() for line in lines if any(word in line for word in words)]


if __name__ == "__main__":
    sys.exit(main())
