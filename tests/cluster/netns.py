"""Two hosts in one: network namespaces joined by a cable that can be pulled."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

__all__ = ["INTERFACE", "Host", "cable", "why_not"]

INTERFACE = "eth0"  # on either host, the end of the cable
_PREFIX = "shf"  # shf-PID-N-END: whose process has ended, nobody needs any more
_numbers = itertools.count()


class Host(NamedTuple):
    """One end of the cable."""

    name: str  # of its namespace
    address: str

    def command(self, *words: str) -> list[str]:
        """A command line as run on this host."""
        # Not `ip netns exec`, which mounts another /sys as well.
        return ["nsenter", f"--net=/run/netns/{self.name}", *words]

    def pull_the_cable(self) -> None:
        """Nothing comes in or goes out any more, and nobody is told."""
        _ip("-n", self.name, "link", "set", INTERFACE, "down")


def why_not() -> str | None:
    """Why there can be no namespaces here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in ("ip", "nsenter") if shutil.which(name) is None]
    return f"not installed: {', '.join(missing)} (iproute2, util-linux)" if missing else None


@contextmanager
def cable() -> Iterator[tuple[Host, Host]]:
    """Two hosts for as long as the block runs; leftovers of a run that was killed go first."""
    _remove_leftovers()
    number = next(_numbers)
    hosts = tuple(
        Host(f"{_PREFIX}-{os.getpid()}-{number}-{end}", f"10.78.0.{end}") for end in (1, 2)
    )
    try:
        for host in hosts:
            _ip("netns", "add", host.name)
        ends = [(INTERFACE, "netns", host.name) for host in hosts]
        _ip("link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1])
        for host in hosts:
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                _ip("-n", host.name, "link", "set", interface, "up")
        yield hosts
    finally:
        for host in hosts:
            _remove(host.name)


def _remove_leftovers() -> None:
    for path in Path("/run/netns").glob(f"{_PREFIX}-*"):
        if not Path(f"/proc/{path.name.split('-')[1]}").exists():
            _remove(path.name)


def _remove(name: str) -> None:
    """End what still runs in a namespace, then drop it; the cable goes with either end."""
    if not Path("/run/netns", name).exists():
        return
    for pid in _ip("netns", "pids", name).split():
        subprocess.run(["kill", "-9", pid], check=False, timeout=10)
    _ip("netns", "del", name)


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False, timeout=10)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
    return done.stdout
