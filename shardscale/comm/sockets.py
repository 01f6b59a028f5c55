"""A socket to listen on, and the address at which another host reaches this one."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from collections.abc import Iterable

from shardscale.comm.variables import is_loopback
from shardscale.errors import ConfigError

__all__ = ["address_towards", "listen"]

_BACKLOG = 4096  # all ranks of a large job come at once


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; it is kept, so that nobody else takes the port in between.

    Args:
        host: Where others will look for it. It is at a loopback address only if this is one, else
            at all addresses of this machine.
        port: The port; 0 for any that is free.

    Raises:
        ConfigError: The port is taken or not allowed, or the host is another one.
    """
    here = socket.gethostname()
    try:
        listener = _bound(host if is_loopback(host) else "", port)
    except OSError as error:
        raise ConfigError(
            f"Port {port} of {here}, where rank 0 is to listen, cannot be had "
            f"({os.strerror(error.errno or 0)}): set MASTER_PORT to a free port, the same one on "
            "every rank."
        ) from error
    try:
        socket.create_connection((host, listener.getsockname()[1]), timeout=5).close()
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"Rank 0 listens on {here}, but {host!r} does not lead there ({error}): set "
            f"MASTER_ADDR to the address of {here}."
        ) from error
    return listener


def _bound(host: str, port: int) -> socket.socket:
    if not host and socket.has_dualstack_ipv6():
        try:
            return socket.create_server(
                ("", port), family=socket.AF_INET6, backlog=_BACKLOG, dualstack_ipv6=True
            )
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                raise
            # IPv6 is compiled in, but turned off.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=_BACKLOG)


def address_towards(peers: Iterable[str]) -> str | None:
    """The address of the interface through which this host reaches another one.

    Args:
        peers: Names of other hosts; the first one that can be looked up is taken. If there is none,
            this host's own name must have an address.

    Returns:
        None if no address can be found but those which mean this machine only.
    """
    for peer in peers:
        for family, sockaddr in _addresses(peer):
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                try:
                    probe.connect(sockaddr)  # looks up the route; nothing is sent
                except OSError:
                    continue
                address = str(probe.getsockname()[0])
            if _is_routable(address):
                return address
    own = (str(sockaddr[0]) for _, sockaddr in _addresses(socket.gethostname()))
    return next(filter(_is_routable, own), None)


def _addresses(host: str) -> list[tuple[int, tuple[str, int]]]:
    try:
        found = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)
    except OSError:
        return []
    return [(info[0], info[4]) for info in found]  # type: ignore[misc]


def _is_routable(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    return not (ip.is_loopback or ip.is_link_local or ip.is_unspecified)
