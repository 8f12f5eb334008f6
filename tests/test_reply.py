"""Echo replies: field by field, for every checksum, and for hostile bytes."""

import ipaddress
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiotun.reply import icmp_echo, icmpv6_echo

from .helpers import checksum

Reply = Callable[[bytes | bytearray | memoryview], bytes | None]
REPLIES: list[Reply] = [icmp_echo, icmpv6_echo]


def fill(data: bytes, offset: int, before: bytes = b"") -> bytes:
    """Write the checksum of `before` and `data` into its place, which must be zero."""
    return data[:offset] + checksum(before + data).to_bytes(2, "big") + data[offset + 2 :]


@dataclass(frozen=True)
class Echo4:
    """An ICMP message in IPv4, with valid checksums for any fields."""

    start: int = 0x45
    tos: int = 0
    length: int | None = None
    identity: int = 0x1234
    fragment: int = 0x4000
    ttl: int = 63
    protocol: int = 1
    source: str = "10.0.0.1"
    target: str = "10.0.0.77"
    options: bytes = b""
    kind: int = 8
    code: int = 0
    ident: int = 7
    seq: int = 9
    payload: bytes = bytes(range(56))
    behind: bytes = b""

    def pack(self) -> bytes:
        body = struct.pack("!BBHHH", self.kind, self.code, 0, self.ident, self.seq) + self.payload
        length = 20 + len(self.options) + len(body) if self.length is None else self.length
        head = struct.pack(
            "!BBHHHBBH4s4s",
            self.start,
            self.tos,
            length,
            self.identity,
            self.fragment,
            self.ttl,
            self.protocol,
            0,
            ipaddress.IPv4Address(self.source).packed,
            ipaddress.IPv4Address(self.target).packed,
        )
        return fill(head + self.options, 10) + fill(body, 2) + self.behind


@dataclass(frozen=True)
class Echo6:
    """The same of ICMPv6 in IPv6."""

    start: int = 6 << 28
    length: int | None = None
    following: int = 58
    hops: int = 63
    source: str = "fd00::1"
    target: str = "fd00::77"
    kind: int = 128
    code: int = 0
    ident: int = 7
    seq: int = 9
    payload: bytes = bytes(range(56))
    behind: bytes = b""

    def pack(self) -> bytes:
        body = struct.pack("!BBHHH", self.kind, self.code, 0, self.ident, self.seq) + self.payload
        length = len(body) if self.length is None else self.length
        addresses = (
            ipaddress.IPv6Address(self.source).packed + ipaddress.IPv6Address(self.target).packed
        )
        head = struct.pack("!IHBB", self.start, length, self.following, self.hops)
        body = fill(body, 2, addresses + struct.pack("!II", len(body), 58))
        return head + addresses + body + self.behind


def valid4(packet: bytes) -> bool:
    """Whether both checksums of a packet are valid, computed again over the whole packet."""
    return checksum(packet[:20]) == 0 and checksum(packet[20:]) == 0


def valid6(packet: bytes) -> bool:
    body = packet[40:]
    return checksum(packet[8:40] + struct.pack("!II", len(body), 58) + body) == 0


U8, U16 = st.integers(0, 0xFF), st.integers(0, 0xFFFF)
PAYLOADS = st.one_of(
    st.binary(max_size=80),
    st.integers(0, 1500).map(bytes),
    st.integers(0, 1500).map(lambda length: b"\xff" * length),
)
ECHOES4 = st.builds(
    Echo4,
    tos=U8,
    identity=U16,
    fragment=st.sampled_from([0, 0x4000, 0x8000, 0xC000]),
    ttl=U8,
    source=st.integers(0x0100_0000, 0xDFFF_FFFF).map(lambda n: str(ipaddress.IPv4Address(n))),
    target=st.integers(0, 0xDFFF_FFFF).map(lambda n: str(ipaddress.IPv4Address(n))),
    ident=U16,
    seq=U16,
    payload=PAYLOADS,
)
UNICAST6 = st.integers(1, (0xFF << 120) - 1).map(lambda n: str(ipaddress.IPv6Address(n)))
ECHOES6 = st.builds(
    Echo6,
    start=st.integers(6 << 28, (7 << 28) - 1),
    hops=U8,
    source=UNICAST6,
    target=UNICAST6,
    ident=U16,
    seq=U16,
    payload=PAYLOADS,
)

