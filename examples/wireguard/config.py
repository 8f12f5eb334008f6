"""The configuration file of wg-quick(8), which is that of wg(8) and a little more."""

import base64
import binascii
import socket
from dataclasses import dataclass, field
from ipaddress import IPv4Interface, IPv6Interface, ip_interface, ip_network
from pathlib import Path

from .allowedips import Network
from .cookies import Endpoint

__all__ = ["Config", "ConfigError", "PeerConfig", "parse", "read"]

# wg-quick's, for which it runs other programs: ours to mention, not to do.
_IGNORED = ("dns", "preup", "postup", "predown", "postdown", "saveconfig")


class ConfigError(ValueError):
    """The file is wrong; the text says in which line."""


@dataclass
class PeerConfig:
    """A section [Peer]."""

    public_key: bytes
    preshared_key: bytes = bytes(32)
    allowed_ips: list[Network] = field(default_factory=list)
    endpoint: Endpoint | None = None
    keepalive: int = 0  # seconds


@dataclass
class Config:
    """The section [Interface], and the peers."""

    private_key: bytes = b""
    listen_port: int = 0
    mark: int = 0
    addresses: list[IPv4Interface | IPv6Interface] = field(default_factory=list)
    mtu: int = 1420  # wg-quick's own, for a path of 1,500 bytes
    routes: bool = True
    peers: list[PeerConfig] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read(path: Path) -> Config:
    """Read a file; raises `ConfigError` and `OSError`."""
    return parse(path.read_text())


def parse(text: str) -> Config:
    """Read a configuration; raises `ConfigError`."""
    config = Config()
    section = ""
    for number, line in enumerate(text.splitlines(), 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        try:
            if line.startswith("["):
                section = line.lower()
                if section == "[peer]":
                    config.peers.append(PeerConfig(b""))
                elif section != "[interface]":
                    raise ConfigError("neither [Interface] nor [Peer]")
                continue
            key, equals, value = (part.strip() for part in line.partition("="))
            if not equals or not value:
                raise ConfigError("not KEY = VALUE")
            if section == "[interface]":
                _set_interface(config, key, value)
            elif section == "[peer]":
                _set_peer(config.peers[-1], key, value)
            else:
                raise ConfigError("in no section")
        except (ValueError, OSError) as error:
            raise ConfigError(f"line {number}: {line.partition('=')[0].strip()}: {error}") from None
    if not config.private_key:
        raise ConfigError("[Interface] has no PrivateKey")
    if not all(peer.public_key for peer in config.peers):
        raise ConfigError("a [Peer] has no PublicKey")
    if len({peer.public_key for peer in config.peers}) < len(config.peers):
        raise ConfigError("two [Peer] sections have the same PublicKey")
    return config


def _set_interface(config: Config, key: str, value: str) -> None:
    match key.lower():
        case "privatekey":
            config.private_key = _key(value)
        case "listenport":
            config.listen_port = _number(value, 65535)
        case "fwmark":
            config.mark = 0 if value == "off" else _number(value, 0xFFFFFFFF)
        case "address":
            config.addresses += [ip_interface(each) for each in _words(value)]
        case "mtu":
            config.mtu = _number(value, 65535, 576)
        case "table":
            if value not in ("off", "auto"):
                raise ValueError("only off and auto are known here")
            config.routes = value == "auto"
        case ignored if ignored in _IGNORED:
            config.notes.append(f"{key} is ignored")
        case _:
            raise ValueError("unknown here")


def _set_peer(peer: PeerConfig, key: str, value: str) -> None:
    match key.lower():
        case "publickey":
            peer.public_key = _key(value)
        case "presharedkey":
            peer.preshared_key = _key(value)
        case "allowedips":
            peer.allowed_ips += [ip_network(each, strict=False) for each in _words(value)]
        case "endpoint":
            peer.endpoint = resolve(value)
        case "persistentkeepalive":
            peer.keepalive = 0 if value == "off" else _number(value, 65535)
        case _:
            raise ValueError("unknown here")


def resolve(value: str) -> Endpoint:
    """Look HOST:PORT or [HOST]:PORT up; raises ValueError, and OSError where it can't be found."""
    host, colon, port = value.rpartition(":")
    if not colon or not host:
        raise ValueError(f"{value} is not HOST:PORT")
    found = socket.getaddrinfo(host.strip("[]"), _number(port, 65535, 1), type=socket.SOCK_DGRAM)
    address = found[0][4]
    if len(address) == 4:
        return str(address[0]), int(address[1]), int(address[2]), int(address[3])
    return str(address[0]), int(address[1])


def _key(value: str) -> bytes:
    try:
        key = base64.b64decode(value, validate=True)
    except binascii.Error:
        key = b""
    if len(key) != 32:
        raise ValueError("not a key: 32 bytes in base64")
    return key


def _number(value: str, highest: int, lowest: int = 0) -> int:
    number = int(value, 0)
    if not lowest <= number <= highest:
        raise ValueError(f"{value} is not from {lowest} to {highest}")
    return number


def _words(value: str) -> list[str]:
    return [word.strip() for word in value.split(",") if word.strip()]
