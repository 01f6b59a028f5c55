"""Rank 0 holds its port from the start, and names an address that other hosts can reach."""

from __future__ import annotations

import socket

import pytest

from shardscale import ConfigError
from shardscale.comm import mpi_rendezvous
from shardscale.comm.sockets import address_towards, listen


def addresses(monkeypatch: pytest.MonkeyPatch, known: dict[str, str]) -> None:
    """Let names stand for addresses, as /etc/hosts would."""
    look_up = socket.getaddrinfo

    def getaddrinfo(host, *args, **kwargs):
        if host not in known:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return look_up(known[host], *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(socket, "gethostname", lambda: "here")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_port_is_held_and_found_where_it_is_told(host):
    with listen(host, 0) as listener:
        port = listener.getsockname()[1]
        socket.create_connection((host, port), timeout=5).close()
        with pytest.raises(ConfigError, match=f"Port {port} .* in use.*set MASTER_PORT"):
            listen(host, port)


def test_an_address_of_another_host_is_refused(monkeypatch):
    addresses(monkeypatch, {"here": "127.0.0.1"})
    with pytest.raises(ConfigError, match=r"Rank 0 listens on here, but 'there' .* MASTER_ADDR"):
        listen("there", 0)


def test_ranks_of_one_host_meet_at_a_port_that_rank_0_already_has(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    listener, address = mpi_rendezvous._listen({}, [socket.gethostname()] * 4)
    with listener:
        host, port = address.split(":")
        assert (host, int(port)) == ("127.0.0.1", listener.getsockname()[1])
        socket.create_connection((host, int(port)), timeout=5).close()


def test_ranks_of_several_hosts_need_an_address_that_is_not_each_hosts_own(monkeypatch):
    """As on Debian, where a host's name is 127.0.1.1 to itself."""
    addresses(monkeypatch, {"here": "127.0.1.1", "127.0.0.1": "127.0.0.1"})
    assert address_towards(["there"]) is None
    with pytest.raises(ConfigError, match=r"here, where rank 0 is, .* 'there' .* set MASTER_ADDR"):
        mpi_rendezvous._listen({}, ["here", "there"])
    listener, address = mpi_rendezvous._listen({"MASTER_ADDR": "127.0.0.1"}, ["here", "there"])
    listener.close()
    assert address.startswith("127.0.0.1:")


def test_the_address_is_that_of_the_way_to_the_other_host(monkeypatch):
    """No packet is sent: the kernel is asked for the route."""
    asked = []

    class Probe:
        def __init__(self, family, kind):
            assert kind == socket.SOCK_DGRAM

        def connect(self, address):
            asked.append(address[0])

        def getsockname(self):
            return ("10.77.0.1", 40000)

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *error: None  # noqa: E731

    addresses(monkeypatch, {"here": "127.0.1.1", "there": "10.77.0.2"})
    monkeypatch.setattr(socket, "socket", Probe)
    assert address_towards(["unknown", "there"]) == "10.77.0.1"
    assert asked == ["10.77.0.2"]
