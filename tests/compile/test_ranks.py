"""A compiled training step on two ranks: the bits of eager, one verdict, nothing of it traced."""

from __future__ import annotations

import os

import pytest
import torch
import torch._inductor.config
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.compile.step import SKIPPED, net, operators, same_bits, train

LAYOUTS = {"DDP": DistributedDataParallel, "FSDP2": fully_shard}


def train_both_ways(rank, size, layout, kind, calls, compiler, cache):
    """Numbers of eager and compiled; then breaks, ours and torch's; then what the graphs call."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    with torch._inductor.config.patch(compile_threads=1):
        # The Inf comes in on one rank alone, and all must skip.
        eager = train(LAYOUTS[layout](net()), kind, calls, None, overflows=rank == 1)
        compiled = train(LAYOUTS[layout](net()), kind, calls, compiler, overflows=rank == 1)
    torch._dynamo.reset()
    theirs = train(
        LAYOUTS[layout](net()), kind, calls, "eager", torch.amp.GradScaler, overflows=True
    )
    called = operators(compiled.graphs)
    return eager.numbers, compiled.numbers, compiled.breaks, theirs.breaks, called


@pytest.mark.parametrize(
    ("layout", "kind", "calls", "compiler"),
    [
        ("DDP", "foreach AdamW", "clip", "aot_eager"),  # the graphs of Inductor, run as they are
        ("FSDP2", "fused AdamW", "step", "inductor"),
    ],
)
def test_two_ranks_have_the_bits_of_eager_and_skip_together(
    layout, kind, calls, compiler, ranks, inductor_cache
):
    found = ranks.run(
        train_both_ways,
        2,
        group_timeout_s=60.0,  # one rank may wait for the other's compiler
        limit_s=100.0,
        layout=layout,
        kind=kind,
        calls=calls,
        compiler=compiler,
        cache=inductor_cache,
    )
    for eager, compiled, breaks, of_torch, called in found:
        assert same_bits(compiled, eager)
        assert breaks < of_torch
        assert called and not [name for name in called if "amp_" in name or "c10d" in name]
    scales = [numbers[1 : 2 * SKIPPED + 4 : 2] for _, numbers, *_ in found]
    assert scales[0] == scales[1] == [16.0, 32.0, 32.0, 64.0, 64.0, 32.0, 32.0]
