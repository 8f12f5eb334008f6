"""Decodes packets into dpkt's objects, and encodes these.

Only this module and `_packets.encode`, which is a part of it, import dpkt. They do so when the
first packet is decoded or encoded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from .errors import PacketDecodeError

if TYPE_CHECKING:
    from collections.abc import Callable

    # Re-exported for device.py's annotations, as no other module may import dpkt.
    from dpkt.ethernet import Ethernet as Ethernet
    from dpkt.ip import IP as IP
    from dpkt.ip6 import IP6 as IP6

    from ._kernel.words import Mode

P = TypeVar("P")

__all__ = ["decode_frame", "decode_packet", "encode"]

# The ethertypes of VLAN tags: 802.1Q, 802.1ad, and two that were used before 802.1ad.
_TAGGED = (b"\x81\0", b"\x88\xa8", b"\x91\0", b"\x92\0")
_ISL = (b"\1\0\x0c\0\0", b"\3\0\x0c\0\0")  # how the destination of a frame with an ISL tag begins
_MOST_TAGS = 8  # each 4-byte tag becomes an object of many times its size

_MISSING = "this needs dpkt, which is not installed: pip install 'aiotun[dpkt]'"


def decode_packet(data: bytes | bytearray | memoryview) -> IP | IP6:
    """Decode an IP packet.

    Args:
        data: the packet, without a header in front of it. If it is not `bytes`, it is copied first.

    Returns:
        A `dpkt.ip.IP` or a `dpkt.ip6.IP6`, by the version in the packet's first four bits.

    Raises:
        PacketDecodeError: the bytes are not an IP packet, or dpkt can't decode them.
        ImportError: dpkt is not installed.
    """
    try:
        from dpkt import ip, ip6
    except ImportError as error:
        raise ImportError(_MISSING) from error
    version = data[0] >> 4 if data else None
    if version not in (4, 6):
        raise PacketDecodeError(f"not an IP packet: the version must be 4 or 6, got {version}")
    return _decode(ip.IP, data) if version == 4 else _decode(ip6.IP6, data)


def decode_frame(data: bytes | bytearray | memoryview) -> Ethernet:
    """Decode an Ethernet frame.

    Args:
        data: the frame. If it is not `bytes`, it is copied first.

    Returns:
        A `dpkt.ethernet.Ethernet`. It includes what dpkt alone would leave out: up to 8 VLAN tags
        in `vlan_tags`; a pseudowire's control word and what follows it, as bytes in `data`; a frame
        in a pseudowire with more VLAN tags than dpkt reads, as bytes in `data`; and the payload of
        a raw 802.3 frame (Novell), as bytes in `data`.

    Raises:
        PacketDecodeError: dpkt can't decode the frame, or it has more than 8 VLAN tags.
        ImportError: dpkt is not installed.
    """
    try:
        from dpkt import ethernet
    except ImportError as error:
        raise ImportError(_MISSING) from error
    # Decode a copy: dpkt's LLC parsers fail on a memoryview. Its other parsers would return views
    # of a buffer that the caller may change.
    whole = bytes(data)
    places = _tag_places(whole)
    if len(places) > _MOST_TAGS:
        raise PacketDecodeError(
            f"the frame has {len(places)} VLAN tags; at most {_MOST_TAGS} are decoded"
        )
    if _reads_all(whole, places):
        frame = _decode(ethernet.Ethernet, whole)
    else:
        frame = _decode(ethernet.Ethernet, whole[:12] + whole[places[-1] :])
        outer = [ethernet.VLANtag8021Q(whole[at + 2 : at + 6]) for at in places[:-1]]
        frame.vlan_tags[:0] = outer
        frame.vlanid, frame.priority, frame.cfi = outer[0].as_tuple()
        frame.type = int.from_bytes(whole[12:14], "big")
    _restore(frame, whole)
    return frame


def _tag_places(frame: bytes) -> list[int]:
    """Return the offsets of a frame's VLAN tags; each tag begins with its 2-byte ethertype."""
    places = []
    at = 12
    while frame[at : at + 2] in _TAGGED and len(frame) >= at + 6:
        places.append(at)
        at += 4
    return places


