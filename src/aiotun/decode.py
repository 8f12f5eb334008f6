"""Packets as dpkt's objects, and back.

This and `_packets.encode`, which is its own part, are all that imports dpkt, and only once
something is decoded or encoded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from .errors import PacketDecodeError

if TYPE_CHECKING:
    from collections.abc import Callable

    # As themselves, for device.py's annotations: nothing else may import dpkt.
    from dpkt.ethernet import Ethernet as Ethernet
    from dpkt.ip import IP as IP
    from dpkt.ip6 import IP6 as IP6

    from ._kernel.words import Mode

P = TypeVar("P")

__all__ = ["decode_frame", "decode_packet", "encode"]

# What a VLAN tag is announced by: 802.1Q, 802.1ad, and two that were used before that.
_TAGGED = (b"\x81\0", b"\x88\xa8", b"\x91\0", b"\x92\0")
_MOST_TAGS = 8  # each becomes an object, of many times its size

_MISSING = "this needs dpkt, which is not installed: pip install 'aiotun[dpkt]'"


def decode_packet(data: bytes | bytearray | memoryview) -> IP | IP6:
    """Decode an IP packet.

    Args:
        data: the packet, without anything in front of it. What is no `bytes` is copied first.

    Returns:
        A `dpkt.ip.IP` or a `dpkt.ip6.IP6`, by the version in the packet's first four bits.

    Raises:
        PacketDecodeError: the bytes are no IP packet, or dpkt cannot read them.
        ImportError: dpkt is not installed.
    """
    try:
        from dpkt import ip, ip6
    except ImportError as error:
        raise ImportError(_MISSING) from error
    version = data[0] >> 4 if data else None
    if version not in (4, 6):
        raise PacketDecodeError(f"no IP packet: its version is {version}, neither 4 nor 6")
    return _decode(ip.IP, data) if version == 4 else _decode(ip6.IP6, data)


def decode_frame(data: bytes | bytearray | memoryview) -> Ethernet:
    """Decode an Ethernet frame.

    Args:
        data: the frame. What is no `bytes` is copied first.

    Returns:
        A `dpkt.ethernet.Ethernet`. Where dpkt alone leaves something out, it is there: all of up to
        8 VLAN tags in `vlan_tags`, a pseudowire's control word and what follows it as `data` of
        bytes, and so the payload of Novell's raw 802.3.

    Raises:
        PacketDecodeError: dpkt cannot read it, or it has more VLAN tags.
        ImportError: dpkt is not installed.
    """
    try:
        from dpkt import ethernet
    except ImportError as error:
        raise ImportError(_MISSING) from error
    # dpkt's own parsers of LLC fail on a memoryview, and leave parts of the others' data as views
    # of what the caller may change.
    whole = bytes(data)
    places = _tag_places(whole)
    # dpkt reads two tags where the second is 0x8100; of any others it keeps the last ones.
    if len(places) < 2 or (len(places) == 2 and whole[places[1] : places[1] + 2] == b"\x81\0"):
        frame = _decode(ethernet.Ethernet, whole)
    else:
        frame = _decode(ethernet.Ethernet, whole[:12] + whole[places[-1] :])
        outer = [ethernet.VLANtag8021Q(whole[at + 2 : at + 6]) for at in places[:-1]]
        frame.vlan_tags[:0] = outer
        frame.vlanid, frame.priority, frame.cfi = outer[0].as_tuple()
        frame.type = int.from_bytes(whole[12:14], "big")
    _restore(frame, whole, 14 + 4 * len(places))
    return frame


def _tag_places(frame: bytes) -> list[int]:
    """Where a frame's VLAN tags stand, the first two bytes of each its ethertype."""
    places = []
    at = 12
    while frame[at : at + 2] in _TAGGED and len(frame) >= at + 6:
        places.append(at)
        at += 4
    if len(places) > _MOST_TAGS:
        raise PacketDecodeError(f"a frame with {len(places)} VLAN tags; {_MOST_TAGS} are enough")
    return places


