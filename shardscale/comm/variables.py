"""Numbers and addresses in environment variables; a wrong one is refused by name and value."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping

from shardscale.errors import ConfigError

__all__ = ["index", "is_loopback", "number", "port"]

_CURE = "let the launcher set it, or unset it"


def number(environ: Mapping[str, str], name: str, low: int, high: int | None = None) -> int:
    """The integer in a variable that is set.

    Raises:
        ConfigError: It is no integer, or not from ``low`` to ``high``.
    """
    text = environ[name]
    if not re.fullmatch(r"-?[0-9]{1,18}", text):
        raise ConfigError(f"{name} is {text!r}, but must be an integer: {_CURE}.")
    value = int(text)
    if value < low or (high is not None and value > high):
        limits = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ConfigError(f"{name} is {text!r}, but must be {limits}: {_CURE}.")
    return value


def index(environ: Mapping[str, str], name: str, size_name: str, size: int) -> int:
    """The integer in a variable that counts from 0 to below a size.

    Args:
        environ: The variables.
        name: That of the variable.
        size_name: That of the variable which holds the size, for the error.
        size: The size.

    Raises:
        ConfigError: It is no such integer.
    """
    value = number(environ, name, 0)
    if value >= size:
        raise ConfigError(
            f"{name} is {value}, but {size_name} is {size}, so it must be from 0 to {size - 1}: "
            f"{_CURE}."
        )
    return value


def port(environ: Mapping[str, str], name: str) -> int:
    """The TCP port in a variable that is set.

    Raises:
        ConfigError: It is no port.
    """
    return number(environ, name, 1, 65535)


def is_loopback(host: str) -> bool:
    """Whether a host given by address or as ``localhost`` is only this machine, whichever it is."""
    if host.lower().rstrip(".") in ("localhost", "localhost.localdomain", "ip6-localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False  # a name; who looks it up will see
    return address.is_loopback or address.is_unspecified
