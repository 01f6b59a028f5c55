"""Slurm's short form for many hosts, ``n[1-3,07],gpu-b``, written out without ``scontrol``."""

from __future__ import annotations

import re
from itertools import product

from shardscale.errors import ConfigError

__all__ = ["expand"]

_RANGE = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")
# What stands between brackets or commas; Slurm's names hold no blanks.
_TEXT = re.compile(r"[^\s,\[\]]+")
# Over ten times the largest machine, and what DNS allows. A damaged list must be an error, not a
# full memory.
_AT_MOST = 1_000_000
_LONGEST = 255


def expand(nodelist: str) -> list[str]:
    """Write out a node list as Slurm abbreviates it.

    The lower bound of a range says how wide its numbers are: ``[08-10]`` is 08, 09, 10.

    >>> expand("a[1-2,07],r[0-1]n[01-02],login-b")
    ['a1', 'a2', 'a07', 'r0n01', 'r0n02', 'r1n01', 'r1n02', 'login-b']

    Args:
        nodelist: As in ``SLURM_STEP_NODELIST``.

    Returns:
        The hosts, in the list's own order, which is that of ``SLURM_NODEID``.

    Raises:
        ConfigError: It is not such a list; says at which character.
    """
    hosts: list[str] = []
    at = 0
    while True:
        parts, at = _parts(nodelist, at, _AT_MOST - len(hosts))
        hosts += map("".join, product(*parts))
        if at == len(nodelist):
            return hosts
        at += 1  # the comma after this item


def _parts(nodelist: str, at: int, room: int) -> tuple[list[list[str]], int]:
    """The choices for each part of one item, and where the item ends: at a comma or the end.

    All together they make no more than ``room`` hosts.
    """
    if room < 1:
        raise _error(nodelist, at, f"no more than {_AT_MOST} hosts")
    parts: list[list[str]] = []
    length = 0
    while at < len(nodelist) and nodelist[at] != ",":
        begin = at
        if nodelist[at] == "[":
            numbers, at = _numbers(nodelist, at + 1, room)
            parts.append(numbers)
            room //= len(numbers)
        elif text := _TEXT.match(nodelist, at):
            parts.append([text[0]])
            at = text.end()
        else:
            raise _error(nodelist, at, "a host's name")
        length += max(map(len, parts[-1]))
        if length > _LONGEST:
            raise _error(nodelist, begin, f"the end of a name of at most {_LONGEST} characters")
    if not parts:
        raise _error(nodelist, at, "a host's name")
    return parts, at


def _numbers(nodelist: str, at: int, room: int) -> tuple[list[str], int]:
    """The numbers between brackets, no more than ``room``, and where the text goes on behind."""
    numbers: list[str] = []
    while found := _RANGE.match(nodelist, at):
        low, high = found[1], found[2] or found[1]
        if int(high) < int(low):
            raise _error(nodelist, found.start(2), f"a number from {low} on")
        if len(numbers) + int(high) - int(low) >= room:
            raise _error(nodelist, at, f"no more than {_AT_MOST} hosts")
        numbers += [str(number).zfill(len(low)) for number in range(int(low), int(high) + 1)]
        at = found.end()
        if nodelist[at : at + 1] == "]":
            return numbers, at + 1
        if nodelist[at : at + 1] != ",":
            raise _error(nodelist, at, "a comma or a closing bracket")
        at += 1
    raise _error(nodelist, at, "a number")


def _error(nodelist: str, at: int, expected: str) -> ConfigError:
    found = repr(nodelist[at]) if at < len(nodelist) else "its end"
    return ConfigError(
        f"The node list {nodelist!r} has {found} at character {at + 1}, where {expected} is "
        "expected: pass it as Slurm writes it, for example 'n[1-3,07],gpu-b'."
    )