# --- What the answer is --------------------------------------------------------------------------


def test_an_icmp_answer_is_right_field_by_field() -> None:
    echo = Echo4(tos=0x10, ident=0xABCD, seq=0x0102)
    expected = replace(echo, ttl=64, kind=0, source=echo.target, target=echo.source)
    assert icmp_echo(echo.pack()) == expected.pack()


def test_an_icmpv6_answer_is_right_field_by_field() -> None:
    echo = Echo6(start=0x6AB12345, ident=0xABCD, seq=0x0102)
    expected = replace(echo, hops=64, kind=129, source=echo.target, target=echo.source)
    assert icmpv6_echo(echo.pack()) == expected.pack()


@given(ECHOES4)
def test_icmp_checksums_are_right(echo: Echo4) -> None:
    answer = icmp_echo(echo.pack())
    assert answer is not None
    assert valid4(answer)
    # Only the checksums can differ from a newly made answer, because there are two zeros.
    made = replace(echo, ttl=64, kind=0, source=echo.target, target=echo.source).pack()
    assert (answer[:10], answer[12:22], answer[24:]) == (made[:10], made[12:22], made[24:])


@given(ECHOES6)
def test_icmpv6_checksums_are_right(echo: Echo6) -> None:
    answer = icmpv6_echo(echo.pack())
    assert answer is not None
    assert valid6(answer)
    made = replace(echo, hops=64, kind=129, source=echo.target, target=echo.source).pack()
    assert (answer[:42], answer[44:]) == (made[:42], made[44:])


# --- Options -------------------------------------------------------------------------------------

OURS = b"\x0a\0\0\x4d"  # Echo4's target
NOW = 0x01234567  # milliseconds since midnight


