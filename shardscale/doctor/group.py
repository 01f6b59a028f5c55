"""The job's process group, and the devices whose numbers it carries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from shardscale.bring_up import connect
from shardscale.comm.env import RankEnv
from shardscale.comm.process_group import message_device
from shardscale.doctor.sections import Judged, Section, by_value

__all__ = ["Joined", "judge", "join_group"]


class Joined(NamedTuple):
    """What a rank has joined."""

    transports: str
    devices: list[torch.device]
    """The host, and this rank's accelerator if a transport of its own leads there."""

    def as_json(self) -> dict[str, Any]:
        """As it is sent."""
        return {"transports": self.transports, "devices": list(map(str, self.devices))}


def join_group(env: RankEnv, store: Store, backend: str, timeout_s: float) -> Joined:
    """Make the process group as ``init_distributed`` does.

    Collective: every rank of the job must call.
    """
    connect(env, store, backend, timeout_s)
    transports = dist.get_backend_config()
    devices = [torch.device("cpu")]
    if message_device(transports).type == "cuda":
        devices.append(torch.device("cuda", torch.cuda.current_device()))
    return Joined(transports, devices)


def judge(found: Mapping[int, Any]) -> Judged:
    """Show the transports; that there is a group is all that it takes."""
    transports = {rank: told["transports"] for rank, told in found.items()}
    devices = {rank: ", ".join(told["devices"]) for rank, told in found.items()}
    return Judged([Section("process group", [(by_value(transports), by_value(devices))])])
