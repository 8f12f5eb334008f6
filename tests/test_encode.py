"""Encoding dpkt's objects: a slow reader checks every field, also if it was stale before."""

import copy
import pickle
import socket
import struct
from collections.abc import Callable
from typing import Any

import dpkt
import pytest
from dpkt.ethernet import Ethernet, MPLSlabel, VLANtag8021Q, VLANtagISL
from dpkt.icmp import ICMP
from dpkt.icmp6 import ICMP6
from dpkt.ip import IP
from dpkt.ip6 import (
    IP6,
    IP6AHHeader,
    IP6DstOptsHeader,
    IP6ESPHeader,
    IP6FragmentHeader,
    IP6HopOptsHeader,
    IP6RoutingHeader,
)
from dpkt.tcp import TCP
from dpkt.udp import UDP
from hypothesis import given
from hypothesis import strategies as st

import aiotun
from aiotun import encode

from .helpers import checksum

SRC4, DST4 = socket.inet_aton("10.0.0.1"), socket.inet_aton("10.0.0.2")
SRC6, DST6 = (socket.inet_pton(socket.AF_INET6, a) for a in ("fd00::1", "fd00::2"))
MAC1, MAC2 = b"\2\0\0\0\0\1", b"\2\0\0\0\0\2"


def ip4(data: object, **fields: Any) -> IP:
    return IP(src=SRC4, dst=DST4, data=data, **fields)


def ip6(data: object, **fields: Any) -> IP6:
    return IP6(src=SRC6, dst=DST6, hlim=64, data=data, **fields)


def frame(data: object, **fields: Any) -> Ethernet:
    made = Ethernet(dst=MAC2, src=MAC1)
    made.data = data  # the constructor would decode bytes
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def verify(packet: bytes) -> tuple[int, bytes]:
    """Check all lengths and checksums of a whole packet; return its protocol and payload."""
    if packet[0] >> 4 == 4:
        size = (packet[0] & 15) * 4
        assert struct.unpack_from("!H", packet, 2)[0] == len(packet)
        assert checksum(packet[:size]) == 0
        proto, payload = packet[9], packet[size:]
        pseudo = packet[12:20] + struct.pack("!HH", proto, len(payload))
    else:
        proto, payload = packet[6], packet[40:]
        assert struct.unpack_from("!H", packet, 4)[0] == len(payload)
        while proto in (0, 43, 60):
            proto, payload = payload[0], payload[8 + 8 * payload[1] :]
        pseudo = packet[8:40] + struct.pack("!II", len(payload), proto)
    if proto == 17:
        assert struct.unpack_from("!H", payload, 4)[0] == len(payload)
        assert payload[6:8] != b"\0\0"
    if proto in (6, 17, 58):
        assert checksum(pseudo + payload) == 0
    if proto == 1:
        assert checksum(payload) == 0
    return proto, payload


LAYERS: dict[str, Callable[[bytes], tuple[int, int, Any]]] = {
    "udp": lambda body: (17, 17, UDP(sport=5, dport=7, data=body)),
    "tcp": lambda body: (6, 6, TCP(sport=5, dport=7, data=body)),
    "echo": lambda body: (1, 58, ICMP(data=ICMP.Echo(id=3, seq=4, data=body))),
}


def layer(kind: str, version: int, body: bytes) -> Any:
    if kind == "echo" and version == 6:
        return ICMP6(type=128, data=ICMP6.Echo(id=3, seq=4, data=body))
    return LAYERS[kind](body)[2]


def packet(version: int, data: object, **fields: Any) -> Any:
    return (ip4 if version == 4 else ip6)(data, **fields)


each_version = pytest.mark.parametrize("version", [4, 6])
each_kind = pytest.mark.parametrize("kind", list(LAYERS))


# --- Lengths and checksums -----------------------------------------------------------------------


@each_version
@each_kind
@given(body=st.binary(max_size=100))
def test_lengths_checksums_and_protocols_are_computed(version: int, kind: str, body: bytes) -> None:
    made = encode(packet(version, layer(kind, version, body)))
    proto, payload = verify(made)
    assert proto == LAYERS[kind](b"")[0 if version == 4 else 1]
    assert payload.endswith(body)
    assert len(payload) == len(body) + (20 if kind == "tcp" else 8)


