"""The network interfaces of a host, and the variables that name some of them."""

from __future__ import annotations

import ipaddress
import socket
import struct
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

__all__ = ["Interface", "interfaces", "trouble_with", "VARIABLES"]

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_INET6 = Path("/proc/net/if_inet6")
# linux/sockios.h and linux/if.h
_SIOCGIFFLAGS, _SIOCGIFADDR, _IFF_UP = 0x8913, 0x8915, 1


class Interface(NamedTuple):
    """One network interface."""

    name: str
    is_up: bool
    addresses: list[str]
    """Its first IPv4 address and its IPv6 addresses; on Linux alone."""


def interfaces() -> list[Interface]:
    """All interfaces of this host."""
    names = [name for _, name in socket.if_nameindex()]
    if sys.platform != "linux":
        return [Interface(name, True, []) for name in names]
    sixes = _ipv6_addresses()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        return [
            Interface(
                name,
                _is_up(asked, name),
                [*_ipv4_addresses(asked, name), *(six for of, six in sixes if of == name)],
            )
            for name in names
        ]


def trouble_with(
    variable: str, value: str, there: Iterable[Interface], num_nodes: int
) -> str | None:
    """What is wrong with a variable that names interfaces, as a sentence; None if nothing is.

    Gloo takes names, with commas in between. NCCL takes beginnings of names; ``=`` in front makes
    them whole names, ``^`` excludes them.
    """
    names = {each.name: each for each in there}
    if variable == "NCCL_SOCKET_IFNAME":
        chosen = _as_nccl_chooses(value, list(names))
        missing = [] if chosen else [value]
    else:
        chosen = value.split(",")
        missing = [name for name in chosen if name not in names]
    known = ", ".join(names)
    if missing and variable == "GLOO_SOCKET_IFNAME" and value.startswith("^"):
        return (
            f"{variable}={value!r} excludes interfaces, as NCCL can; Gloo cannot and takes it for "
            f"a name. Name the one to use: {known}."
        )
    if missing:
        return (
            f"{variable}={value!r}, but there is no interface {', '.join(map(repr, missing))}. "
            f"Name one of: {known}."
        )
    if num_nodes > 1 and all(_is_loopback(names[name]) for name in chosen):
        return (
            f"{variable}={value!r} is a loopback interface, but the job has {num_nodes} hosts, "
            f"which cannot reach each other by it. Name one of: {known}."
        )
    return None


def _as_nccl_chooses(value: str, names: Sequence[str]) -> list[str]:
    excludes = value.startswith("^")
    is_exact = value.lstrip("^").startswith("=")
    words = value.lstrip("^=").split(",")

    def is_named(name: str) -> bool:
        return name in words if is_exact else name.startswith(tuple(words))

    return [name for name in names if is_named(name) != excludes]


def _is_loopback(interface: Interface) -> bool:
    addresses = [ipaddress.ip_address(each) for each in interface.addresses]
    return bool(addresses) and all(each.is_loopback for each in addresses)


def _is_up(asked: socket.socket, name: str) -> bool:
    (flags,) = struct.unpack_from("H", _ioctl(asked, _SIOCGIFFLAGS, name) or bytes(18), 16)
    return bool(flags & _IFF_UP)


def _ipv4_addresses(asked: socket.socket, name: str) -> list[str]:
    found = _ioctl(asked, _SIOCGIFADDR, name)
    return [socket.inet_ntoa(found[20:24])] if found else []


def _ioctl(asked: socket.socket, request: int, name: str) -> bytes | None:
    """The kernel's ``struct ifreq`` on an interface: 16 bytes of name, then the answer."""
    import fcntl  # not on every system

    try:
        return fcntl.ioctl(asked.fileno(), request, struct.pack("16s24x", name.encode()))
    except OSError:
        return None  # it has no IPv4 address


def _ipv6_addresses() -> list[tuple[str, str]]:
    """(interface, address), as the kernel lists them: 32 digits without colons, the name last."""
    if not _INET6.exists():
        return []
    lines = [line.split() for line in _INET6.read_text().splitlines()]
    return [(line[-1], str(ipaddress.IPv6Address(bytes.fromhex(line[0])))) for line in lines]
