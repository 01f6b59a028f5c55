"""The demo's training job for torchrun: `torchrun --nproc-per-node 4 launch/train.py --steps 100`.

torchrun has started the ranks, on one machine or many; this program is one of them. It trains, and
rank 0 shows what every rank ended with. Exit code on every rank: 0 if the ranks agree, 3 if they
diverged, 2 for an option that cannot be used.
"""

from __future__ import annotations

import os
import sys

import torch.distributed as dist
import typer

from shardscale.demo.data import share_digits
from shardscale.demo.flags import Inject, Json, Optimizer, Scaler, Steps, Wrap
from shardscale.demo.job import device_type_for, joined_group, train
from shardscale.demo.options import OptionError, check_json, check_options
from shardscale.demo.play import conclude, exit_code, make_console
from shardscale.demo.progress import show_progress


def main(
    wrap: Wrap = None,
    optimizer: Optimizer = None,
    scaler: Scaler = None,
    inject: Inject = None,
    steps: Steps = 150,
    json: Json = None,
) -> None:
    """Train this rank's part of the demo's model."""
    if "RANK" not in os.environ:
        sys.exit("launch/train.py: start it with torchrun --nproc-per-node 4 launch/train.py")
    is_first = os.environ["RANK"] == "0"
    try:
        options = check_options(
            ranks=int(os.environ["WORLD_SIZE"]),
            wrap=wrap,
            optimizer=optimizer,
            scaler=scaler,
            steps=steps,
            inject=inject,
        )
        # Only rank 0 writes; on another machine the folder need not exist.
        check_json(json if is_first else None)
    except OptionError as error:
        if is_first:
            print(f"launch/train.py: {error}", file=sys.stderr)
        raise typer.Exit(2) from None

    console = make_console(quiet=not is_first)
    device_type = device_type_for(int(os.environ["LOCAL_WORLD_SIZE"]))
    with (
        joined_group(device_type) as device,
        show_progress(console, [options]) as on_tick,
    ):
        result = train(options, share_digits(device), lambda tick: on_tick(0, tick))
        conclude(console, [(options, result)], json if is_first else None)
        # torchrun ends all ranks as soon as one leaves with a code other than 0,
        # so nobody leaves before rank 0 has spoken.
        dist.barrier()
    raise typer.Exit(exit_code((options, result)))


if __name__ == "__main__":
    typer.run(main)
