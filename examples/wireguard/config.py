"""The configuration file of wg-quick(8): that of wg(8) with more keys."""

import base64
import binascii
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import IPv4Interface, IPv6Interface, ip_address, ip_interface, ip_network
from itertools import zip_longest
from pathlib import Path

from .allowedips import Network
from .cookies import Endpoint
from .crypto import Forged, dh

__all__ = ["Config", "ConfigError", "PeerConfig", "look_up", "parse", "read"]

# wg-quick runs other programs for these keys. This example only names them in a note.
_COMMANDS = ("preup", "postup", "predown", "postdown")
_IGNORED = (*_COMMANDS, "dns", "saveconfig")

# White space as wg(8) defines it: isspace() in the C locale, so no byte of a UTF-8 character.
_BLANKS = b" \t\v\f\r"

# Errors that are final. With any other error the resolver may not be up yet.
_PERMANENT = {socket.EAI_NONAME, socket.EAI_FAIL, socket.EAI_SERVICE}
_PERMANENT.add(getattr(socket, "EAI_NODATA", socket.EAI_NONAME))  # musl lacks it


class ConfigError(ValueError):
    """The file is invalid; the text names the line."""


@dataclass
class PeerConfig:
    """A section [Peer]."""

    public_key: bytes
    preshared_key: bytes = bytes(32)
    allowed_ips: list[Network] = field(default_factory=list)
    endpoint: Endpoint | None = None
    endpoint_text: str = ""  # HOST:PORT, as the file has it
    keepalive: int = 0  # seconds


@dataclass
class Config:
    """The section [Interface], and the peers."""

    private_key: bytes = b""
    listen_port: int = 0
    mark: int = 0
    addresses: list[IPv4Interface | IPv6Interface] = field(default_factory=list)
    mtu: int = 1420  # wg-quick's default, for a path with an MTU of 1,500
    routes: bool = True
    peers: list[PeerConfig] = field(default_factory=list)
    dns: list[str] = field(default_factory=list)  # name servers
    search: list[str] = field(default_factory=list)  # domains
    ignored: list[str] = field(default_factory=list)  # ignored keys, as the file spells them


def read(path: Path) -> Config:
    """Read a file; raises `ConfigError` and `OSError`."""
    return parse(path.read_bytes())


def parse(data: bytes) -> Config:
    """Read a configuration; raises `ConfigError`.

    Only a newline ends a line, and comments may be in any encoding. Blanks are ignored everywhere:
    wg(8) removes them before it parses a line.
    """
    config = Config()
    section = ""
    for number, raw in enumerate(data.split(b"\n"), 1):
        line = raw.partition(b"#")[0].translate(None, _BLANKS).decode("utf-8", "backslashreplace")
        if not line:
            continue
        key, equals, value = line.partition("=")
        try:
            if line.startswith("["):
                section = line.lower()
                if section == "[peer]":
                    config.peers.append(PeerConfig(b""))
                elif section != "[interface]":
                    raise ConfigError("neither [Interface] nor [Peer]")
                continue
            if not equals or not value:
                raise ConfigError("not KEY = VALUE")
            if section == "[interface]":
                _set_interface(config, key, value)
            elif section == "[peer]":
                _set_peer(config.peers[-1], key, value)
            else:
                raise ConfigError("in no section")
        except (ValueError, OSError) as error:
            raise ConfigError(f"line {number}: {key}: {error}") from None
    if not config.private_key:
        raise ConfigError("[Interface] has no PrivateKey" + _command_that_sets_it(config))
    if not all(peer.public_key for peer in config.peers):
        raise ConfigError("a [Peer] has no PublicKey")
    if len({peer.public_key for peer in config.peers}) < len(config.peers):
        raise ConfigError("two [Peer] sections have the same PublicKey")
    return config


def _command_that_sets_it(config: Config) -> str:
    """Name a command that may set the key: "PostUp = wg set %i private-key FILE" is common."""
    commands = [key for key in config.ignored if key.lower() in _COMMANDS]
    if not commands:
        return ""
    return (
        f"; {', '.join(commands)} may set it, but commands are not run here: write it in the file"
    )


def _set_interface(config: Config, key: str, value: str) -> None:
    match key.lower():
        case "privatekey":
            config.private_key = _key(value)
        case "listenport":
            config.listen_port = _number(value, 65535)
        case "fwmark":
            config.mark = _number_or_off(value, 0xFFFFFFFF, hexadecimal=True)
        case "address":
            config.addresses += [ip_interface(each) for each in _words(value)]
        case "mtu":
            config.mtu = _number(value, 65535, 576)
        case "table":
            if value.lower() not in ("off", "auto"):
                raise ValueError("only off and auto are known here")
            config.routes = value.lower() == "auto"
        case ignored if ignored in _IGNORED:
            if ignored == "dns":
                _set_dns(config, value)
            if key not in config.ignored:
                config.ignored.append(key)
        case _:
            raise ValueError("unknown here")