@pytest.mark.parametrize(
    ("options", "answered"),
    [
        pytest.param(b"\1" * 4, b"\1" * 4, id="no operation"),
        pytest.param(b"\1" * 40, b"\1" * 40, id="all there can be"),
        pytest.param(b"\0\x83\7\4", b"\0\x83\7\4", id="nothing, at once"),
        pytest.param(b"\x94\4\0\0", b"\1\1\1\1", id="router alert"),
        pytest.param(
            b"\1\7\x27\4" + bytes(36), b"\1\7\x27\x08" + OURS + bytes(32), id="record route"
        ),
        pytest.param(
            b"\7\x0b\x08\x0a\0\0\x01" + bytes(5), b"\7\x0b\x0c\x0a\0\0\x01" + OURS + b"\0",
            id="a record route to its end",
        ),
        pytest.param(
            b"\7\7\x08\x0a\0\0\x01\0", b"\7\7\x08\x0a\0\0\x01\0", id="a full record route"
        ),
        pytest.param(
            b"\x44\x0c\5\0" + bytes(8), b"\x44\x0c\x09\0" + NOW.to_bytes(4, "big") + bytes(4),
            id="times only",
        ),
        pytest.param(
            b"\x44\x0c\5\1" + bytes(8), b"\x44\x0c\x0d\1" + OURS + NOW.to_bytes(4, "big"),
            id="times and addresses",
        ),
        pytest.param(
            b"\x44\x0c\5\3" + OURS + bytes(4), b"\x44\x0c\x0d\3" + OURS + NOW.to_bytes(4, "big"),
            id="ours among some",
        ),
        pytest.param(
            b"\x44\x0c\5\3" + bytes(8), b"\x44\x0c\5\3" + bytes(8), id="ours not among some"
        ),
        pytest.param(
            b"\x44\x08\x09\x10" + bytes(4), b"\x44\x08\x09\x20" + bytes(4), id="one more left out"
        ),
        pytest.param(
            b"\x44\x0c\x0d\3" + bytes(8), b"\x44\x0c\x0d\3" + bytes(8), id="all of some are in"
        ),
        pytest.param(
            b"\x94\4\0\0\1\7\7\4\0\0\0\0\x44\x08\5\0\0\0\0\0",
            b"\1\1\1\1\1\7\7\x08" + OURS + b"\x44\x08\x09\0" + NOW.to_bytes(4, "big"),
            id="several",
        ),
    ],
)  # fmt: skip
def test_options_of_an_answer(
    monkeypatch: pytest.MonkeyPatch, options: bytes, answered: bytes
) -> None:
    """RFC 1122, section 3.2.2.6: options are filled in and returned; nothing else changes."""
    days = 20_000 * 86_400_000
    monkeypatch.setattr("aiotun.reply.time.time_ns", lambda: (days + NOW) * 1_000_000)
    echo = Echo4(start=0x45 + len(options) // 4, options=options, behind=b"behind")
    expected = replace(
        echo, ttl=64, kind=0, source=echo.target, target=echo.source, options=answered, behind=b""
    )
    packet = echo.pack()
    assert icmp_echo(packet) == expected.pack()
    assert icmp_echo(memoryview(packet)) == expected.pack()
    # A damaged packet stays damaged.
    damaged = packet[:10] + bytes([packet[10] ^ 1]) + packet[11:]
    answer = icmp_echo(damaged)
    assert answer is not None
    assert checksum(answer[: 20 + len(options)]) != 0
    for length in range(len(packet) - 6):
        assert icmp_echo(packet[:length]) is None


# --- The corners of one's complement -------------------------------------------------------------


def both_zeroes(value: int) -> list[int]:
    """A checksum, and if it is zero the other zero, too: a receiver accepts both."""
    return [0, 0xFFFF] if value in (0, 0xFFFF) else [value]


@pytest.mark.parametrize("ttl", [0, 1, 63, 64, 65, 255])
def test_every_header_checksum(ttl: int) -> None:
    head = Echo4(ttl=ttl, identity=0, payload=b"").pack()
    head, body = head[:10] + b"\0\0" + head[12:20], head[20:]
    rest = 0xFFFF - checksum(head)
    after = 0xFFFF - checksum(head[:8] + b"\x40" + head[9:])
    packet = bytearray(head + body)
    met = set()
    for identity in range(0x10000):
        total = rest + identity
        total = (total & 0xFFFF) + (total >> 16)
        for value in both_zeroes(total ^ 0xFFFF):
            struct.pack_into("!H", packet, 4, identity)
            struct.pack_into("!H", packet, 10, value)
            answer = icmp_echo(packet)
            assert answer is not None
            (found,) = struct.unpack_from("!H", answer, 10)
            assert (after + identity + found) % 0xFFFF == 0
            met |= {value, found}
    # A header's sum is never all zero, so the answer's checksum is never 0xffff.
    assert met == set(range(0x10000))


@pytest.mark.parametrize(
    ("reply", "echo", "offset"),
    [
        pytest.param(icmp_echo, Echo4(seq=0, payload=b""), 20, id="icmp"),
        pytest.param(icmp_echo, Echo4(ident=0, seq=0, payload=b""), 20, id="icmp, all zero"),
        pytest.param(icmpv6_echo, Echo6(seq=0, payload=b""), 40, id="icmpv6"),
    ],
)
def test_every_message_checksum(reply: Reply, echo: Echo4 | Echo6, offset: int) -> None:
    packet = bytearray(echo.pack())
    (first,) = struct.unpack_from("!H", packet, offset + 2)
    kinds = {8: 0, 128: 129}
    change = (kinds[echo.kind] - echo.kind) << 8
    requests, answers = set(), set()
    for seq in range(0x10000):
        total = (first ^ 0xFFFF) + seq
        total = (total & 0xFFFF) + (total >> 16)
        for value in both_zeroes(total ^ 0xFFFF):
            struct.pack_into("!H", packet, offset + 2, value)
            struct.pack_into("!H", packet, offset + 6, seq)
            answer = reply(packet)
            assert answer is not None
            (found,) = struct.unpack_from("!H", answer, offset + 2)
            assert ((first ^ 0xFFFF) + change + seq + found) % 0xFFFF == 0
            requests.add(value)
            answers.add(found)
    assert requests == set(range(0x10000))
    assert len(answers) >= 0xFFFF


def test_an_answer_of_zeroes_has_the_checksum_ffff() -> None:
    # A receiver's sum is 0 here, and its complement is not 0, so the other zero would be wrong.
    answer = icmp_echo(Echo4(ident=0, seq=0, payload=bytes(56)).pack())
    assert answer is not None
    assert answer[20:] == b"\0\0\xff\xff" + bytes(60)
    assert valid4(answer)


@given(ECHOES4, U16, U16)
def test_a_damaged_icmp_message_stays_damaged(echo: Echo4, header_sum: int, icmp_sum: int) -> None:
    made, sums = echo.pack(), [each.to_bytes(2, "big") for each in (header_sum, icmp_sum)]
    packet = made[:10] + sums[0] + made[12:22] + sums[1] + made[24:]
    answer = icmp_echo(packet)
    assert answer is not None
    assert (checksum(answer[:20]) == 0) == (checksum(packet[:20]) == 0)
    assert (checksum(answer[20:]) == 0) == (checksum(packet[20:]) == 0)


@given(ECHOES6, U16)
def test_a_damaged_icmpv6_message_stays_damaged(echo: Echo6, icmp_sum: int) -> None:
    made = echo.pack()
    packet = made[:42] + icmp_sum.to_bytes(2, "big") + made[44:]
    answer = icmpv6_echo(packet)
    assert answer is not None
    assert valid6(answer) == valid6(packet)


# --- What is not answered ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "echo",
    [
        pytest.param(Echo4(start=0x65), id="version 6"),
        pytest.param(Echo4(start=0x05), id="version 0"),
        pytest.param(Echo4(start=0x44), id="header of 16 bytes"),
        pytest.param(Echo4(start=0x46), id="options that are not there"),
        pytest.param(Echo4(start=0x46, options=bytes(4), length=27), id="ends before ICMP"),
        pytest.param(Echo4(start=0x47, options=b"\x83\7\x08\x0a\0\0\x09\0"), id="a source route"),
        pytest.param(Echo4(start=0x47, options=b"\1\x89\7\4\x0a\0\0\x09"), id="a strict one"),
        pytest.param(Echo4(start=0x46, options=b"\7\0\4\0"), id="an option of 0 bytes"),
        pytest.param(Echo4(start=0x46, options=b"\x94\1\0\0"), id="an option of 1 byte"),
        pytest.param(Echo4(start=0x46, options=b"\x94\5\0\0"), id="an option too long"),
        pytest.param(Echo4(start=0x46, options=b"\1\1\1\7"), id="an option without a length"),
        pytest.param(Echo4(start=0x46, options=b"\7\2\0\0"), id="no pointer"),
        pytest.param(Echo4(start=0x47, options=b"\7\7\3\0\0\0\0\0"), id="a pointer to the pointer"),
        pytest.param(Echo4(start=0x47, options=b"\7\7\5\0\0\0\0\0"), id="room for half an address"),
        pytest.param(Echo4(start=0x46, options=b"\x44\3\5\0"), id="a time stamp of no kind"),
        pytest.param(Echo4(start=0x47, options=b"\x44\x08\4\0" + bytes(4)), id="into its head"),
        pytest.param(Echo4(start=0x47, options=b"\x44\x08\5\2" + bytes(4)), id="an unknown kind"),
        pytest.param(Echo4(start=0x47, options=b"\x44\x08\5\1" + bytes(4)), id="half the room"),
        pytest.param(
            Echo4(start=0x47, options=b"\x44\x08\x09\xf0" + bytes(4)), id="the 16th left out"
        ),
        pytest.param(Echo4(fragment=0x2000), id="first fragment"),
        pytest.param(Echo4(fragment=0x2001), id="middle fragment"),
        pytest.param(Echo4(fragment=0x0001), id="last fragment"),
        pytest.param(Echo4(protocol=17), id="UDP"),
        pytest.param(Echo4(protocol=58), id="ICMPv6"),
        pytest.param(Echo4(kind=0), id="echo reply"),
        pytest.param(Echo4(kind=3), id="destination unreachable"),
        pytest.param(Echo4(kind=13), id="timestamp request"),
        pytest.param(Echo4(kind=128), id="ICMPv6's type"),
        pytest.param(Echo4(code=1), id="code"),
        pytest.param(Echo4(target="224.0.0.1"), id="to all hosts"),
        pytest.param(Echo4(target="239.255.255.255"), id="to a group"),
        pytest.param(Echo4(target="240.0.0.1"), id="to a reserved address"),
        pytest.param(Echo4(target="255.255.255.255"), id="to everybody"),
        pytest.param(Echo4(source="224.0.0.1"), id="from a group"),
        pytest.param(Echo4(source="255.255.255.255"), id="from everybody"),
        pytest.param(Echo4(source="0.0.0.0"), id="from nowhere"),
        pytest.param(Echo4(source="0.1.2.3"), id="from this network"),
        pytest.param(Echo4(length=85), id="longer than there is"),
        pytest.param(Echo4(length=65535), id="much longer than there is"),
        pytest.param(Echo4(length=27), id="ends in the ICMP header"),
        pytest.param(Echo4(length=20), id="ends with the IP header"),
        pytest.param(Echo4(length=0), id="no length"),
    ],
)
def test_other_icmp_packets_are_not_answered(echo: Echo4) -> None:
    assert icmp_echo(echo.pack()) is None


