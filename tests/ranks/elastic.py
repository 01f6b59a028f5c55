"""What ``test_elastic_keys.py`` has torchrun start: two worlds over one store, each misses a rank.

The first world dies in a verdict to which rank 0 does not come, the second in one to which rank 1
does not. Rank 0 of the second finds in the store what rank 1 of the first has written there.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from shardscale.comm import process_group

TIMEOUT_S = 1.0


def main(directory: Path) -> None:
    attempt, rank = (int(os.environ[v]) for v in ("TORCHELASTIC_RESTART_COUNT", "RANK"))
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    kept = dist.TCPStore(*address, is_master=False)
    # In torch 2.13 a group that `env://` makes has nothing before its keys, and in the second world
    # Gloo may read the addresses of the first. Its own keys get the prefix here, but not ours.
    store = dist.PrefixStore(f"attempt {attempt}", kept)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    process_group._get_process_group_store = lambda group: kept

    comm = process_group.ProcessGroupComm(dist.group.WORLD, TIMEOUT_S)
    for _ in range(2):
        comm.all_reduce_sum_(torch.ones(2, dtype=torch.float64))
    if rank == attempt:  # does not come to the third, and goes when the other has said so
        kept.get(f"world {attempt} is over")
        os._exit(1)
    try:
        comm.all_reduce_sum_(torch.ones(2, dtype=torch.float64))
    except Exception as error:
        (directory / f"world{attempt}").write_text(f"{type(error).__name__}: {error}")
        (directory / f"keys{attempt}").write_text("\n".join(map(str, kept.list_keys())))
    kept.set(f"world {attempt} is over", "")
    os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
