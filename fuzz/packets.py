"""Packets and frames: decoding, encoding, the header view, the answers, the lines of `dump`."""

import io
from ipaddress import IPv4Network, IPv6Network

from aiotun import IPHeader, PacketDecodeError, decode_frame, decode_packet, encode, reply
from aiotun._cli.describe import describe
from aiotun._netstack.pings import echo_request
from aiotun._packets.fragments import Reassembler, fragment_of
from aiotun._packets.udp import build, parse, quoted

from ._target import Target

__all__ = ["TARGETS"]

_MAC = b"\2\0\0\0\0\1"
_NETWORKS = IPv4Network("0.0.0.0/0"), IPv6Network("::/0")


def decoding(data: bytes) -> None:
    """dpkt raises many exceptions on bad input; aiotun must raise one, and write what it read."""
    for decode in (decode_packet, decode_frame):
        try:
            decoded = decode(data)
        except PacketDecodeError:
            continue
        try:
            written = encode(decoded)
        except ValueError:
            continue  # for example, longer than an IP packet may be
        try:
            again = decode(written)
        except PacketDecodeError:
            continue  # the payload was plain bytes, in which dpkt now looks for a layer
        assert encode(again) == written, (decoded, again)


def header(data: bytes) -> None:
    try:
        view = IPHeader(data)
    except ValueError:
        return
    assert view.version == data[0] >> 4
    size = 4 if view.version == 4 else 16
    assert len(view.src_bytes) == len(view.dst_bytes) == size
    assert view.src.packed == view.src_bytes
    assert 20 <= view.payload_offset <= view.total_length
    assert view.payload_offset <= len(data)
    assert (view.sport is None) == (view.dport is None)
    assert isinstance(view.fragment, bool)
    assert repr(view).startswith("<IPHeader ")


def replying(data: bytes) -> None:
    """Answers must raise nothing, be no longer than the request, and go back to its sender."""
    before = bytes(data)
    echo = reply.icmp_echo(data)
    if echo is not None:
        assert 28 <= len(echo) <= len(data)
        assert echo[12:20] == data[16:20] + data[12:16]
        assert IPHeader(echo).total_length == len(echo)
    echo = reply.icmpv6_echo(data)
    if echo is not None:
        assert 48 <= len(echo) <= len(data)
        assert echo[8:40] == data[24:40] + data[8:24]
    # The answer has the same VLAN 0 tag as the request.
    tag = data[12:16] if data[12:14] in (b"\x81\0", b"\x88\xa8") else b""
    answer = reply.arp(data, _MAC, _NETWORKS[0])
    if answer is not None:
        assert len(answer) == 42 + len(tag)
        assert answer[6:].startswith(_MAC + tag)
        assert answer[:6] == data[22 + len(tag) : 28 + len(tag)]
        assert reply.arp(answer, _MAC, _NETWORKS[0]) is None  # no answer to an answer
    answer = reply.neighbour_advertisement(data, _MAC, _NETWORKS[1])
    if answer is not None:
        assert len(answer) == 86 + len(tag)
        assert answer[6:].startswith(_MAC + tag)
        assert reply.neighbour_advertisement(answer, _MAC, _NETWORKS[1]) is None
    assert data == before


def describing(data: bytes) -> None:
    """Any bytes must give a line, and no line can control a terminal."""
    for frame in (False, True):
        line, _ = describe(data, frame=frame)
        assert line.isprintable(), line
        assert len(line) < 1000


def datagrams(data: bytes) -> None:
    """What a stack reads of packets from strangers: the input is several packets, each cut off."""
    stream, reassembler, given = io.BytesIO(data), Reassembler(), 0
    while head := stream.read(2):
        packet = stream.read(int.from_bytes(head, "big"))
        quoted(packet)
        parsed = parse(packet)
        assert parsed is None or build(*parsed, 0)[-len(parsed[2]) or 65535 :] == parsed[2]
        echo_request(packet)
        if not fragment_of(packet):
            continue
        given += 1
        whole = reassembler.add(packet, 0.0)
        if whole is not None:
            assert IPHeader(whole).total_length == len(whole)
            assert not fragment_of(whole)
    reassembler.clear()
    assert reassembler.dropped <= given


TARGETS = [
    Target(
        "decode",
        decoding,
        "decode_packet and decode_frame raise only PacketDecodeError; encode of their results "
        "raises only ValueError, and decoding and encoding again gives the same bytes",
    ),
    Target(
        "header",
        header,
        "IPHeader raises only ValueError; its offsets are within the packet; no property raises",
    ),
    Target(
        "reply",
        replying,
        "raises nothing; an answer is no longer than the request (ARP 42 bytes, neighbor "
        "advertisement 86, plus 4 for a VLAN 0 tag), goes back to its sender, and is not answered "
        "itself",
    ),
    Target(
        "datagrams",
        datagrams,
        "reading datagrams, pings, ICMP errors and fragments raises nothing; what is put together "
        "is a whole packet; no fragment counts twice",
    ),
    Target(
        "describe",
        describing,
        "raises nothing; gives one line of printable characters",
    ),
]