@each_version
@each_kind
def test_stale_lengths_and_checksums_are_computed_again(version: int, kind: str) -> None:
    """bytes() stores checksums and lengths; then the test changes everything."""
    made = packet(version, layer(kind, version, b"before"))
    made.p = made.nxt = LAYERS[kind](b"")[0 if version == 4 else 1]
    bytes(made)
    inner = made.data if kind != "echo" else made.data.data
    inner.data = b"afterwards, and odd"
    made.dst = made.src[::-1]
    expected = packet(version, layer(kind, version, b"afterwards, and odd"))
    expected.dst = made.dst
    assert encode(made) == encode(expected)
    verify(encode(made))
    for field in ("len", "plen", "sum"):
        setattr(made, field, 3)
        setattr(made.data, field, 3)
    made.data.ulen = 3
    assert encode(made) == encode(expected)


@each_version
@pytest.mark.parametrize("size", range(41))
def test_tcp_options_are_padded_to_4_bytes(version: int, size: int) -> None:
    segment = TCP(sport=5, dport=7, flags=0x12, opts=b"\1" * size, data=b"data")
    _, payload = verify(encode(packet(version, segment)))
    offset = 20 + -(-size // 4) * 4
    assert (payload[12] >> 4, payload[13]) == (offset // 4, 0x12)
    assert payload[20:offset] == b"\1" * size + bytes(offset - 20 - size)
    assert payload[offset:] == b"data"


@pytest.mark.parametrize("size", range(41))
def test_ip_options_are_padded_to_4_bytes(size: int) -> None:
    made = encode(ip4(UDP(dport=7, data=b"data"), opts=b"\1" * size))
    _, payload = verify(made)
    assert made[20 : 20 + size] == b"\1" * size
    assert len(made) == 20 + -(-size // 4) * 4 + 12
    assert payload[8:] == b"data"


def test_all_other_fields_are_kept() -> None:
    made = ip4(
        TCP(sport=1, dport=2, seq=3, ack=4, flags=0x1FF, win=6, urp=7),
        tos=0xB8,
        id=0xABCD,
        v=7,
        rf=1,
        df=1,
        ttl=3,
    )
    made.data._rsv = 5
    made.data._off_flags |= 0x0A00
    data = encode(made)
    assert data[:12] == b"\x75\xb8\0\x28\xab\xcd\xc0\0\3\6" + data[10:12]
    assert data[20:34] == struct.pack("!HHIIH", 1, 2, 3, 4, 0x5BFF)
    assert data[34:36] == b"\0\6"
    assert data[38:] == b"\0\7"
    six = encode(ip6(b"", fc=0xAB, flow=0xCDEF1, nxt=59))
    assert six == b"\x6a\xbc\xde\xf1\0\0\x3b\x40" + SRC6 + DST6


@each_version
def test_a_udp_checksum_is_never_zero(version: int) -> None:
    """0 means that there is none, which IPv6 does not allow (RFC 8200, section 8.1)."""
    plain = encode(packet(version, UDP(sport=5, dport=7, data=b"\0\0")))
    # With the plain sum as its body, the complement becomes 0.
    body = plain[-4:-2]
    made = encode(packet(version, UDP(sport=5, dport=7, data=body)))
    assert made[-4:-2] == b"\xff\xff"
    verify(made)
    decoded = aiotun.decode_packet(made)
    assert encode(decoded) == made


@each_version
def test_payload_of_bytes_is_left_alone(version: int) -> None:
    body = b"\0\5\0\7\0\xff\0\0data"  # UDP, of another length and without a checksum
    for data in (body, bytearray(body), memoryview(body)):
        made = packet(version, data)
        made.p = made.nxt = 17
        assert encode(made).endswith(body)
        assert len(encode(made)) == (20 if version == 4 else 40) + len(body)


def test_checksums_that_dpkt_computes() -> None:
    summed: list[tuple[Any, int]] = [(dpkt.igmp.IGMP(), 2), (dpkt.pim.PIM(data=b"hi"), 103)]
    for data, proto in summed:
        made = ip4(data, p=proto)
        bytes(made)
        data.type = 2
        assert checksum(encode(made)[20:]) == 0
    made = ip4(dpkt.sctp.SCTP(struct.pack("!HHIIBBH", 1, 2, 0, 0, 7, 0, 8) + bytes(4)), p=132)
    before = encode(made)
    bytes(made)
    assert encode(made) == before
    made.data.dport = 3
    assert encode(made)[28:32] != before[28:32]


# --- Not changed ---------------------------------------------------------------------------------


def state(value: object) -> object:
    """Everything that an object refers to, recursively."""
    if isinstance(value, dpkt.Packet):
        names = {*vars(value), *value.__hdr_fields__, "data"} - {"_pack_hdr"}
        return type(value), {name: state(getattr(value, name)) for name in names}
    if isinstance(value, list):
        return [state(each) for each in value]
    return copy.copy(value)


SAMPLES: list[Any] = [
    ip4(UDP(dport=7, data=b"data")),
    ip4(TCP(dport=7, opts=b"\2\4\5\xb4", data=b"data"), opts=b"\1\1\1\1"),
    ip4(ICMP(data=ICMP.Echo(data=b"data"))),
    ip4(ICMP(type=3, code=3, data=ICMP.Unreach(data=ip4(UDP())))),
    ip4(dpkt.igmp.IGMP(), p=2),
    ip4(ip4(ip6(ip4(UDP(data=b"deep"))))),
    ip4(dpkt.gre.GRE(data=ip4(UDP())), p=47),
    ip6(UDP(dport=7, data=b"data")),
    ip6(ICMP6(type=128, data=ICMP6.Echo(data=b"data"))),
    ip6(UDP(dport=7), all_extension_headers=[IP6HopOptsHeader(data=bytes(6))]),
    frame(ip4(UDP(data=b"data"))),
    frame(ip6(TCP()), vlan_tags=[VLANtag8021Q(id=5), VLANtag8021Q(id=6)]),
    frame(ip4(UDP()), mpls_labels=[MPLSlabel(val=5), MPLSlabel(val=6)]),
    frame(dpkt.llc.LLC(dsap=0x40, ssap=0x40, data=b"data"), fcs=0),
    frame(dpkt.arp.ARP(sha=MAC1, spa=SRC4, tha=MAC2, tpa=DST4)),
]


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: type(sample.data).__name__)
def test_the_object_is_not_changed(sample: Any) -> None:
    before = state(sample)
    kept = pickle.dumps(sample)
    first = encode(sample)
    assert state(sample) == before
    assert encode(sample) == first
    assert encode(pickle.loads(kept)) == first
    assert type(first) is bytes


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: type(sample.data).__name__)
def test_what_was_encoded_decodes_to_the_same(sample: Any) -> None:
    data = encode(sample)
    decode = aiotun.decode_frame if isinstance(sample, Ethernet) else aiotun.decode_packet
    assert encode(decode(data)) == data


# --- Fragments, quotes, nesting ------------------------------------------------------------------


@pytest.mark.parametrize(("more", "offset"), [(1, 0), (1, 5), (0, 5)])
def test_a_fragment_keeps_what_it_says(more: int, offset: int) -> None:
    for data in (
        UDP(ulen=3000, sum=0, data=b"part"),
        ICMP(sum=0, data=b"part"),
        TCP(sum=7, opts=b"\1\1\1\1", data=b"part"),
        b"part of what",
    ):
        expected = dpkt.Packet.__bytes__(data) if isinstance(data, UDP | ICMP) else bytes(data)
        made = encode(ip4(data, mf=more, offset=offset))
        assert made[20:] == expected
        assert checksum(made[:20]) == 0
        head = IP6FragmentHeader(m_flag=more, frag_off=offset, id=9)
        made = encode(ip6(data, all_extension_headers=[head]))
        assert made[6] == 44
        assert made[48:] == expected
        assert made[41:48] == struct.pack("!BHI", 0, offset << 3 | more, 9)


def test_an_atomic_fragment_is_whole() -> None:
    made = encode(ip6(UDP(data=b"data"), all_extension_headers=[IP6FragmentHeader()]))
    assert made[40] == 17
    assert checksum(made[8:40] + struct.pack("!II", 12, 17) + made[48:]) == 0


@each_version
def test_a_quoted_packet_keeps_what_it_says(version: int) -> None:
    """It is truncated, and its lengths and checksums are those of the whole packet."""
    whole = encode(packet(version, UDP(dport=9, data=bytes(1000))))
    quoted = whole[:60]
    quote = aiotun.decode_packet(quoted)
    message = (
        ICMP(type=3, code=3, data=ICMP.Unreach(data=quote))
        if version == 4
        else ICMP6(type=1, code=4, data=ICMP6.Unreach(data=quote))
    )
    _, payload = verify(encode(packet(version, message)))
    assert payload[8:] == quoted


def test_a_packet_in_a_packet() -> None:
    inner = ip6(ip4(UDP(dport=7, data=b"deep"), ttl=1))
    bytes(inner.data)
    inner.data.data.data = b"deeper"
    proto, payload = verify(encode(ip4(inner)))
    assert proto == 41
    proto, payload = verify(payload)
    assert proto == 4
    proto, payload = verify(payload)
    assert (proto, payload[8:]) == (17, b"deeper")


# --- IPv6's extension headers --------------------------------------------------------------------


def test_a_chain_is_joined() -> None:
    headers = [
        IP6HopOptsHeader(data=b"\1\4" + bytes(4)),
        IP6DstOptsHeader(data=b"\1\x0c" + bytes(12)),
        IP6RoutingHeader(type=2, data=DST6),
    ]
    made = encode(ip6(UDP(data=b"data"), all_extension_headers=headers))
    assert (made[6], made[40:42], made[48:50], made[64:66]) == (0, b"\x3c\0", b"\x2b\1", b"\x11\2")
    assert verify(made)[0] == 17
    by_kind = ip6(UDP(data=b"data"), extension_hdrs={0: headers[0], 43: headers[2]})
    made = encode(by_kind)
    assert (made[6], made[40:42], made[48:50]) == (0, b"\x2b\0", b"\x11\2")
    assert verify(made)[0] == 17


@pytest.mark.parametrize("kind", [0, 2, 4])
def test_checksums_are_for_the_last_address(kind: int) -> None:
    last = bytes(range(16))
    addresses = last + bytes(16) if kind == 4 else bytes(16) + last
    header = IP6RoutingHeader(type=kind, segs_left=1, data=addresses)
    made = encode(ip6(UDP(data=b"data"), all_extension_headers=[header]))
    assert checksum(SRC6 + last + struct.pack("!II", 12, 17) + made[80:]) == 0
    header.segs_left = 0
    verify(encode(ip6(UDP(data=b"data"), all_extension_headers=[header])))


def test_ipsec_headers_are_written_once_and_whole() -> None:
    """dpkt alone would write some of them twice, and can't write others."""
    segment = encode(ip6(UDP(data=b"data")))[40:]
    head = struct.pack("!BBHII", 17, 4, 0, 1, 2) + b"authenticity"
    original = struct.pack("!IHBB", 6 << 28, 24 + len(segment), 51, 64) + SRC6 + DST6
    original += head + segment
    assert encode(aiotun.decode_packet(original)) == original
    original = struct.pack("!IHBB", 6 << 28, 20, 50, 64) + SRC6 + DST6 + bytes(range(20))
    assert encode(aiotun.decode_packet(original)) == original
    made = ip6(b"", all_extension_headers=[IP6ESPHeader(spi=1, seq=2, data=b"secret")])
    assert encode(made)[40:] == b"\0\0\0\1\0\0\0\2secret"
    with_icv = IP6AHHeader(spi=1, seq=2, auth_data=bytes(12))
    made = ip6(UDP(data=b"data"), all_extension_headers=[with_icv])
    assert encode(made)[40:42] == b"\x11\4"


# --- Ethernet ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "head"),
    [
        (frame(b"data", type=0x88B5), "88b5"),
        (frame(ip4(b"")), "0800"),
        (frame(ip6(b"")), "86dd"),
        (frame(ip6(b""), type=0x0800), "86dd"),
        (frame(dpkt.arp.ARP(sha=MAC1, spa=SRC4, tha=MAC2, tpa=DST4)), "0806"),
        (frame(ip4(b""), vlan_tags=[VLANtag8021Q(id=5, pri=7)]), "8100e0050800"),
        (frame(b"x", type=0x88B5, vlan_tags=[VLANtag8021Q(id=5)]), "8100000588b5"),
        (frame(b"x", type=0x8100, vlan_tags=[VLANtag8021Q(id=5, type=0x88B5)]), "8100000588b5"),
        (
            frame(ip6(b""), vlan_tags=[VLANtag8021Q(id=5), VLANtag8021Q(id=6, cfi=1)]),
            "88a8000581001006" + "86dd",
        ),
        (
            frame(b"", type=0x9100, vlan_tags=[VLANtag8021Q(type=0x9200), VLANtag8021Q(type=9)]),
            "9100000092000000" + "0009",
        ),
    ],
)
def test_ethernet_types_and_vlan_tags_are_written(made: Ethernet, head: str) -> None:
    data = encode(made)
    assert data[:12] == MAC2 + MAC1
    assert data[12 : 12 + len(head) // 2].hex() == head


def test_labels_and_llc_are_dpkts_own() -> None:
    labels = [MPLSlabel(val=5, ttl=9), MPLSlabel(val=6, ttl=9)]
    data = encode(frame(ip4(UDP(data=b"data")), mpls_labels=labels))
    assert data[12:22].hex() == "8847" + "00005009" + "00006109"
    assert verify(data[22:])[0] == 17
    data = encode(frame(dpkt.llc.LLC(dsap=0x42, ssap=0x42, data=b"bpdu")))
    assert data[12:14] == b"\0\7"


_IP = encode(ip4(UDP(sport=5, dport=7, data=b"hello")))


def _on_the_wire(head: str, payload: bytes = _IP) -> bytes:
    return MAC2 + MAC1 + bytes.fromhex(head) + payload


# Frames of which dpkt drops something when it decodes or writes.
UNUSUAL = {
    "a VLAN tag and a label": _on_the_wire("81000005 8847 00005140"),
    "three tags": _on_the_wire("81000064 810000c8 8100012c 0800"),
    "three kinds of tags": _on_the_wire("88a80064 910000c8 8100e12c 0800"),
    "802.1ad twice": _on_the_wire("88a80064 88a800c8 0800"),
    "eight tags": _on_the_wire("81000064" * 8 + "0800"),
    "three tags and labels": _on_the_wire("81000064" * 3 + "8848 00005040 00005140"),
    "three tags and an unknown type": _on_the_wire("81000064" * 3 + "88b5"),
    "a priority tag": _on_the_wire("8100e000 0800"),
    "PPPoE": _on_the_wire("8864 11000011 0023 0021"),
    "PPPoE, padded": _on_the_wire("8864 11000011 000c c0210101000a050605fcd459", bytes(20)),
    "PPPoE discovery": _on_the_wire("8863 11090000 0008 0101000001030000", bytes(20)),
    "PPPoE and a VLAN tag": _on_the_wire("81000005 8864 11000011 0023 0021"),
    "a control word": _on_the_wire("8847 00005140 00000000", _on_the_wire("0800")),
    "a pseudowire without one": _on_the_wire("8847 00005140", _on_the_wire("0800")),
    "two tags in a pseudowire": _on_the_wire(
        "8847 00005140", _on_the_wire("81000064" * 2 + "0800")
    ),
    "three tags in a pseudowire": _on_the_wire(
        "8847 00005140", _on_the_wire("81000064" * 3 + "0800")
    ),
    "raw 802.3": _on_the_wire("0030 ffff 002e 0004", bytes(42)),
    "raw 802.3, padded": _on_the_wire("0020 ffff 001e 0004", bytes(42)),
    "IPX in Ethernet II": _on_the_wire("8137 ffff 001e 0004", bytes(26)),
    "LLC behind a VLAN tag": _on_the_wire("81000005 0026 424203", bytes(35)),
    "IPv4 options behind a label": _on_the_wire("8847 00005140 4600", bytes(50)),
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_decoded_frames_encode_to_the_same_bytes(kind: str) -> None:
    original = UNUSUAL[kind]
    decoded = aiotun.decode_frame(original)
    assert encode(decoded) == original
    # Decoded by dpkt alone: written as it was, or refused, except where dpkt leaves no trace.
    untold = ("three", "802.1ad twice", "eight tags", "a control word")
    if not kind.startswith(untold):
        try:
            assert encode(Ethernet(original)) == original
        except ValueError as error:
            assert "raw 802.3" in str(error)  # noqa: PT017 - either will do


def test_all_tags_are_decoded() -> None:
    decoded = aiotun.decode_frame(UNUSUAL["three kinds of tags"])
    assert [tag.id for tag in decoded.vlan_tags] == [100, 200, 300]
    assert (decoded.type, decoded.vlanid) == (0x88A8, 100)
    assert isinstance(decoded.data, IP)
    decoded.vlan_tags[2].id = 5
    assert encode(decoded)[20:24] == b"\x81\0\xe0\5"
    with pytest.raises(aiotun.PacketDecodeError, match="9 VLAN tags; at most 8"):
        aiotun.decode_frame(_on_the_wire("81000064" * 9 + "0800"))


def test_tags_in_a_pseudowire_that_dpkt_would_lose_are_kept_as_bytes() -> None:
    two = aiotun.decode_frame(UNUSUAL["two tags in a pseudowire"])
    assert isinstance(two.data, Ethernet)
    three = aiotun.decode_frame(UNUSUAL["three tags in a pseudowire"])
    assert three.data == UNUSUAL["three tags in a pseudowire"][18:]
    assert not hasattr(three, "ethernet")
    # The source address of an IP packet is where a frame has its type. 129.0 looks like VLAN tags.
    packet = encode(IP(src=b"\x81\0\1\2", dst=b"\x81\0\1\2", data=b"\x81\0\1\2" * 8))
    assert isinstance(aiotun.decode_frame(_on_the_wire("8847 00005140", packet)).data, IP)


def test_pppoe_has_its_length_and_protocol() -> None:
    decoded: Any = aiotun.decode_frame(UNUSUAL["PPPoE"])
    decoded.data.data.data.data.data = b"longer than it was"
    data = encode(decoded)
    assert data[18:22] == struct.pack("!HH", len(data) - 20, 0x21)
    assert verify(data[22:])[0] == 17
    # The protocol may be one byte, which is not recommended.
    compressed = _on_the_wire("8864 11000011 0022 21")
    assert encode(aiotun.decode_frame(compressed)) == UNUSUAL["PPPoE"]


# --- What cannot be ------------------------------------------------------------------------------


@pytest.mark.parametrize("what", [UDP(), b"\x45" + bytes(19), None, dpkt.arp.ARP(), "text"])
def test_encode_refuses_objects_that_no_device_sends(what: Any) -> None:
    with pytest.raises(TypeError, match="IP, IP6 and Ethernet"):
        encode(what)


def changed(what: Any, **fields: object) -> Any:
    for name, value in fields.items():
        setattr(what, name, value)
    return what


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (ip4(UDP(), p=6), "p is 6, but UDP has the number 17"),
        (ip4(TCP(), p=17), "p is 17, but TCP has the number 6"),
        (ip6(UDP(), nxt=58), "nxt is 58, but UDP has the number 17"),
        (ip6(UDP(), nxt=44, all_extension_headers=[IP6HopOptsHeader(data=bytes(6))]), "nxt is 44"),
        (IP(src="10.0.0.1", dst=DST4), "src must be 4 bytes, got '10.0.0.1'"),
        (IP6(src=SRC6), "dst must be 16 bytes, got b''"),
        (IP6(src=SRC4, dst=DST6), "src must be 16 bytes"),
        (Ethernet(dst=MAC1), "src must be 6 bytes"),
        (ip4(bytes(65516), len=0), "at most 65535 bytes, got 65536"),
        (ip4(UDP(data=bytes(65528)), len=0), "at most 65535 bytes, got 65536"),
        (ip6(bytes(65536)), "at most 65535 bytes, got 65536"),
        (ip4(b"", opts=bytes(41)), "at most 40 bytes, got 41"),
        (ip4(TCP(opts=bytes(41))), "at most 40 bytes, got 41"),
        (changed(ip4(b""), data="text"), "bytes or a dpkt object, got str"),
        (changed(ip4(b""), data=5), "bytes or a dpkt object, got int"),
        (ip6(UDP(data=5)), "bytes or a dpkt object, got int"),
        (ip4(UDP(sport=65536)), "can't be encoded"),
        (ip4(UDP(), ttl=256), "can't be encoded"),
        (ip4(UDP(), ttl=None), "can't be encoded"),
        (ip6(b"", all_extension_headers=[IP6HopOptsHeader(data=bytes(5))]), "7 bytes, but its len"),
        (
            frame(dpkt.llc.LLC(data=b"data"), vlan_tags=[VLANtag8021Q(id=5)]),
            "can't write VLAN tags or labels in front of LLC",
        ),
        (
            frame(b"", vlan_tags=[VLANtagISL(id=5)], mpls_labels=[MPLSlabel(val=5)]),
            "dpkt writes only 18 of the 44 bytes of Ethernet",
        ),
        (frame(ip4(b"", opts=b"\1" * 4), mpls_labels=[MPLSlabel(val=5)]), "IP would be decoded as"),
        (ip6(b"", all_extension_headers=[IP6RoutingHeader(len=3, data=SRC6)]), "len is 3"),
    ],
)
def test_encode_says_what_cannot_be_encoded(what: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said) as raised:
        encode(what)
    assert type(raised.value) is ValueError


def test_nested_without_end() -> None:
    inside = ip4(b"")
    inside.data = inside
    with pytest.raises(ValueError, match="RecursionError"):
        encode(inside)


def test_the_largest_packets_can_be_encoded() -> None:
    assert len(encode(ip4(UDP(data=bytes(65507))))) == 65535
    assert len(encode(ip6(UDP(data=bytes(65527))))) == 65575
