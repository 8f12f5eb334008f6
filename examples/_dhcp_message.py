"""DHCP messages as bytes (RFC 2131, section 2; options: RFC 2132). No I/O."""

import dataclasses
import struct
from enum import IntEnum
from ipaddress import IPv4Address

__all__ = ["NOBODY", "MalformedError", "Message", "Opt", "Type", "addresses", "seconds"]

NOBODY = IPv4Address(0)

# op, htype, hlen, hops, xid, secs, flags, ciaddr, yiaddr, siaddr, giaddr, chaddr, sname, file,
# magic cookie (RFC 2131, figure 1).
_FIXED = struct.Struct("!BBBBIHH4s4s4s4s16s64s128s4s")
_COOKIE = bytes((99, 130, 83, 99))
_SHORTEST = 300  # of BOOTP (RFC 951); some clients and relays require it
_REQUEST, _REPLY, _ETHERNET = 1, 2, 1
_BROADCAST = 0x8000


class Type(IntEnum):
    """The type of a message (RFC 2132, section 9.6)."""

    DISCOVER = 1
    OFFER = 2
    REQUEST = 3
    DECLINE = 4
    ACK = 5
    NAK = 6
    RELEASE = 7
    INFORM = 8


class Opt(IntEnum):
    """The options that the server understands (RFC 2132; option 82: RFC 3046)."""

    PAD = 0
    MASK = 1
    ROUTER = 3
    DNS = 6
    HOSTNAME = 12
    BROADCAST = 28
    REQUESTED_ADDRESS = 50
    LEASE_TIME = 51
    OVERLOAD = 52
    TYPE = 53
    SERVER = 54
    PARAMETERS = 55
    TEXT = 56
    MAX_SIZE = 57
    T1 = 58
    T2 = 59
    CLIENT = 61
    RELAY = 82
    END = 255


_KNOWN = frozenset(int(each) for each in Opt)


class MalformedError(ValueError):
    """The bytes are not a DHCP message from a client on Ethernet."""


@dataclasses.dataclass
class Message:
    """A message. Fields have the RFC's names; an address that is not set is NOBODY."""

    type: Type | None  # None in BOOTP messages, which have no such option
    xid: int
    chaddr: bytes
    broadcast: bool = False
    secs: int = 0
    hops: int = 0
    ciaddr: IPv4Address = NOBODY
    yiaddr: IPv4Address = NOBODY
    siaddr: IPv4Address = NOBODY
    giaddr: IPv4Address = NOBODY
    file: bytes = b""
    options: dict[int, bytes] = dataclasses.field(default_factory=dict)  # except the type
    malformed: int = dataclasses.field(default=0, compare=False)  # options that were dropped

    @classmethod
    def parse(cls, data: bytes, op: int = _REQUEST) -> "Message":
        """Read a client's message, or with `op` 2 a server's.

        Drops a malformed option and counts it in `malformed`; keeps the others.

        Raises:
            MalformedError: it is not such a message.
        """
        if len(data) < _FIXED.size:
            raise MalformedError("too short")
        (found_op, htype, hlen, hops, xid, secs, flags, ciaddr, yiaddr, siaddr, giaddr,
         chaddr, sname, file, cookie) = _FIXED.unpack_from(data)  # fmt: skip
        if (found_op, htype, hlen, cookie) != (op, _ETHERNET, 6, _COOKIE):
            raise MalformedError("not DHCP on Ethernet, or the wrong direction")
        if chaddr[0] & 1 or not any(chaddr[:6]):
            raise MalformedError("a client whose address is a group's, or nobody's")
        options, malformed = _read_options(data[_FIXED.size :], sname, file)
        return cls(
            type=_type(options.pop(Opt.TYPE, None)),
            xid=xid,
            chaddr=chaddr[:6],
            broadcast=bool(flags & _BROADCAST),
            secs=secs,
            hops=hops,
            ciaddr=IPv4Address(ciaddr),
            yiaddr=IPv4Address(yiaddr),
            siaddr=IPv4Address(siaddr),
            giaddr=IPv4Address(giaddr),
            file=file.partition(b"\0")[0],
            options=options,
            malformed=malformed,
        )

    def pack(self, op: int = _REPLY) -> bytes:
        """Write a server's message, or with `op` 1 a client's."""
        head = _FIXED.pack(
            op, _ETHERNET, 6, self.hops, self.xid, self.secs, _BROADCAST * self.broadcast,
            self.ciaddr.packed, self.yiaddr.packed, self.siaddr.packed, self.giaddr.packed,
            self.chaddr, b"", self.file, _COOKIE,
        )  # fmt: skip
        parts = [head]
        if self.type is not None:
            parts.append(bytes((Opt.TYPE, 1, self.type)))
        for code, value in self.options.items():
            # RFC 3396: a value that is too long for one option is split into several.
            for start in range(0, max(len(value), 1), 255):
                piece = value[start : start + 255]
                parts.append(bytes((code, len(piece))) + piece)
        parts.append(bytes((Opt.END,)))
        return b"".join(parts).ljust(_SHORTEST, b"\0")

    @property
    def client(self) -> bytes:
        """The client's identifier, or its hardware address (RFC 2131, section 4.2)."""
        identifier = self.options.get(Opt.CLIENT)
        return b"\1" + self.chaddr if identifier is None else identifier

    def address(self, code: Opt) -> IPv4Address:
        """The value of an option that is one address; NOBODY if the option is missing."""
        value = self.options.get(code)
        return NOBODY if value is None else IPv4Address(value)

    @property
    def unknown(self) -> bool:
        """Whether it has an option that the server does not understand."""
        return not self.options.keys() <= _KNOWN


