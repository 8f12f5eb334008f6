"""Which addresses outside a program may reach: ``--deny`` and ``--allow``."""

import ipaddress
import re
import socket
from dataclasses import dataclass
from typing import Self

from .arguments import UsageError

__all__ = ["Access", "Address", "NotPermittedError", "Place", "is_of_this_machine"]

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = tuple[str, int]
"""A host's address and a port."""

_BRACKETED = re.compile(r"\[([^]]+)\](?::(\d+))?")
_PLAIN = re.compile(r"([^:]*):(\d+)")
_DISCARD = 9


class NotPermittedError(Exception):
    """The program inside may not reach this address."""


@dataclass(frozen=True)
class Place:
    """Networks, and a port or all of them: one ``HOST[:PORT]`` of the command line."""

    networks: tuple[Network, ...]
    port: int | None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse an address, a network or a name, with a port or without.

        ``10.0.0.0/8``, ``192.0.2.1:80``, ``[2001:db8::1]:443``, ``2001:db8::/32``,
        ``example.org:443``, ``:25``. A name stands for the addresses that it has now. Blocks, for
        a name.

        Raises:
            UsageError: it is none of these.
        """
        host, port = text, None
        if found := _BRACKETED.fullmatch(text) or _PLAIN.fullmatch(text):
            host, port = found[1], None if found[2] is None else int(found[2])
        if port is not None and port > 65535:
            raise UsageError(f"{text!r}: a port is at most 65535")
        if not host and port is not None:
            return cls((ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_network("::/0")), port)
        try:
            return cls((ipaddress.ip_network(host, strict=False),), port)
        except ValueError:
            if not re.fullmatch(r"[A-Za-z0-9._-]*[A-Za-z][A-Za-z0-9._-]*", host):
                raise UsageError(
                    f"{text!r} must be an address, a network or a name, and perhaps a port: "
                    "192.0.2.1:80, [2001:db8::1]:80, 10.0.0.0/8, example.org, :25"
                ) from None
        try:
            found_addresses = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:  # the latter for a label that no name can have
            said = getattr(error, "strerror", None) or "no such name"
            raise UsageError(f"can't find the address of {host!r}: {said}") from error
        addresses = sorted({str(each[4][0]).partition("%")[0] for each in found_addresses})
        return cls(tuple(ipaddress.ip_network(each) for each in addresses), port)

    def has(self, address: Address) -> bool:
        host = ipaddress.ip_address(address[0])
        if self.port not in (None, address[1]):
            return False
        return any(host.version == each.version and host in each for each in self.networks)


@dataclass(frozen=True)
class Access:
    """What may be reached: what `deny` doesn't have, and, where `allow` has any, what it has."""

    deny: tuple[Place, ...] = ()
    allow: tuple[Place, ...] = ()

    def permits(self, address: Address) -> bool:
        if any(place.has(address) for place in self.deny):
            return False
        return not self.allow or any(place.has(address) for place in self.allow)


def is_of_this_machine(host: str) -> bool:
    """Whether an address belongs to this machine: loopback, or an interface's own.

    The kernel is asked: it sends from the same address what goes to one of its own. No packet is
    sent for that.

    Raises:
        OSError: there is no route to the address.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        probe.connect((host, _DISCARD))
        source = str(probe.getsockname()[0]).partition("%")[0]
    found = ipaddress.ip_address(host)
    loopback = ipaddress.ip_address(source).is_loopback
    return found.is_loopback or loopback or ipaddress.ip_address(source) == found
