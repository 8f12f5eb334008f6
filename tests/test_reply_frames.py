"""ARP and neighbor discovery: each rule of their RFCs, and hostile bytes."""

import ipaddress
import struct
from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiotun.reply import arp, ethernet, icmp_echo, neighbour_advertisement

from .helpers import checksum, make_icmp_echo

OURS, THEIRS = "02:00:00:00:00:01", "02:00:00:00:00:02"
OURS4, THEIRS4, OURS6, THEIRS6 = "10.0.0.1", "10.0.0.2", "fd00::aa:bbcc", "fd00::2"
ADDRESSES: set[IPv4Address | IPv6Address] = {IPv4Address(OURS4), IPv6Address(OURS6)}
ALL, NOBODY = "ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00"
GROUP, GROUP_MAC = "ff02::1:ffaa:bbcc", "33:33:ff:aa:bb:cc"


def mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def ip(text: str) -> bytes:
    return ipaddress.ip_address(text).packed


@dataclass(frozen=True)
class Arp:
    """A request by default."""

    receiver: str = ALL
    sender: str = THEIRS
    ethertype: int = 0x0806
    hardware: int = 1
    protocol: int = 0x0800
    lengths: tuple[int, int] = (6, 4)
    operation: int = 1
    sender_mac: str = THEIRS
    sender_ip: str = THEIRS4
    target_mac: str = NOBODY
    target_ip: str = OURS4
    behind: bytes = b""

    def pack(self) -> bytes:
        head = mac(self.receiver) + mac(self.sender) + struct.pack("!H", self.ethertype)
        head += struct.pack("!HHBBH", self.hardware, self.protocol, *self.lengths, self.operation)
        head += mac(self.sender_mac) + ip(self.sender_ip)
        return head + mac(self.target_mac) + ip(self.target_ip) + self.behind


