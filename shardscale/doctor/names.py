"""Which addresses the hosts of the job have, in the eyes of each of them."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

from shardscale.comm.patience import within
from shardscale.doctor.codes import Code, Failure
from shardscale.doctor.sections import Judged, Section, by_value

__all__ = ["judge", "look_up", "Seen"]

_LIMIT_S = 5.0
_AT_ONCE = 32
_GLOO = "GLOO_SOCKET_IFNAME"


class Seen(NamedTuple):
    """What one host sees."""

    host: str
    answers: dict[str, list[str] | str]
    """By host: its addresses, or why there are none."""
    gloo_interface: str | None
    """The interface that Gloo was told to use; it asks for no name then."""


def look_up(hosts: Sequence[str]) -> Seen:
    """Ask this host's resolver for all hosts at once."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        answers = dict(zip(hosts, pool.map(_addresses, hosts), strict=True))
    return Seen(socket.gethostname(), answers, os.environ.get(_GLOO))


def judge(found: Mapping[int, Any]) -> Judged:
    """Say what each host sees, and what is wrong with it.

    Gloo offers the address of the host's own name to the others, unless it was told an interface:
    so in a job of several hosts its own name must not lead a host to itself. The names of others
    matter to whoever uses them, and are shown.
    """
    all_seen = {rank: Seen(**told) for rank, told in found.items() if told["answers"]}
    hosts = next(iter(all_seen.values())).answers if all_seen else {}
    rows = [
        (
            host,
            by_value(
                {
                    rank: _words(seen.answers[host], is_own=host == seen.host)
                    for rank, seen in all_seen.items()
                }
            ),
        )
        for host in hosts
    ]
    failures = [
        Failure(Code.NAMES, _sentence(seen.host, own))
        for seen in all_seen.values()
        if not _is_routable(own := seen.answers[seen.host])
        and not seen.gloo_interface
        and len(hosts) > 1
    ]
    return Judged([Section("name resolution", rows)], failures)


def _addresses(host: str) -> list[str] | str:
    ask = partial(socket.getaddrinfo, host, None, type=socket.SOCK_STREAM)
    try:
        found: list[Any] = within(_LIMIT_S, ask)
    except OSError as error:  # a TimeoutError is one, too
        return str(error)
    return list(dict.fromkeys(address[0] for *_, address in found))


def _is_routable(answer: Sequence[str] | str) -> bool:
    """Whether the first address, which is the one that is used, leads anywhere else."""
    return not isinstance(answer, str) and not _is_loopback(answer[0])


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _words(answer: Sequence[str] | str, *, is_own: bool) -> str:
    if isinstance(answer, str):
        return f"! {answer}"
    mark = "" if _is_routable(answer) else "loopback: " if is_own else "! loopback: "
    return mark + ", ".join(answer)


def _sentence(host: str, answer: Sequence[str] | str) -> str:
    found = answer if isinstance(answer, str) else ", ".join(answer)
    return (
        f"{host} looks up its own name and gets: {found}. Gloo looks up the same, and offers the "
        f"other hosts an address that they cannot reach. Set {_GLOO} to the interface that they "
        f"can reach, or give {host} its real address in /etc/hosts."
    )