@pytest.mark.parametrize(
    "echo",
    [
        pytest.param(Echo6(start=4 << 28), id="version 4"),
        pytest.param(Echo6(start=0x45 << 24), id="IPv4's first byte"),
        pytest.param(Echo6(start=7 << 28), id="version 7"),
        pytest.param(Echo6(following=0), id="hop-by-hop options"),
        pytest.param(Echo6(following=43), id="routing header"),
        pytest.param(Echo6(following=44), id="fragment"),
        pytest.param(Echo6(following=1), id="ICMP"),
        pytest.param(Echo6(following=17), id="UDP"),
        pytest.param(Echo6(kind=129), id="echo reply"),
        pytest.param(Echo6(kind=8), id="ICMP's type"),
        pytest.param(Echo6(kind=135), id="neighbor solicitation"),
        pytest.param(Echo6(code=1), id="code"),
        pytest.param(Echo6(target="ff02::1"), id="to all nodes"),
        pytest.param(Echo6(target="ff0e::1234"), id="to a group"),
        pytest.param(Echo6(source="ff02::1"), id="from a group"),
        pytest.param(Echo6(source="::"), id="from nowhere"),
        pytest.param(Echo6(length=65), id="longer than there is"),
        pytest.param(Echo6(length=65535), id="much longer than there is"),
        pytest.param(Echo6(length=7), id="ends in the ICMPv6 header"),
        pytest.param(Echo6(length=0), id="no length, or a jumbogram"),
    ],
)
def test_other_icmpv6_packets_are_not_answered(echo: Echo6) -> None:
    assert icmpv6_echo(echo.pack()) is None