def option(kind: int, data: bytes) -> bytes:
    return bytes([kind, (len(data) + 2) // 8]) + data


@dataclass(frozen=True)
class Nd:
    """A solicitation by default, with a valid checksum."""

    receiver: str = GROUP_MAC
    sender: str = THEIRS
    ethertype: int = 0x86DD
    start: int = 6 << 28
    length: int | None = None
    following: int = 58
    hops: int = 255
    source: str = THEIRS6
    destination: str = GROUP
    kind: int = 135
    code: int = 0
    flags: int = 0
    target: str = OURS6
    options: bytes = option(1, mac(THEIRS))
    flip: int = 0
    behind: bytes = b""

    def pack(self) -> bytes:
        body = struct.pack("!BBHI", self.kind, self.code, 0, self.flags) + ip(self.target)
        body += self.options
        length = len(body) if self.length is None else self.length
        # Valid for the header's length, so that a wrong length is not refused by the checksum.
        pseudo = ip(self.source) + ip(self.destination) + struct.pack("!II", length, 58)
        value = checksum(pseudo + body[:length]) ^ self.flip
        body = body[:2] + value.to_bytes(2, "big") + body[4:]
        head = mac(self.receiver) + mac(self.sender) + struct.pack("!H", self.ethertype)
        head += struct.pack("!IHBB", self.start, length, self.following, self.hops)
        return head + ip(self.source) + ip(self.destination) + body + self.behind


ARP_REPLY = Arp(
    receiver=THEIRS,
    sender=OURS,
    operation=2,
    sender_mac=OURS,
    sender_ip=OURS4,
    target_mac=THEIRS,
    target_ip=THEIRS4,
)
ADVERTISEMENT = Nd(
    receiver=THEIRS,
    sender=OURS,
    source=OURS6,
    destination=THEIRS6,
    kind=136,
    flags=0x6000_0000,  # not a router, solicited, override
    options=option(2, mac(OURS)),
)

Reply = Callable[[bytes | bytearray | memoryview, str | bytes, Container[Any]], bytes | None]
REPLIES: list[tuple[Reply, Arp | Nd]] = [(arp, Arp()), (neighbour_advertisement, Nd())]
each_reply = pytest.mark.parametrize(("reply", "asked"), REPLIES, ids=["arp", "nd"])


# --- ARP -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "changes"),
    [
        (Arp(), {}),
        (Arp(receiver=OURS), {}),
        (Arp(target_mac=ALL), {}),
        (Arp(behind=bytes(18)), {}),  # padded to Ethernet's 60 bytes
        (Arp(sender_ip="0.0.0.0"), {"target_ip": "0.0.0.0"}),  # a probe
        (Arp(sender="02:00:00:00:00:03"), {}),  # forwarded by another host
    ],
)
def test_arp_requests_are_answered_field_by_field(asked: Arp, changes: dict[str, Any]) -> None:
    assert arp(asked.pack(), OURS, ADDRESSES) == replace(ARP_REPLY, **changes).pack()


@pytest.mark.parametrize(
    "asked",
    [
        Arp(target_ip="10.0.0.3"),
        Arp(receiver=THEIRS),
        Arp(receiver="01:00:5e:00:00:01"),
        Arp(ethertype=0x0800),
        Arp(ethertype=0x8035),
        Arp(hardware=6),
        Arp(protocol=0x86DD),
        Arp(lengths=(8, 4)),
        Arp(lengths=(6, 16)),
        Arp(operation=0),
        Arp(operation=2),
        Arp(operation=3),
        Arp(sender_ip=OURS4),  # announced by another host
        Arp(sender_ip="224.0.0.1"),
        Arp(sender_ip="255.255.255.255"),
        Arp(sender_mac=ALL),
        Arp(sender_mac="03:00:00:00:00:02"),
        Arp(sender_mac=NOBODY),
        ARP_REPLY,
    ],
)
def test_other_arp_frames_are_not_answered(asked: Arp) -> None:
    assert arp(asked.pack(), OURS, ADDRESSES) is None


# --- Neighbour discovery -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "changes"),
    [
        (Nd(), {}),
        (Nd(receiver=OURS), {}),  # a bridge has sent a multicast as a unicast
        (Nd(receiver=OURS, destination=OURS6), {}),  # a check whether the host is still there
        (Nd(receiver=OURS, destination=OURS6, options=b""), {}),
        (Nd(options=b"", sender="02:00:00:00:00:03"), {"receiver": "02:00:00:00:00:03"}),
        (Nd(sender="02:00:00:00:00:03"), {}),
        (Nd(options=option(14, b"nonce!") + option(1, mac(THEIRS))), {}),
        (Nd(options=option(99, bytes(22)) + option(1, mac(THEIRS))), {}),
        (Nd(options=option(1, mac(THEIRS)) + option(1, mac(ALL))), {}),
        (Nd(start=(6 << 28) | 0xABCDEF1), {}),
        (Nd(flags=0xFFFF_FFFF), {}),  # reserved
        (Nd(behind=b"trailer"), {}),
        (Nd(length=24), {}),  # no option is part of it
        (
            Nd(source="::", options=b""),
            {"receiver": "33:33:00:00:00:01", "destination": "ff02::1", "flags": 0x2000_0000},
        ),
        (
            Nd(source="::", options=option(14, b"nonce!")),  # RFC 7527
            {"receiver": "33:33:00:00:00:01", "destination": "ff02::1", "flags": 0x2000_0000},
        ),
        (Nd(source="fe80::2"), {"destination": "fe80::2"}),
    ],
)
def test_neighbor_solicitations_are_answered_field_by_field(
    asked: Nd, changes: dict[str, Any]
) -> None:
    answer = neighbour_advertisement(asked.pack(), OURS, ADDRESSES)
    assert answer == replace(ADVERTISEMENT, **changes).pack()


@pytest.mark.parametrize(
    "asked",
    [
        Nd(target="fd00::1:aa:bbcc"),  # another of the same group
        Nd(target="ff02::1"),
        Nd(receiver=THEIRS),
        Nd(receiver=ALL),
        Nd(receiver="33:33:ff:aa:bb:cd"),
        Nd(receiver="33:33:00:00:00:01"),
        Nd(destination=OURS6),  # to our address, but not to our MAC
        Nd(receiver=OURS, destination=THEIRS6),
        Nd(receiver="33:33:ff:aa:bb:cd", destination="ff02::1:ffaa:bbcd"),
        Nd(receiver="33:33:00:00:00:01", destination="ff02::1"),
        Nd(receiver=OURS, destination="ff05::1:ffaa:bbcc"),
        Nd(ethertype=0x0800),
        Nd(start=4 << 28),
        Nd(following=0),
        Nd(following=17),
        Nd(hops=254),
        Nd(hops=0),
        Nd(kind=136),
        Nd(kind=128),
        Nd(code=1),
        Nd(flip=1),
        Nd(flip=0x8000),
        Nd(length=23),
        Nd(length=25),
        Nd(length=33),
        Nd(length=0),
        Nd(options=b"\1\0" + mac(THEIRS)),
        Nd(options=b"\1\2" + mac(THEIRS)),
        Nd(options=b"\1"),
        Nd(options=option(1, mac(THEIRS)) + b"\x0e\0"),
        Nd(options=option(1, mac(ALL))),
        Nd(options=option(1, mac(NOBODY))),
        Nd(source="::"),  # has a link-layer address but no source address
        Nd(source="::", options=b"", receiver=OURS, destination=OURS6),
        Nd(source="ff02::1"),
        Nd(source=OURS6),
        ADVERTISEMENT,
    ],
)
def test_other_frames_get_no_neighbor_advertisement(asked: Nd) -> None:
    assert neighbour_advertisement(asked.pack(), OURS, ADDRESSES) is None