def _set_dns(config: Config, value: str) -> None:
    """Addresses are name servers; anything else is a search domain."""
    for each in _words(value):
        try:
            config.dns.append(str(ip_address(each)))
        except ValueError:
            config.search.append(each)


def _set_peer(peer: PeerConfig, key: str, value: str) -> None:
    match key.lower():
        case "publickey":
            peer.public_key = _public_key(value)
        case "presharedkey":
            peer.preshared_key = _key(value)
        case "allowedips":
            peer.allowed_ips += [ip_network(each, strict=False) for each in _words(value)]
        case "endpoint":
            peer.endpoint, peer.endpoint_text = resolve(value), value
        case "persistentkeepalive":
            peer.keepalive = _number_or_off(value, 65535)
        case _:
            raise ValueError("unknown here")


def resolve(value: str, pause: Callable[[float], None] = time.sleep) -> Endpoint:
    """Resolve HOST:PORT or [HOST]:PORT; retries temporary errors as wg(8) does.

    WG_ENDPOINT_RESOLUTION_RETRIES sets the number of retries: a number (default 15) or "infinity".

    Raises:
        ValueError: not HOST:PORT.
        OSError: there is no such name, or every attempt to resolve it failed.
    """
    left, delay = _retries(), 1.0
    while True:
        try:
            return look_up(value)[0]
        except socket.gaierror as error:
            if error.errno in _PERMANENT or left <= 0:
                raise
            said = f"{value}: {error.strerror}; trying again in {delay:.1f} seconds"
            print(f"note: {said}", file=sys.stderr, flush=True)
        left -= 1
        pause(delay)
        delay = min(20.0, delay * 1.2)


def look_up(value: str) -> list[Endpoint]:
    """Return all addresses of HOST:PORT or [HOST]:PORT, IPv4 and IPv6 in turn. Blocks.

    Raises:
        ValueError: not HOST:PORT.
        OSError: there is no such name, or it can't be resolved now.
    """
    host, colon, port = value.rpartition(":")
    host = host.strip("[]")
    if not colon or not host:
        raise ValueError(f"{value} is not HOST:PORT")
    if ":" in host:  # a resolver may ask its servers for such a name, if it is not an address
        try:
            ip_address(host)
        except ValueError:
            raise ValueError(f"{value} is not [ADDRESS]:PORT") from None
    if not port[:1].isalpha():  # else a service's name
        port = str(_number(port, 65535, 1))  # getaddrinfo would turn 70000 into 4464
    found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    families: dict[int, list[Endpoint]] = {}
    for family, *_, address in found:
        endpoint: Endpoint = str(address[0]), int(address[1])
        if len(address) == 4:
            endpoint = (*endpoint, int(address[2]), int(address[3]))
        families.setdefault(family, []).append(endpoint)
    turns = zip_longest(*families.values())
    return [each for turn in turns for each in turn if each is not None]


def _retries() -> float:
    text = os.environ.get("WG_ENDPOINT_RESOLUTION_RETRIES", "15")
    return float("inf") if text == "infinity" else _number(text, 2**31 - 1)


def _key(value: str) -> bytes:
    try:
        key = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):  # ValueError: not ASCII
        key = b""
    # Encode again and compare: b64decode ignores the last two bits, and a key with one of them set
    # is mistyped.
    if len(key) != 32 or base64.b64encode(key).decode() != value:
        raise ValueError("not a key: 32 bytes in base64")
    return key


def _public_key(value: str) -> bytes:
    key = _key(value)
    try:
        dh(bytes(32), key)  # fails with every private key, or with none
    except Forged:
        raise ValueError("not a peer's key: a point of small order keeps no secret") from None
    return key


def _number(value: str, highest: int, lowest: int = 0, *, hexadecimal: bool = False) -> int:
    """Parse a number as wg(8) does: ignores leading zeros; only a mark may begin with 0x."""
    base, digits = (16, value[2:]) if hexadecimal and value[:2] == "0x" else (10, value)
    try:
        # int() also accepts signs, underscores and the digits of other scripts.
        number = int(digits, base) if digits.isascii() and digits.isalnum() else -1
    except ValueError:
        number = -1
    if not lowest <= number <= highest:
        raise ValueError(f"{value} is not a number from {lowest} to {highest}")
    return number


def _number_or_off(value: str, highest: int, *, hexadecimal: bool = False) -> int:
    return 0 if value.lower() == "off" else _number(value, highest, hexadecimal=hexadecimal)


def _words(value: str) -> list[str]:
    return [word for word in value.split(",") if word]