# The length of an option's value; other options may have any length.
_LENGTHS = {Opt.REQUESTED_ADDRESS: 4, Opt.SERVER: 4, Opt.TYPE: 1, Opt.OVERLOAD: 1}
_SHORTEST_CLIENT = 2  # RFC 2132, section 9.14


def _read_options(data: bytes, sname: bytes, file: bytes) -> tuple[dict[int, bytes], int]:
    """Read the options, including those that overflow into other fields (RFC 2132, section 9.3).

    Returns them, and how many were malformed.
    """
    options: dict[int, bytes] = {}
    malformed = _read_field(data, options)
    where = options.get(Opt.OVERLOAD, b"\0")[0]
    if where > 3:
        malformed += 1
        where = 0
    if where & 1:
        malformed += _read_field(file, options)
    if where & 2:
        malformed += _read_field(sname, options)
    options.pop(Opt.OVERLOAD, None)
    if Opt.CLIENT in options and len(options[Opt.CLIENT]) < _SHORTEST_CLIENT:
        del options[Opt.CLIENT]
        malformed += 1
    return options, malformed


def _read_field(data: bytes, options: dict[int, bytes]) -> int:
    """Add a field's options to those already read; return how many were malformed."""
    malformed = at = 0
    # Some clients omit the end option at the end of the message.
    while at < len(data) and data[at] != Opt.END:
        code = data[at]
        if code == Opt.PAD:
            at += 1
            continue
        if at + 1 >= len(data) or at + 2 + data[at + 1] > len(data):
            return malformed + 1  # the last option is truncated
        value = data[at + 2 : at + 2 + data[at + 1]]
        at += 2 + len(value)
        if code not in _LENGTHS:
            # RFC 3396: the pieces of an option that occurs several times are joined.
            options[code] = options.get(code, b"") + value
        elif len(value) == _LENGTHS[Opt(code)] and code not in options:
            options[code] = value
        else:
            malformed += 1  # of the wrong length, or a duplicate: such short options are not split
    return malformed


def _type(value: bytes | None) -> Type | None:
    if value is None:
        return None
    try:
        return Type(value[0])
    except ValueError:
        raise MalformedError(f"type {value[0]}") from None


def addresses(*values: IPv4Address) -> bytes:
    """The value of an option that is a list of addresses."""
    return b"".join(each.packed for each in values)


def seconds(value: float) -> bytes:
    """The value of an option that is a time."""
    return min(int(value), 0xFFFF_FFFF).to_bytes(4, "big")