def _restore(frame: Ethernet, whole: bytes, at: int) -> None:
    """Give back what dpkt skips, as `data` of bytes, so that it is not lost when it is written.

    Args:
        frame: as dpkt has decoded it.
        whole: what it has decoded.
        at: where in it the labels or the payload begin.
    """
    from dpkt.ethernet import ETH_TYPE_IPX

    if frame.type == ETH_TYPE_IPX and int.from_bytes(whole[12:14], "big") <= 1500:
        # Novell's raw 802.3: its first two bytes are left out, and it becomes Ethernet II.
        frame.type, frame.data = int.from_bytes(whole[12:14], "big"), whole[14:]
        del frame.ipx
        return
    at += 4 * len(getattr(frame, "mpls_labels", ()))
    if (
        getattr(frame, "mpls_labels", ())
        and whole[at : at + 2] == b"\0\0"
        and at + 14 <= len(whole)
    ):
        frame.data = whole[at:]  # a pseudowire's control word (RFC 4385) is left out
        vars(frame).pop("ethernet", None)


def _decode(parser: Callable[[bytes], P], data: bytes | bytearray | memoryview) -> P:
    try:
        return parser(data if isinstance(data, bytes) else bytes(data))
    # A stranger's packet makes dpkt raise AttributeError, IndexError, RecursionError and more, as
    # well as its own UnpackError. Nothing but a parser of these bytes runs here.
    except Exception as error:
        text = f"dpkt cannot read these {len(data)} bytes ({type(error).__name__}: {error})"
        raise PacketDecodeError(text) from error


def encode(packet: IP | IP6 | Ethernet) -> bytes:
    """Write a dpkt object as what is meant by sending it: with right lengths and checksums.

    Total and payload lengths, header sizes with options, UDP's length, and the checksums of IPv4,
    TCP, UDP, ICMP and ICMPv6 are computed, whatever the object says and dpkt would make of it; so
    are those of IGMP, OSPF, PIM and SCTP over IPv4. Within Ethernet, VLAN tags and IP in IP, too.
    A protocol number of 0 (`p`, `nxt`), which dpkt begins with, is filled in, and so is an
    Ethernet type. All other fields go out as they are: `IP6.hlim`, which dpkt leaves at 0, is
    yours to set.

    What is part of something larger keeps what it says of that: a fragment's payload, the packet
    that an ICMP error quotes. So does data that is bytes. Decoding loses an Ethernet frame's
    padding and what dpkt has no place for: to forward a packet, send its original bytes.

    Args:
        packet: a `dpkt.ip.IP`, `dpkt.ip6.IP6` or `dpkt.ethernet.Ethernet`. It is not changed.

    Raises:
        TypeError: it is none of these.
        ValueError: a field holds what does not fit into the packet, a protocol number contradicts
            the data, a packet is too long, or dpkt cannot write one of the layers: what was written
            is decoded once more, and has to have the same layers.
        ImportError: dpkt is not installed.
    """
    try:
        from ._packets.encode import check, encoded, written_here
    except ImportError as error:
        raise ImportError(_MISSING) from error
    data = encoded(packet)
    if written_here(packet):
        return data
    from dpkt.ethernet import Ethernet

    try:
        again = decode_frame(data) if isinstance(packet, Ethernet) else decode_packet(data)
    except PacketDecodeError:
        return data  # its `data` is bytes that dpkt can't read, and was written as it is
    check(packet, again, data)
    return data


def decoder(mode: Mode) -> Callable[[bytes], IP | IP6 | Ethernet]:
    """Give what decodes the packets of a device of this kind.

    Raises:
        ImportError: dpkt is not installed: now, and not at the first packet.
    """
    try:
        import dpkt  # noqa: F401
    except ImportError as error:
        raise ImportError(_MISSING) from error
    return decode_packet if mode == "tun" else decode_frame
