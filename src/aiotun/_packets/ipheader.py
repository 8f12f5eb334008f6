"""A cheap view of an IP header, for hot paths; needs no dpkt."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Address

__all__ = ["IPHeader"]

# One unpack reads what most callers need. Indices and slices take twice as long, and return views
# instead of bytes if the packet is a memoryview.
_IPV4 = struct.Struct("!xxHxxHBBxx4s4s").unpack_from  # RFC 791, section 3.1
_IPV6 = struct.Struct("!4xHBB16s16s").unpack_from  # RFC 8200, section 3
_PORTS = struct.Struct("!HH").unpack_from

# The "more fragments" flag and the fragment offset, as in IPv4 (RFC 791, section 3.1).
_MORE, _OFFSET = 0x2000, 0x1FFF

_FRAGMENT, _AUTHENTICATION = 44, 51
# Hop-by-hop options, routing, fragment (RFC 8200, section 4), authentication (RFC 4302) and
# destination options: the headers that Linux treats as extension headers. ESP is not one of them,
# as it encrypts what follows, nor is a mobility header (RFC 6275), which nothing follows.
_EXTENSIONS = frozenset({0, 43, _FRAGMENT, _AUTHENTICATION, 60})

# TCP, UDP, DCCP, SCTP and UDP-Lite begin with source and destination port.
_WITH_PORTS = frozenset({6, 17, 33, 132, 136})


class IPHeader:
    """The fields of an IPv4 or IPv6 packet that a hot path needs.

    The constructor checks the whole header; properties and attributes never raise. The payload is
    not checked: checksums are not verified, and the packet may be truncated after its headers (as a
    packet that an ICMP error quotes).

    Args:
        packet: an IP packet, without a header in front of it. It is not copied: don't change it
            while the IPHeader is in use.

    Attributes:
        src_bytes: the source address as 4 or 16 bytes.
        dst_bytes: the destination address as 4 or 16 bytes.
        ttl: the TTL or hop limit.
        total_length: the packet's length in bytes including its header, as the header states it.
        proto: the protocol number of the payload. In IPv6 this is the protocol after any
            hop-by-hop, routing, fragment, authentication and destination options headers; 59 if
            nothing follows. In a later fragment, it is the number in the fragment header, because
            no other headers follow.
        payload_offset: the offset of the payload in the packet; at most `total_length`.

    Raises:
        ValueError: the packet has no valid IP header: another version, a truncated header, or
            lengths that contradict each other. In IPv6 also extension headers that run past the
            packet's end (for example in jumbograms, RFC 2675, which no TUN or TAP device can
            carry).
    """

    __slots__ = (
        "_packet",
        "_place",
        "dst_bytes",
        "payload_offset",
        "proto",
        "src_bytes",
        "total_length",
        "ttl",
    )

    src_bytes: bytes
    dst_bytes: bytes
    ttl: int
    total_length: int
    proto: int
    payload_offset: int
    _place: int

    def __init__(self, packet: bytes | bytearray | memoryview) -> None:
        self._packet = packet
        # Store all fields now: reading a property costs more than writing a slot.
        try:
            first = packet[0]
            if first == 0x45:
                (self.total_length, self._place, self.ttl, self.proto,
                 self.src_bytes, self.dst_bytes) = _IPV4(packet)  # fmt: skip
                self.payload_offset = 20
                if self.total_length < 20:
                    raise ValueError(
                        f"not a valid IPv4 header: its total length is {self.total_length} bytes"
                    )
            elif first >> 4 == 6:
                length, proto, self.ttl, self.src_bytes, self.dst_bytes = _IPV6(packet)
                self.total_length = length + 40
                self.proto = proto
                self.payload_offset = 40
                self._place = 0
                if proto in _EXTENSIONS:
                    self._skip_extensions()
            else:
                self._read_unusual()
        except (IndexError, struct.error):
            raise ValueError(
                f"not a valid IP header: truncated after {len(packet)} bytes"
            ) from None

    def _read_unusual(self) -> None:
        """Read an IPv4 header with options; raise for other versions."""
        packet = self._packet
        if packet[0] >> 4 != 4:
            raise ValueError(
                f"not a valid IP header: the version must be 4 or 6, got {packet[0] >> 4}"
            )
        (self.total_length, self._place, self.ttl, self.proto,
         self.src_bytes, self.dst_bytes) = _IPV4(packet)  # fmt: skip
        self.payload_offset = header = (packet[0] & 15) * 4
        if not 20 <= header <= min(self.total_length, len(packet)):
            raise ValueError(
                f"not a valid IPv4 header: it states a header of {header} bytes in a packet of "
                f"{self.total_length}, and the packet has {len(packet)}"
            )

    def _skip_extensions(self) -> None:
        """Find the payload after an IPv6 packet's extension headers."""
        packet = self._packet
        end = min(self.total_length, len(packet))
        following, offset = self.proto, 40
        # This ends: each header has at least 8 bytes.
        while following in _EXTENSIONS and not self._place & _OFFSET:
            if offset + 8 > end:
                break
            if following == _FRAGMENT:
                # Store flag and offset as in IPv4: the flag, then 13 bits of offset.
                _, place = _PORTS(packet, offset)
                self._place = place >> 3 | (place & 1) << 13
                length = 8
            elif following == _AUTHENTICATION:
                length = (packet[offset + 1] + 2) * 4
            else:
                length = (packet[offset + 1] + 1) * 8
            following = packet[offset]
            offset += length
        else:
            if offset <= end:
                self.proto, self.payload_offset = following, offset
                return
        raise ValueError(f"an extension header runs past the packet's end, at {end} bytes")

    @property
    def version(self) -> int:
        """4 or 6."""
        return 4 if len(self.src_bytes) == 4 else 6

    @property
    def fragment(self) -> bool:
        """Whether this is a fragment: more fragments follow, or it is not the first one.

        An atomic fragment (RFC 6946), which is both the first and the last one, is a whole packet.
        """
        return self._place & (_MORE | _OFFSET) != 0

    @property
    def src(self) -> IPv4Address | IPv6Address:
        """The source address; `src_bytes` is cheaper."""
        return (IPv4Address if len(self.src_bytes) == 4 else IPv6Address)(self.src_bytes)

    @property
    def dst(self) -> IPv4Address | IPv6Address:
        """The destination address; `dst_bytes` is cheaper."""
        return (IPv4Address if len(self.src_bytes) == 4 else IPv6Address)(self.dst_bytes)

    @property
    def sport(self) -> int | None:
        """The source port of TCP, UDP, UDP-Lite, SCTP or DCCP.

        None if the packet has another protocol, is a fragment but not the first one, or is
        truncated before the end of the destination port.
        """
        ports = self._ports()
        return ports and ports[0]

    @property
    def dport(self) -> int | None:
        """The destination port; see `sport`."""
        ports = self._ports()
        return ports and ports[1]

    def _ports(self) -> tuple[int, int] | None:
        offset = self.payload_offset
        if self.proto not in _WITH_PORTS or self._place & _OFFSET or offset + 4 > self.total_length:
            return None
        packet = self._packet
        if offset + 4 > len(packet):
            return None
        ports: tuple[int, int] = _PORTS(packet, offset)
        return ports

    def __repr__(self) -> str:
        ports = self._ports()
        more = "" if ports is None else f" sport={ports[0]} dport={ports[1]}"
        more += " fragment" if self.fragment else ""
        return f"<IPHeader {self.src} > {self.dst} proto={self.proto} ttl={self.ttl}{more}>"