@given(st.integers(1, (0xFF << 120) - 1), st.integers(1, (0xFF << 120) - 1), st.binary(max_size=64))
def test_checksums_are_right(source: int, target: int, noise: bytes) -> None:
    theirs, ours = IPv6Address(source), IPv6Address(target)
    if theirs == ours:
        return
    group = IPv6Address(ip("ff02::1:ff00:0")[:13] + ours.packed[13:])
    padded = option(99, noise + bytes(-(len(noise) + 2) % 8))
    asked = Nd(
        receiver=OURS, source=str(theirs), destination=str(group), target=str(ours), options=padded
    )
    answer = neighbour_advertisement(asked.pack(), OURS, {ours})
    assert answer is not None
    body = answer[54:]
    assert checksum(answer[22:54] + struct.pack("!II", len(body), 58) + body) == 0


def test_a_group_is_no_target() -> None:
    """Not even if it is one of the addresses."""
    asked = Nd(receiver=OURS, target="ff02::1:2", destination="ff02::1:ff01:2")
    assert neighbour_advertisement(asked.pack(), OURS, [IPv6Address("ff02::1:2")]) is None
    asked = replace(asked, target="fd00::1:2")
    assert neighbour_advertisement(asked.pack(), OURS, [IPv6Address("fd00::1:2")]) is not None


# --- Both ----------------------------------------------------------------------------------------


@each_reply
def test_addresses_are_anything_that_contains(reply: Reply, asked: Arp | Nd) -> None:
    frame = asked.pack()
    expected = reply(frame, OURS, ADDRESSES)
    assert expected is not None
    four, six = IPv4Address(OURS4), IPv6Address(OURS6)
    network = IPv4Network("10.0.0.0/24") if reply is arp else IPv6Network("fd00::/64")
    fitting: list[Container[Any]] = [[four, six], (six, four), {four: 1, six: 2}, network]
    for addresses in fitting:
        assert reply(frame, OURS, addresses) == expected
    other = IPv6Network("fd00::/64") if reply is arp else IPv4Network("10.0.0.0/24")
    unfitting: list[Container[Any]] = [[], {six if reply is arp else four}, other]
    for addresses in unfitting:
        assert reply(frame, OURS, addresses) is None


@each_reply
def test_a_mac_may_be_text_or_bytes_and_must_be_unicast(reply: Reply, asked: Arp | Nd) -> None:
    frame = asked.pack()
    assert reply(frame, mac(OURS), ADDRESSES) == reply(frame, OURS, ADDRESSES)
    assert reply(frame, "0A:0B:0C:0D:0E:0F", ADDRESSES) == reply(
        frame, b"\x0a\x0b\x0c\x0d\x0e\x0f", ADDRESSES
    )
    for wrong in ("", "02:00:00:00:00", "02-00-00-00-00-01", ALL, NOBODY, b"12345", mac(ALL)):
        with pytest.raises(ValueError, match="MAC"):
            reply(frame, wrong, ADDRESSES)
        with pytest.raises(ValueError, match="MAC"):
            reply(b"", wrong, ADDRESSES)


@each_reply
def test_a_tagged_frame_is_of_another_network(reply: Reply, asked: Arp | Nd) -> None:
    frame = asked.pack()
    assert reply(frame[:12] + b"\x81\0\0\5" + frame[12:], OURS, ADDRESSES) is None


