"""Compile the GPU kernels for GPUs that are not here, and read from the result what they cost.

    python benchmarks/ahead_of_time.py --to benchmarks/results/kernels
    python benchmarks/ahead_of_time.py --to some/folder --few

Compiled is what the library launches: its entry points are called with kernels that note their
arguments instead of running. Needs Triton, and no GPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from shardscale.kernels import triton as kernels
from shardscale.kernels.triton import source

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# With --few: what differs most between targets, and on two of them all of two dtypes.
FEW_EVERYWHERE = ["unscale and squares, float32", "unscale and squares, bfloat16"]
FEW_TARGETS = ["sm_90", "gfx942"]

_TYPES = {
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}


class Variant(NamedTuple):
    """One kernel as it is launched."""

    name: str
    kernel: Any
    args: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    enable_fp_fusion: bool


class Row(NamedTuple):
    """What the compiler made of a variant for a target."""

    variant: str
    target: str
    registers: int
    spills: int
    loads: dict[str, int]
    """In the main loop, by instruction."""
    stores: dict[str, int]
    exchanges: int
    """Shuffles, barriers and accesses to shared memory in the main loop."""
    flushes_denormals: bool
    float_atomics: int
    seconds: float


class Noting:
    """Stands for a kernel; notes how it would have been launched."""

    def __init__(self, kernel: Any, launches: list[Any]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Noting:
        return self

    def __call__(self, *args: Any, **options: Any) -> None:
        self.launches.append((self.kernel, args, options))


def variants() -> Iterator[Variant]:
    """All that the library launches."""
    half = torch.tensor(0.5)
    for dtype in DTYPES:
        grads = [torch.ones(3, dtype=dtype)]
        squares = torch.zeros((), dtype=torch.float64)
        calls = {
            "unscale": lambda g=grads: kernels.unscale_(g, half, torch.zeros(())),
            "unscale and squares": lambda g=grads, s=squares: kernels.unscale_(
                g, half, torch.zeros(()), s
            ),
            "check": lambda g=grads: kernels.check_(g, half, torch.zeros(())),
            "check and squares": lambda g=grads, s=squares: kernels.check_(
                g, half, torch.zeros(()), s
            ),
            "scale": lambda g=grads: kernels.scale_(g, half),
            "count": lambda g=grads: kernels.count(g),
        }
        for name, call in calls.items():
            for kernel, args, options in launches_of(call):
                of_sums = kernel is source.sum_kernel
                if of_sums and (dtype, name) != (torch.float32, "unscale and squares"):
                    continue  # knows no dtype
                title = "sum" if of_sums else f"{name}, {str(dtype).removeprefix('torch.')}"
                num_warps = options.pop("num_warps")
                fusion = options.pop("enable_fp_fusion")
                yield Variant(title, kernel, args, options, num_warps, fusion)


def launches_of(call: Any) -> list[Any]:
    launches: list[Any] = []
    names = [name for name in source.__all__ if name.endswith("_kernel")]
    noting = {name: Noting(getattr(source, name), launches) for name in names}
    with mock.patch.multiple(source, **noting):
        call()
    return launches


def compile_for(variant: Variant, target: GPUTarget) -> Any:
    """Triton's compiled kernel."""
    constants = dict(variant.constants)
    if "LANES" in constants:
        constants["LANES"] = variant.num_warps * target.warp_size
    signature, constexprs, attributes = {}, {}, {}
    for i, param in enumerate(variant.kernel.params):
        value = constants[param.name] if param.is_constexpr else variant.args[i]
        if param.is_constexpr or value is None:
            signature[param.name] = "constexpr"
            constexprs[i,] = value
        elif isinstance(value, torch.Tensor):
            signature[param.name] = _TYPES[value.dtype]
            if not param.do_not_specialize_on_alignment:
                attributes[i,] = [["tt.divisibility", 16]]
        else:
            signature[param.name] = "i32"
    return triton.compile(
        ASTSource(variant.kernel, signature, constexprs, attributes),
        target=target,
        options={"num_warps": variant.num_warps, "enable_fp_fusion": variant.enable_fp_fusion},
    )


def look(variant: Variant, name: str) -> Row:
    """Compile and read."""
    started = time.monotonic()
    compiled = compile_for(variant, TARGETS[name])
    seconds = time.monotonic() - started
    if TARGETS[name].backend == "cuda":
        text = compiled.asm["ptx"]
        registers, spills = resources(compiled.asm["cubin"])
        loop = main_loop(
            text,
            label=r"(\$L\w+):",
            jump=r"\bbra(?:\.uni)?\s+(\$L\w+)",
            certain=r"^\s*(?:bra|ret)\b",
            vector=r"\b(?:ld|st)\.global\S*\.v[24]\.",
        )
        flushes = ".ftz" in text
        atomics = re.findall(r"\b(?:atom|red)\.\S*\.(?:b?f16|f32|f64)", text)
        loads, stores = r"\bld\.global\.\S+", r"\bst\.global\.\S+"
        exchanges = r"\b(?:shfl|bar)\.\S+|\b(?:ld|st)\.shared\S*"
    else:
        text = compiled.asm["amdgcn"]
        [registers] = map(int, re.findall(r"\.vgpr_count: +(\d+)", text))
        spills = sum(map(int, re.findall(r"\.[sv]gpr_spill_count: +(\d+)", text)))
        loop = main_loop(
            text,
            label=r"(\.LBB\w+):",
            jump=r"\bs_c?branch\w*\s+(\.LBB\w+)",
            certain=r"\bs_branch\b|\bs_endpgm\b",
            vector=r"_(?:load|store)_dwordx4",
        )
        flushes = ".amdhsa_float_denorm_mode_32 3" not in text
        atomics = re.findall(r"\w*atomic_\w*(?:f16|f32|f64|fadd|fmin|fmax)\w*", text)
        loads = r"\b(?:global|buffer|flat)_load_\w+"
        stores = r"\b(?:global|buffer|flat)_store_\w+"
        exchanges = r"\b(?:ds_\w+|s_barrier|v_permlane\w+|v_\w+_dpp)"
    return Row(
        variant.name,
        name,
        registers,
        spills,
        dict(Counter(re.findall(loads, loop))),
        dict(Counter(re.findall(stores, loop))),
        len(re.findall(exchanges, loop)),
        flushes,
        len(atomics),
        round(seconds, 2),
    )