def _reads_all(frame: bytes, places: list[int]) -> bool:
    """Whether dpkt reads all of a frame's VLAN tags.

    It reads two tags if the second one is 0x8100. Of other stacks it keeps only the last tags.
    """
    return len(places) < 2 or (len(places) == 2 and frame[places[1] : places[1] + 2] == b"\x81\0")


def _restore(frame: Ethernet, whole: bytes) -> None:
    """Put bytes that dpkt skips back into `data`, so that encoding the frame does not lose them.

    Args:
        frame: the frame as dpkt has decoded it.
        whole: the bytes that dpkt has decoded.
    """
    from dpkt.ethernet import ETH_TYPE_IPX, VLANtag8021Q

    # dpkt decodes a frame behind a Cisco ISL tag of 26 bytes into the same object.
    while whole[:5] in _ISL and int.from_bytes(whole[12:14], "big") <= 1500:
        whole = whole[26:]
    if frame.type == ETH_TYPE_IPX and int.from_bytes(whole[12:14], "big") <= 1500:
        # Raw 802.3 (Novell). dpkt skips the payload's first two bytes and would write Ethernet II.
        frame.type, frame.data = int.from_bytes(whole[12:14], "big"), whole[14:]
        vars(frame).pop("ipx", None)  # it is missing if dpkt could not decode the payload
        return
    labels = getattr(frame, "mpls_labels", ())
    if not labels:
        return
    tags = [tag for tag in getattr(frame, "vlan_tags", ()) if isinstance(tag, VLANtag8021Q)]
    inner = whole[14 + 4 * len(tags) + 4 * len(labels) :]
    # dpkt skips a pseudowire's control word (RFC 4385).
    skipped = inner[:2] == b"\0\0" and len(inner) >= 14
    is_frame = isinstance(frame.data, type(frame))
    if skipped or (is_frame and not _reads_all(inner, _tag_places(inner))):
        frame.data = inner
        vars(frame).pop("ethernet", None)
    elif is_frame:
        _restore(frame.data, inner)  # the frame in the pseudowire may have all that itself


def _decode(parser: Callable[[bytes], P], data: bytes | bytearray | memoryview) -> P:
    try:
        return parser(data if isinstance(data, bytes) else bytes(data))
    # For a malformed packet dpkt raises AttributeError, IndexError, RecursionError and more, as
    # well as its own UnpackError. Catching all of them is safe: only dpkt's parser runs here.
    except Exception as error:
        text = f"dpkt can't decode these {len(data)} bytes ({type(error).__name__}: {error})"
        raise PacketDecodeError(text) from error


def encode(packet: IP | IP6 | Ethernet) -> bytes:
    """Encode a dpkt object as a packet that can be sent, with correct lengths and checksums.

    These are computed, whatever the object says: total and payload lengths, header sizes with
    options, UDP's length, and the checksums of IPv4, TCP, UDP, ICMP and ICMPv6, and of IGMP, OSPF,
    PIM and SCTP over IPv4. This includes packets within Ethernet, VLAN tags and IP in IP. A
    protocol number of 0 (`p`, `nxt`), which is dpkt's default, is filled in, and so is the Ethernet
    type. All other fields are written as they are. Set `IP6.hlim` yourself: dpkt's default is 0.

    Part of a larger packet keeps its lengths and checksums, as these are about the whole: a
    fragment's payload, or the packet that an ICMP error quotes. Data that is bytes is not changed
    either. Decoding loses an Ethernet frame's padding and whatever dpkt has no field for: to
    forward a packet, send its original bytes.

    Args:
        packet: a `dpkt.ip.IP`, `dpkt.ip6.IP6` or `dpkt.ethernet.Ethernet`. It is not changed.

    Raises:
        TypeError: `packet` is none of these classes.
        ValueError: a field's value does not fit into the packet, a protocol number contradicts the
            data, a packet is too long, or dpkt can't write one of the layers. To find the last, the
            result is decoded again and must have the same layers.
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
        return data  # the payload is bytes that dpkt can't decode, which were written as they are
    check(packet, again, data)
    return data


def decoder(mode: Mode) -> Callable[[bytes], IP | IP6 | Ethernet]:
    """Return the function that decodes the packets of a device of this mode.

    Raises:
        ImportError: dpkt is not installed. This is raised now, not at the first packet.
    """
    try:
        import dpkt  # noqa: F401
    except ImportError as error:
        raise ImportError(_MISSING) from error
    return decode_packet if mode == "tun" else decode_frame