@pytest.mark.parametrize(("reply", "echo"), [(icmp_echo, Echo4()), (icmpv6_echo, Echo6())])
def test_cut_short_anywhere_is_no_answer(reply: Reply, echo: Echo4 | Echo6) -> None:
    packet = echo.pack()
    for length in range(len(packet)):
        assert reply(packet[:length]) is None
    assert reply(packet) is not None


@pytest.mark.parametrize("payload", [b"", b"\xff", bytes(57)])
@pytest.mark.parametrize("behind", [b"\0", b"padding"])
@pytest.mark.parametrize(("reply", "echo"), [(icmp_echo, Echo4()), (icmpv6_echo, Echo6())])
def test_bytes_after_the_packet_are_cut_off(
    reply: Reply, echo: Echo4 | Echo6, payload: bytes, behind: bytes
) -> None:
    plain = replace(echo, payload=payload).pack()
    answer = reply(plain + behind)
    assert answer is not None
    assert answer == reply(plain)
    assert len(answer) == len(plain)


def test_answers_are_not_answered() -> None:
    """Otherwise two responders would answer each other for ever."""
    for reply, packet in ((icmp_echo, Echo4().pack()), (icmpv6_echo, Echo6().pack())):
        answer = reply(packet)
        assert answer is not None
        assert icmp_echo(answer) is None
        assert icmpv6_echo(answer) is None