def main_loop(text: str, label: str, jump: str, certain: str, vector: str) -> str:
    """Of the innermost loops that with the most vectors, in whatever order its blocks lie.

    Args:
        text: Assembly.
        label: Finds a block's name at its first line.
        jump: Finds the name of the block that a line goes to.
        certain: Finds a line that never goes on to the next one.
        vector: Finds a vector that is loaded or stored.
    """
    blocks: list[list[str]] = [[]]
    begins: dict[str, int] = {}
    for line in text.splitlines():
        if found := re.match(label, line):
            blocks.append([])
            begins[found[1]] = len(blocks) - 1
        blocks[-1].append(line)
        if re.search(jump, line) or re.search(certain, line):
            blocks.append([])
    after: list[set[int]] = []
    for i, block in enumerate(blocks):
        last = block[-1] if block else ""
        target = re.search(jump, last)
        goes_on = not re.search(certain, last) and i + 1 < len(blocks)
        after.append({begins[target[1]]} if target else set())
        after[i] |= {i + 1} if goes_on else set()
    loops = natural_loops(after)
    inner = [loop for loop in loops if not any(other < loop for other in loops)]
    bodies = ["\n".join(line for i in sorted(loop) for line in blocks[i]) for loop in inner]
    return max(bodies, key=lambda body: len(re.findall(vector, body)), default="")


def natural_loops(after: list[set[int]]) -> list[set[int]]:
    """The loops of a flow graph that begins at 0: those of one head are one loop."""
    num = len(after)
    reached, waiting = {0}, [0]
    while waiting:
        new = after[waiting.pop()] - reached
        reached |= new
        waiting += new
    before = [{j for j in reached if i in after[j]} for i in range(num)]
    dominators = [{0}] + [set(range(num)) for _ in range(num - 1)]
    changed = True
    while changed:
        changed = False
        for i in range(1, num):
            through = [dominators[j] for j in before[i]]
            above = {i} | (set.intersection(*through) if through else set())
            changed |= above != dominators[i]
            dominators[i] = above
    loops: dict[int, set[int]] = {}
    for i in reached:
        for head in after[i] & dominators[i]:
            loop, waiting = loops.setdefault(head, {head}), [i]
            while waiting:
                block = waiting.pop()
                if block not in loop:
                    loop.add(block)
                    waiting += before[block]
    return list(loops.values())


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack and local memory: those are spills."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    [(registers, stack, local)] = re.findall(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", output)
    return int(registers), int(stack) + int(local)


def table(rows: list[Row]) -> str:
    head = "| variant | target | registers | spills | loads | stores | exchanges | s |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        widths = [
            ", ".join(f"{num} × {what}" for what, num in counted.items()) or "–"
            for counted in (row.loads, row.stores)
        ]
        cells = [row.variant, row.target, row.registers, row.spills, *widths]
        lines.append(f"| {' | '.join(map(str, [*cells, row.exchanges, row.seconds]))} |")
    return "\n".join(lines)


def keep(rows: list[Row], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "triton": triton.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": "python benchmarks/ahead_of_time.py --to benchmarks/results/kernels",
    }
    path = folder / f"ahead-of-time_triton-{triton.__version__}"
    text = json.dumps({**facts, "rows": [row._asdict() for row in rows]}, indent=1)
    path.with_name(path.name + ".json").write_text(text + "\n")
    intro = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    words = (
        "Loads, stores and exchanges (shuffles, barriers, shared memory) are those of one pass "
        "of the main loop by one thread; seconds are the compiler's. Nothing here has run."
    )
    path.with_name(path.name + ".md").write_text(
        f"# The GPU kernels, compiled ahead of time\n\n{intro}\n\n{words}\n\n{table(rows)}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--to", type=Path, required=True, help="folder for the report")
    parser.add_argument("--few", action="store_true", help="the variants that tell most")
    options = parser.parse_args()
    rows = []
    for variant in variants():
        for name in TARGETS:
            told = name in FEW_TARGETS and not variant.name.endswith(("float16", "float64"))
            # "bfloat16" ends with "float16", too.
            told = told or (name in FEW_TARGETS and variant.name.endswith("bfloat16"))
            if not options.few or told or variant.name in FEW_EVERYWHERE:
                rows.append(look(variant, name))
    keep(rows, options.to)
    print(table(rows))


if __name__ == "__main__":
    main()
