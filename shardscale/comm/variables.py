"""Numbers and addresses in environment variables; a wrong one is refused by name and value."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping

from shardscale.errors import ConfigError

__all__ = ["hostname", "index", "is_loopback", "number", "port"]

_CURE = "let the launcher set it, or unset it"
_LABEL = "[A-Za-z0-9_-]{1,63}"  # longer ones cannot be looked up
_ADDRESS = re.compile("[A-Za-z0-9.:%_-]+")  # IPv6 with a zone, which may be any text otherwise
_NAME = re.compile(rf"(?=.{{1,254}}\Z){_LABEL}(\.{_LABEL})*\.?")


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


def hostname(environ: Mapping[str, str], name: str) -> str:
    """The host's name or address in a variable that is set.

    Raises:
        ConfigError: It is neither, or more than that: a URL, or a port behind it.
    """
    text = environ[name]
    if _NAME.fullmatch(text) or _address(text):
        return text
    raise ConfigError(
        f"{name} is {text!r}, but must be the name or the address of a host and nothing besides: "
        f"{_CURE}."
    )


def is_loopback(host: str) -> bool:
    """Whether a host given by address or as ``localhost`` is only this machine, whichever it is."""
    if host.lower().rstrip(".") in ("localhost", "localhost.localdomain", "ip6-localhost"):
        return True
    address = _address(host)
    if address is None:
        return False  # a name; who looks it up will see
    return address.is_loopback or address.is_unspecified


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text) if _ADDRESS.fullmatch(text) else None
    except ValueError:
        return None
