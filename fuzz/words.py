"""The parsers of text: configuration files, options, the words of the command."""

import argparse
import re
import socket
from collections.abc import Callable
from typing import Any
from unittest import mock

import udp_vpn
import virtual_switch
from wireguard import config

from aiotun._cli import arguments, tuntap
from aiotun._cli import networkd as networkd_command
from aiotun._kernel.words import parse_mac
from aiotun._link.values import check_new_name, parse_address, parse_route

from ._target import Target

__all__ = ["TARGETS"]


def _no_names(host: str, port: int | str, *, type: int = 0) -> Any:  # noqa: A002 - its name
    """Like getaddrinfo, but without name resolution."""
    return _getaddrinfo(host, port, type=type, flags=socket.AI_NUMERICHOST)


_getaddrinfo = socket.getaddrinfo


class _File:
    """Stands in for the path of a file with these contents."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def read_bytes(self) -> bytes:
        return self._data


def wireguard_config(data: bytes) -> None:
    with mock.patch("socket.getaddrinfo", _no_names):
        try:
            found = config.parse(data)
        except config.ConfigError:
            return
    assert len(found.private_key) == 32
    assert all(len(peer.public_key) == 32 for peer in found.peers)
    assert 576 <= found.mtu <= 65535
    assert all(0 <= peer.keepalive <= 65535 for peer in found.peers)


def vpn_keys(data: bytes) -> None:
    file: Any = _File(data)
    try:
        clients = udp_vpn.read_keys(file)
    except ValueError:
        return
    assert clients
    assert all(len(client.key) == 32 and client.addresses for client in clients)


def options(data: bytes) -> None:
    """Each parser must parse the text of its own result to the same result."""
    text = data.decode("utf-8", "surrogateescape")
    readers: list[Callable[[str], Any]] = [parse_address, parse_route, parse_mac, check_new_name]
    for read in readers:
        try:
            found = read(text)
        except ValueError:
            continue
        assert read(str(found)) == found, (read, text)
    with mock.patch("socket.getaddrinfo", _no_names):
        try:
            virtual_switch.port_spec(text)
        except argparse.ArgumentTypeError:
            return


_LINE = re.compile(r"|#.*|\[[A-Za-z]+\]|[A-Za-z0-9]+=[A-Za-z0-9_.:/@+$-]+")


def networkd(data: bytes) -> None:
    """Any words of `aiotun networkd` must give files with only known sections and plain values."""
    words = data.decode("utf-8", "surrogateescape").split("\n")
    try:
        texts = networkd_command.units(words)
    except arguments.UsageError:
        return
    for name, text in texts.items():
        assert re.fullmatch(r"50-[^/\0]+\.(netdev|network)", name), name
        for line in text.split("\n"):
            assert _LINE.fullmatch(line), line
    assert all(text.isascii() for text in texts.values())


def commands(data: bytes) -> None:
    """Parse the words of `aiotun add` and `del`, without asking the kernel."""
    words = data.decode("utf-8", "surrogateescape").split("\n")
    valued, flags = set(tuntap._VALUES), set(tuntap._FLAGS)
    try:
        said = arguments.read("add", words, valued, flags)
        tuntap._mode(said.values.get("mode", "tun"))
        tuntap._who(said.values, "user")
    except arguments.UsageError:
        return
    assert set(said.values) <= valued
    assert said.flags <= flags


TARGETS = [
    Target(
        "wireguard-config",
        wireguard_config,
        "raises only ConfigError; keys have 32 bytes, and numbers are within their limits",
    ),
    Target(
        "vpn-keys",
        vpn_keys,
        "raises only ValueError; every client has a key of 32 bytes and an address",
    ),
    Target(
        "options",
        options,
        "addresses, routes, MACs, names and the switch's ports: raises only ValueError or "
        "ArgumentTypeError; the text of a result parses to the same result",
    ),
    Target(
        "networkd",
        networkd,
        "raises only UsageError; no word can add a line, section or pattern to a file",
    ),
    Target(
        "commands",
        commands,
        "raises only UsageError",
    ),
]