@each_reply
@pytest.mark.parametrize("tag", ["81000000", "8100e000", "8100f000", "88a86000"])
def test_a_priority_tag_is_no_other_network(reply: Reply, asked: Arp | Nd, tag: str) -> None:
    """VLAN 0: the answer has the tag, which the kernel also accepts."""
    frame = asked.pack()
    plain = reply(frame, OURS, ADDRESSES)
    assert plain is not None
    tagged = frame[:12] + bytes.fromhex(tag) + frame[12:]
    for argument in (tagged, memoryview(tagged)):
        answer = reply(argument, OURS, ADDRESSES)
        assert answer == plain[:12] + bytes.fromhex(tag) + plain[12:]
        assert reply(answer, OURS, ADDRESSES) is None
    # A second tag means another network, or is invalid.
    for behind in ("81000005", tag):
        deeper = frame[:12] + bytes.fromhex(tag + behind) + frame[12:]
        assert reply(deeper, OURS, ADDRESSES) is None
    for length in range(len(tagged)):
        assert reply(tagged[:length], OURS, ADDRESSES) is None


@each_reply
def test_cut_short_anywhere_is_no_answer(reply: Reply, asked: Arp | Nd) -> None:
    frame = asked.pack()
    for length in range(len(frame)):
        assert reply(frame[:length], OURS, ADDRESSES) is None
    assert reply(frame, OURS, ADDRESSES) is not None


@each_reply
def test_any_bytes_like_frame_is_answered_with_bytes(reply: Reply, asked: Arp | Nd) -> None:
    frame = asked.pack()
    expected = reply(frame, OURS, ADDRESSES)
    assert type(expected) is bytes
    buffer = bytearray(frame)
    for argument in (buffer, memoryview(frame), memoryview(buffer), memoryview(b"?" + frame)[1:]):
        assert reply(argument, OURS, ADDRESSES) == expected
    assert buffer == frame


U8 = st.integers(0, 255)
MUTATED = st.builds(
    lambda frame, changes, length: bytes(changes.get(i, byte) for i, byte in enumerate(frame))[
        :length
    ],
    st.sampled_from([Arp().pack(), Nd().pack(), Nd(source="::", options=b"").pack()]),
    st.dictionaries(st.integers(0, 85), U8, max_size=4),
    st.integers(40, 100),
)


@given(st.one_of(st.binary(max_size=100), MUTATED))
def test_hostile_bytes_never_raise(data: bytes) -> None:
    for (reply, _), length in zip(REPLIES, (42, 86), strict=True):
        buffer = bytearray(data)
        answer = reply(buffer, OURS, ADDRESSES)
        assert buffer == data
        assert answer is None or (len(answer), answer[6:12]) == (length, mac(OURS))


# --- An Ethernet header for an answer ------------------------------------------------------------

PING = make_icmp_echo(THEIRS4, OURS4)


@pytest.mark.parametrize("tags", [b"", b"\x81\0\0\0", b"\x88\xa8\0\x05\x81\0\0\x07"])
@pytest.mark.parametrize("receiver", [OURS, ALL])
def test_an_answer_goes_back_to_the_frames_sender(receiver: str, tags: bytes) -> None:
    frame = mac(receiver) + mac(THEIRS) + tags + b"\x08\0" + PING
    answer = icmp_echo(PING, addresses={IPv4Address(OURS4)})
    assert answer is not None
    expected = mac(THEIRS) + mac(OURS) + tags + b"\x08\0" + answer
    for ours in (OURS, mac(OURS)):
        assert ethernet(frame, answer, ours) == expected
        assert ethernet(memoryview(bytearray(frame)), answer, ours) == expected


@pytest.mark.parametrize(
    ("receiver", "sender"), [(THEIRS, THEIRS), (OURS, ALL), (OURS, NOBODY), (OURS, GROUP_MAC)]
)
def test_frames_of_others_get_no_answer(receiver: str, sender: str) -> None:
    assert ethernet(mac(receiver) + mac(sender) + b"\x08\0" + PING, b"answer", OURS) is None


def test_without_an_answer_or_a_whole_header_there_is_no_frame() -> None:
    frame = mac(OURS) + mac(THEIRS) + b"\x81\0\0\0\x08\0"
    assert ethernet(frame, None, OURS) is None
    for length in range(len(frame)):
        assert ethernet(frame[:length], b"answer", OURS) is None
    with pytest.raises(ValueError, match="multicast MAC"):
        ethernet(frame, b"answer", ALL)