# --- Hostile bytes, and the argument -------------------------------------------------------------

OPTIONS4 = st.sampled_from(
    [
        Echo4(start=0x4F, options=b"\1\7\x27\4" + bytes(36)),
        Echo4(start=0x4F, options=b"\x44\x28\5\1" + bytes(36)),
    ]
)

MUTATED = st.builds(
    lambda packet, changes, length: bytes(changes.get(i, byte) for i, byte in enumerate(packet))[
        :length
    ],
    st.one_of(ECHOES4, ECHOES6, OPTIONS4).map(lambda echo: echo.pack()),
    st.dictionaries(st.integers(0, 47), U8, max_size=4),
    st.integers(0, 1600),
)


@given(st.one_of(st.binary(max_size=100), MUTATED))
def test_hostile_bytes_never_raise(data: bytes) -> None:
    for reply, longest_header in ((icmp_echo, 28), (icmpv6_echo, 48)):
        buffer = bytearray(data)
        answer = reply(buffer)
        assert buffer == data
        assert answer is None or longest_header <= len(answer) <= len(data)


@pytest.mark.parametrize(("reply", "echo"), [(icmp_echo, Echo4()), (icmpv6_echo, Echo6())])
@pytest.mark.parametrize("behind", [b"", b"behind"])
def test_any_bytes_like_packet_is_answered_with_bytes(
    reply: Reply, echo: Echo4 | Echo6, behind: bytes
) -> None:
    packet = echo.pack() + behind
    expected = reply(packet)
    assert type(expected) is bytes
    buffer = bytearray(packet)
    for argument in (buffer, memoryview(packet), memoryview(buffer), memoryview(b"?" + packet)[1:]):
        answer = reply(argument)
        assert type(answer) is bytes
        assert answer == expected
    assert buffer == packet


@pytest.mark.parametrize("reply", REPLIES)
def test_the_other_versions_packets_are_none(reply: Reply) -> None:
    other = Echo6() if reply is icmp_echo else Echo4()
    assert reply(other.pack()) is None
    assert reply(b"") is None


# --- Only for given addresses --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "echo", "network"),
    [(icmp_echo, Echo4(), "10.0.0.0/24"), (icmpv6_echo, Echo6(), "fd00::/64")],
)
def test_only_the_given_addresses_are_answered_for(
    reply: Callable[..., bytes | None], echo: Echo4 | Echo6, network: str
) -> None:
    packet, target = echo.pack(), ipaddress.ip_address(echo.target)
    answer = reply(packet)
    assert answer is not None
    addresses: Any
    for addresses in ({target}, [target], ipaddress.ip_network(network)):
        assert reply(packet, addresses=addresses) == answer
    other = ipaddress.ip_address("10.0.0.78")
    for addresses in ((), {other}):
        assert reply(packet, addresses=addresses) is None


def test_options_do_not_get_past_the_addresses() -> None:
    packet = Echo4(start=0x46, options=bytes([1, 1, 1, 0])).pack()
    target = ipaddress.IPv4Address(Echo4.target)
    assert icmp_echo(packet, addresses={target}) == icmp_echo(packet) is not None
    assert icmp_echo(packet, addresses=()) is None


@pytest.mark.parametrize("kind", [set, frozenset, list, tuple])
@pytest.mark.parametrize("wrong", ["10.0.0.2", ipaddress.ip_interface("10.0.0.2/24")])
def test_addresses_that_never_match_are_an_error(kind: Any, wrong: Any) -> None:
    question = Echo4().pack()
    with pytest.raises(TypeError, match=r"write ipaddress\.ip_address"):
        icmp_echo(question, addresses=kind([wrong]))
    assert icmp_echo(question, addresses=kind([])) is None
    assert icmp_echo(question, addresses=ipaddress.IPv4Network("203.0.113.0/24")) is None
