"""Super-packets: split and merged, by the C module and by its Python twin."""

import dataclasses
import itertools
import random
import socket
import struct
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aiotun._packets import gso
from aiotun.offload import GsoType, VnetHeader, merge, split

from .helpers import checksum
from .test_native import _speedups, twins

NONE = bytes(10)
A4, B4 = "10.0.0.1", "10.0.0.2"
A6, B6 = "fd00::1", "fd00::2"

Split = Callable[..., list[bytes]]
Merge = Callable[..., list[bytes]]

each_split = twins(gso.split, "split")
each_merge = twins(gso.merge, "merge")
each_version = pytest.mark.parametrize("version", [4, 6])
each_protocol = pytest.mark.parametrize("protocol", ["tcp", "udp"])


@dataclasses.dataclass(frozen=True)
class Packet:
    """A packet as a set of fields; `bytes` writes it with valid lengths and checksums."""

    payload: bytes = b""
    version: int = 4
    protocol: str = "tcp"
    link: bytes = b""  # the frame's header without the ethertype
    tos: int = 0
    ttl: int = 64
    identity: int = 1
    fragment: int = 0x4000  # DF
    source: str = ""
    options: bytes = b""  # IPv4 options or IPv6 extension headers
    ports: tuple[int, int] = (1000, 2000)
    sequence: int = 1
    acknowledged: int = 7
    flags: int = 0x10
    reserved: int = 0
    window: int = 500
    urgent: int = 0
    tcp_options: bytes = bytes.fromhex("0101080a0000000100000002")
    flow: int = 0

    def but(self, **changes: Any) -> "Packet":
        return dataclasses.replace(self, **changes)

    def __bytes__(self) -> bytes:
        number = 6 if self.protocol == "tcp" else 17
        if self.version == 4:
            addresses = socket.inet_aton(self.source or A4) + socket.inet_aton(B4)
        else:
            addresses = b"".join(
                socket.inet_pton(socket.AF_INET6, text) for text in (self.source or A6, B6)
            )
        transport = self._transport(addresses, number)
        length = len(self.options) + len(transport)
        if self.version == 4:
            words = 5 + len(self.options) // 4
            head = struct.pack(
                "!BBHHHBBH", 0x40 | words, self.tos, 20 + length, self.identity, self.fragment,
                self.ttl, number, 0,
            )  # fmt: skip
            head += addresses + self.options
            head = head[:10] + checksum(head).to_bytes(2, "big") + head[12:]
        else:
            first = 6 << 28 | self.tos << 20 | self.flow
            following = 60 if self.options else number
            head = struct.pack("!IHBB", first, length, following, self.ttl) + addresses
            head += self.options
        ethertype = {4: b"\x08\x00", 6: b"\x86\xdd"}[self.version] if self.link else b""
        return self.link + ethertype + head + transport

    def _transport(self, addresses: bytes, number: int) -> bytes:
        if self.protocol == "udp":
            length = 8 + len(self.payload)
            head = struct.pack("!HHHH", *self.ports, length, 0)
            place = 6
        else:
            words = 5 + len(self.tcp_options) // 4
            head = struct.pack(
                "!HHIIBBHHH", *self.ports, self.sequence, self.acknowledged,
                words << 4 | self.reserved, self.flags, self.window, 0, self.urgent,
            )  # fmt: skip
            head += self.tcp_options
            place = 16
        body = head + self.payload
        pseudo = addresses + struct.pack("!II", len(body), number)
        value = checksum(pseudo + body)
        if self.protocol == "udp":
            value = value or 0xFFFF
        return body[:place] + value.to_bytes(2, "big") + body[place + 2 :]


ETHERNET = bytes.fromhex("020000000002020000000001")
LINKS = {
    "packet": b"",
    "frame": ETHERNET,
    "vlan": ETHERNET + bytes.fromhex("81000005"),
    "qinq": ETHERNET + bytes.fromhex("88a8000681000005"),
}
each_link = pytest.mark.parametrize("link", LINKS)


def run_of(first: Packet, sizes: Iterable[int], seed: int = 0) -> list[Packet]:
    """Consecutive packets with random payloads of these sizes."""
    random_bytes = random.Random(seed).randbytes
    packets = []
    sequence, identity = first.sequence, first.identity
    for size in sizes:
        packets.append(first.but(payload=random_bytes(size), sequence=sequence, identity=identity))
        sequence = (sequence + size) & 0xFFFFFFFF
        identity = (identity + 1) & 0xFFFF
    return packets


def written(packets: Iterable[Packet]) -> list[bytes]:
    return [bytes(packet) for packet in packets]


def alone(packets: Iterable[bytes]) -> list[bytes]:
    """The result of `merge` if it merges none of the packets."""
    return [NONE + packet for packet in packets]


class TestThereAndBack:
    @each_merge
    @each_link
    @each_version
    @each_protocol
    @pytest.mark.parametrize("sizes", [(8, 8), (1448, 1448, 1448), (1000, 1000, 1), (1,) * 60])
    def test_a_run_is_merged_into_one_super_packet(
        self, merge: Merge, link: str, version: int, protocol: str, sizes: tuple[int, ...]
    ) -> None:
        first = Packet(version=version, protocol=protocol, link=LINKS[link])
        packets = written(run_of(first, sizes))
        (whole,) = merge(packets, bool(link != "packet"))
        header = VnetHeader.unpack(whole)
        transport = len(packets[0]) - sizes[0] - (32 if protocol == "tcp" else 8)
        kind = GsoType.UDP_L4 if protocol == "udp" else GsoType.TCPV4
        if protocol == "tcp" and version == 6:
            kind = GsoType.TCPV6
        assert header == VnetHeader(
            flags=VnetHeader.NEEDS_CSUM,
            gso_type=kind,
            hdr_len=len(packets[0]) - sizes[0],
            gso_size=sizes[0],
            csum_start=transport,
            csum_offset=16 if protocol == "tcp" else 6,
        )
        assert whole.endswith(b"".join(packet[header.hdr_len :] for packet in packets))
        assert split(whole, frame=link != "packet") == packets

    @each_split
    @each_link
    @each_version
    @each_protocol
    @pytest.mark.parametrize("length", [1, 99, 100, 101, 200, 6500, 65_000])
    def test_split_cuts_at_gso_size(
        self, split: Split, link: str, version: int, protocol: str, length: int
    ) -> None:
        first = Packet(version=version, protocol=protocol, link=LINKS[link])
        sizes = [100] * (length // 100) + ([length % 100] if length % 100 else [])
        packets = run_of(first, sizes)
        whole = first.but(payload=b"".join(packet.payload for packet in packets))
        kind = GsoType.UDP_L4 if protocol == "udp" else GsoType.TCPV4
        if protocol == "tcp" and version == 6:
            kind = GsoType.TCPV6
        header = VnetHeader(flags=1, gso_type=kind, gso_size=100)
        assert split(header.pack() + bytes(whole), link != "packet") == written(packets)

    @each_merge
    def test_no_super_packet_is_longer_than_an_ip_packet(self, merge: Merge) -> None:
        """Up to 65,535 bytes exactly."""
        packets = written(run_of(Packet(), [1448] * 45 + [323]))
        (whole,) = merge(packets, False)
        assert len(whole) == 10 + 65_535
        assert split(whole) == packets
        packets = written(run_of(Packet(), [1448] * 45 + [324]))
        assert [len(each) for each in merge(packets, False)] == [10 + 65_212, 10 + 376]

    @each_merge
    def test_sequence_and_identification_wrap_around(self, merge: Merge) -> None:
        packets = written(run_of(Packet(sequence=0xFFFFFFF0, identity=0xFFFF), [8] * 6))
        (whole,) = merge(packets, False)
        assert split(whole) == packets

    @each_merge
    @pytest.mark.parametrize("count", [64, 65, 130])
    def test_no_more_datagrams_than_the_kernel_takes(self, merge: Merge, count: int) -> None:
        packets = written(run_of(Packet(protocol="udp"), [10] * count))
        merged = merge(packets, False)
        assert len(merged) == (count + 63) // 64
        assert list(itertools.chain(*map(split, merged))) == packets

    @each_merge
    @pytest.mark.parametrize("count", [1000, 1001, 2050])
    def test_no_more_packets_than_can_be_written_in_pieces(self, merge: Merge, count: int) -> None:
        packets = written(run_of(Packet(), [1] * count))
        merged = merge(packets, False)
        assert len(merged) == (count + 999) // 1000
        assert list(itertools.chain(*map(split, merged))) == packets

    @each_merge
    def test_empty_input_merges_to_nothing(self, merge: Merge) -> None:
        assert merge([], False) == []
        assert merge(iter([b"", b"x"]), False) == alone([b"", b"x"])

    @each_merge
    @pytest.mark.parametrize("form", [bytearray, memoryview])
    def test_merge_takes_any_bytes_like_object(
        self, merge: Merge, form: Callable[[bytes], Any]
    ) -> None:
        packets = written(run_of(Packet(), [10, 10]))
        assert merge(map(form, packets), False) == merge(packets, False)
        with pytest.raises(TypeError):
            merge([packets[0], "text"], False)
        with pytest.raises(TypeError):
            merge(None, False)


# Every difference with which the second packet must not be merged with the first.
DIFFERENT: dict[str, dict[str, Any]] = {
    "another source": {"source": "10.0.0.9"},
    "another port": {"ports": (1000, 2001)},
    "another ToS": {"tos": 4},
    "another TTL": {"ttl": 63},
    "may be fragmented": {"fragment": 0},
    "a fragment": {"fragment": 0x2000},
    "a later fragment": {"fragment": 1},
    "IP options": {"options": b"\1\1\1\1"},
    "another acknowledgement": {"acknowledged": 8},
    "another window": {"window": 501},
    "an urgent pointer": {"urgent": 1},
    "other TCP options": {"tcp_options": bytes.fromhex("0101080a0000000100000003")},
    "fewer TCP options": {"tcp_options": b""},
    "SYN": {"flags": 0x12},
    "FIN": {"flags": 0x11},
    "RST": {"flags": 0x14},
    "URG": {"flags": 0x30},
    "ECE": {"flags": 0x50},
    "CWR": {"flags": 0x90},
    "no ACK": {"flags": 0},
    "a reserved bit": {"reserved": 1},
    "no payload": {"payload": b""},
    "a larger payload": {"payload": bytes(101)},
    "a gap": {"sequence": 102},
    "an overlap": {"sequence": 100},
}


class TestWhatIsNotMerged:
    @each_merge
    @pytest.mark.parametrize("why", DIFFERENT)
    def test_segments_that_differ_are_not_merged(self, merge: Merge, why: str) -> None:
        first, second = run_of(Packet(), [100, 100])
        packets = written([first, second.but(**DIFFERENT[why])])
        assert merge(packets, False) == alone(packets)
        # Nor if the first packet has it as well.
        if "flags" in DIFFERENT[why] or "options" in DIFFERENT[why]:
            packets = written([first.but(**DIFFERENT[why]), second.but(**DIFFERENT[why])])
            assert merge(packets, False) == alone(packets)

    @each_merge
    @pytest.mark.parametrize(
        "change",
        [
            {"source": "fd00::9"},
            {"ports": (1, 2)},
            {"tos": 4},
            {"ttl": 63},
            {"flow": 1},
            {"payload": bytes(101)},
            {"payload": b""},
            {"options": b"\x11\0\1\4\0\0\0\0"},
        ],
    )
    def test_datagrams_that_differ_are_not_merged(
        self, merge: Merge, change: dict[str, Any]
    ) -> None:
        first, second = run_of(Packet(version=6, protocol="udp"), [100, 100])
        packets = written([first, second.but(**change)])
        assert merge(packets, False) == alone(packets)

    @each_merge
    def test_packets_with_extension_headers_are_not_merged(self, merge: Merge) -> None:
        first = Packet(version=6, options=b"\x06\0\1\4\0\0\0\0")
        packets = written(run_of(first, [100, 100]))
        assert merge(packets, False) == alone(packets)

    @each_merge
    def test_frames_with_different_headers_are_not_merged(self, merge: Merge) -> None:
        first, second = run_of(Packet(link=ETHERNET), [100, 100])
        packets = written([first, second.but(link=ETHERNET[:-1] + b"\x09")])
        assert merge(packets, True) == alone(packets)
        packets = written([first, second.but(link=LINKS["vlan"])])
        assert merge(packets, True) == alone(packets)

    @each_merge
    @pytest.mark.parametrize("tags", [3, 30_000])
    def test_more_vlan_tags_than_any_frame_has(self, merge: Merge, tags: int) -> None:
        """A super-packet's header has 16 bits for the length of the headers."""
        link = ETHERNET + bytes.fromhex("81000005") * tags
        packets = written(run_of(Packet(link=link), [100, 100]))
        assert merge(packets, True) == alone(packets)

    @each_merge
    def test_frames_are_no_packets(self, merge: Merge) -> None:
        packets = written(run_of(Packet(), [100, 100]))
        assert merge(packets, True) == alone(packets)
        packets = written(run_of(Packet(link=ETHERNET), [100, 100]))
        assert merge(packets, False) == alone(packets)

    @each_merge
    def test_identification_counts_only_without_dont_fragment(self, merge: Merge) -> None:
        """Only a packet that may be fragmented needs its identification."""
        first, second = run_of(Packet(fragment=0), [100, 100])
        packets = written([first, second.but(identity=9)])
        assert merge(packets, False) == alone(packets)
        assert len(merge(written([first, second]), False)) == 1
        first, second = run_of(Packet(), [100, 100])
        assert len(merge(written([first, second.but(identity=9)]), False)) == 1

    @each_merge
    @each_version
    @each_protocol
    @pytest.mark.parametrize("which", [0, 1])
    def test_packets_with_a_wrong_checksum_are_not_merged(
        self, merge: Merge, version: int, protocol: str, which: int
    ) -> None:
        packets = written(run_of(Packet(version=version, protocol=protocol), [100, 100]))
        packets[which] = packets[which][:-1] + bytes([packets[which][-1] ^ 1])
        assert merge(packets, False) == alone(packets)

    @each_merge
    @pytest.mark.parametrize("which", [0, 1])
    def test_a_wrong_ip_checksum(self, merge: Merge, which: int) -> None:
        packets = written(run_of(Packet(), [100, 100]))
        packets[which] = packets[which][:10] + b"\0\0" + packets[which][12:]
        assert merge(packets, False) == alone(packets)

    @each_merge
    def test_datagrams_without_a_checksum_are_not_merged(self, merge: Merge) -> None:
        packets = written(run_of(Packet(protocol="udp"), [100, 100]))
        packets = [packet[:26] + b"\0\0" + packet[28:] for packet in packets]
        assert merge(packets, False) == alone(packets)

    @each_merge
    def test_packets_with_trailing_bytes_are_not_merged(self, merge: Merge) -> None:
        packets = [packet + b"\0" for packet in written(run_of(Packet(), [100, 100]))]
        assert merge(packets, False) == alone(packets)

    @each_merge
    def test_a_datagram_that_ends_before_its_packet(self, merge: Merge) -> None:
        packets = written(run_of(Packet(protocol="udp"), [100, 100]))
        packets = [packet[:24] + b"\0\x20" + packet[26:] for packet in packets]
        assert merge(packets, False) == alone(packets)

    @each_merge
    def test_a_short_one_ends_the_run(self, merge: Merge) -> None:
        packets = written(run_of(Packet(), [100, 99, 99]))
        assert [len(each) for each in merge(packets, False)] == [10 + 251, 10 + 151]

    @each_merge
    def test_push_ends_the_run(self, merge: Merge) -> None:
        run = run_of(Packet(), [100] * 4)
        run[1] = run[1].but(flags=0x18)
        packets = written(run)
        first, second = merge(packets, False)
        assert [*split(first), *split(second)] == packets
        assert (first[10 + 33], second[10 + 33]) == (0x18, 0x10)
        assert merge(packets[1:3], False) == alone(packets[1:3])

    @each_merge
    @each_version
    def test_udp_false_leaves_datagrams_alone(self, merge: Merge, version: int) -> None:
        datagrams = written(run_of(Packet(version=version, protocol="udp"), [100] * 3))
        packets = written(run_of(Packet(version=version), [100] * 3))
        assert merge(datagrams, False, False) == alone(datagrams)
        assert merge(packets + datagrams, False, False) == merge(packets) + alone(datagrams)
        assert len(merge(packets + datagrams, False, True)) == 2

    @each_merge
    def test_a_gap_is_not_closed_by_a_later_packet(self, merge: Merge) -> None:
        """What doesn't continue a run begins another, and the flow's order stays as it was."""
        one = written(run_of(Packet(), [100] * 4))
        mixed = [one[0], one[2], one[1], one[3]]
        merged = merge(mixed, False)
        assert list(itertools.chain(*map(split, merged))) == mixed


class TestSplit:
    @each_split
    def test_tcp_flags_go_to_the_first_the_last_or_all(self, split: Split) -> None:
        """FIN and PSH on the last, CWR on the first, the others on all."""
        header = VnetHeader(1, GsoType.TCPV4 | GsoType.ECN, 0, 10).pack()
        packets = split(header + bytes(Packet(payload=bytes(30), flags=0xFF)), False)
        assert [packet[33] for packet in packets] == [0xF6, 0x76, 0x7F]

    @each_split
    def test_extension_headers_are_repeated(self, split: Split) -> None:
        options = b"\x2b\0\1\4\0\0\0\0" + b"\x06\1" + bytes(14)
        first = Packet(version=6, options=options)
        packets = run_of(first, [100, 100, 7])
        whole = first.but(payload=b"".join(packet.payload for packet in packets))
        header = VnetHeader(1, GsoType.TCPV6, 0, 100).pack()
        assert split(header + bytes(whole), False) == written(packets)

    @each_split
    def test_ip_options_are_repeated(self, split: Split) -> None:
        first = Packet(options=b"\x94\4\0\0")
        packets = run_of(first, [100, 100])
        whole = first.but(payload=b"".join(packet.payload for packet in packets))
        header = VnetHeader(1, GsoType.TCPV4, 0, 100).pack()
        assert split(header + bytes(whole), False) == written(packets)

    @each_split
    def test_an_ordinary_packet_is_returned_whole(self, split: Split) -> None:
        assert split(NONE + b"anything", False) == [b"anything"]
        assert split(NONE, False) == [b""]

    @each_split
    @each_version
    @each_protocol
    @each_link
    def test_a_checksum_left_to_us(
        self, split: Split, version: int, protocol: str, link: str
    ) -> None:
        packet = bytes(Packet(payload=b"odd", version=version, protocol=protocol, link=LINKS[link]))
        head = 8 if protocol == "udp" else 32
        start, offset = len(packet) - 3 - head, 6 if protocol == "udp" else 16
        number = 17 if protocol == "udp" else 6
        addresses = packet[start - (8 if version == 4 else 32) : start]
        seed = 0xFFFF - checksum(addresses + struct.pack("!II", head + 3, number))
        left = packet[: start + offset] + seed.to_bytes(2, "big") + packet[start + offset + 2 :]
        header = VnetHeader(1, 0, 0, 0, start, offset).pack()
        assert split(header + left, False) == [packet]

    @each_split
    def test_a_checksum_that_comes_to_zero(self, split: Split) -> None:
        """It is written as 0xffff, because zero means no checksum in UDP."""
        header = VnetHeader(1, 0, 0, 0, 0, 2).pack()
        assert split(header + b"\xff\xff\0\0", False) == [b"\xff\xff\xff\xff"]
        first = Packet(protocol="udp", payload=b"\0\0")
        (plain,) = split(VnetHeader(1, GsoType.UDP_L4, 0, 9).pack() + bytes(first), False)
        value = int.from_bytes(plain[26:28], "big")
        first = first.but(payload=value.to_bytes(2, "big"))
        (zero,) = split(VnetHeader(1, GsoType.UDP_L4, 0, 9).pack() + bytes(first), False)
        assert zero == bytes(first)
        assert zero[26:28] == b"\xff\xff"

    @each_split
    def test_a_gso_size_of_1_gives_packets_of_one_byte(self, split: Split) -> None:
        packets = run_of(Packet(), [1] * 300)
        whole = Packet(payload=b"".join(packet.payload for packet in packets))
        header = VnetHeader(1, GsoType.TCPV4, 0, 1).pack()
        assert split(header + bytes(whole), False) == written(packets)

    @each_split
    @pytest.mark.parametrize(
        ("data", "why"),
        [
            (b"", "header of 10 bytes"),
            (bytes(9), "header of 10 bytes"),
            (VnetHeader(1, 0, 0, 0, 5, 4).pack() + bytes(10), "the checksum at 9 is outside"),
            (
                VnetHeader(1, 0, 0, 0, 65535, 65535).pack() + bytes(10),
                "checksum at 131070 is outside",
            ),
            (VnetHeader(1, 1, 0, 9).pack(), "neither IPv4 nor IPv6"),
            (VnetHeader(1, 1, 0, 9).pack() + b"\x50" * 60, "neither IPv4 nor IPv6"),
            (VnetHeader(1, 1, 0, 0).pack() + bytes(Packet()), "gso_size must not be 0"),
            (VnetHeader(1, 4, 0, 9).pack() + bytes(Packet()), "gso_type 4 does not match"),
            (VnetHeader(1, 5, 0, 9).pack() + bytes(Packet()), "gso_type 5 does not match"),
            (VnetHeader(1, 3, 0, 9).pack() + bytes(Packet(protocol="udp")), "gso_type 3 does not"),
            (VnetHeader(1, 0x61, 0, 9).pack() + bytes(Packet()), "gso_type 97 does not match"),
            (VnetHeader(1, 1, 0, 9).pack() + bytes(Packet(fragment=0x2000)), "fragment"),
            (VnetHeader(1, 1, 0, 9).pack() + bytes(Packet(payload=b"x"))[:-1], "length"),
            (VnetHeader(1, 1, 0, 9).pack() + bytes(Packet()) + b"x", "length"),
            (VnetHeader(1, 4, 0, 9).pack() + bytes(Packet(version=6)) + b"x", "length"),
            (VnetHeader(1, 1, 0, 9).pack() + b"\x44" + bytes(Packet())[1:], "IPv4 header"),
            (VnetHeader(1, 1, 0, 9).pack() + b"\x4f" + bytes(Packet())[1:], "IPv4 header"),
            (
                VnetHeader(1, 1, 0, 9).pack() + bytes(Packet())[:32] + b"\x40" + bytes(19),
                "TCP or UDP header",
            ),
            (
                VnetHeader(1, 4, 0, 9).pack()
                + bytes(Packet(version=6, options=b"\x2b\xff\0\0\0\0\0\0")),
                "neither TCP nor UDP|does not match",
            ),
        ],
    )
    def test_invalid_super_packets_say_what_is_wrong(
        self, split: Split, data: bytes, why: str
    ) -> None:
        with pytest.raises(ValueError, match=why):
            split(data, False)

    @each_split
    def test_split_refuses_a_str(self, split: Split) -> None:
        with pytest.raises(TypeError):
            split("text", False)

    @each_split
    def test_split_takes_any_bytes_like_object(self, split: Split) -> None:
        (whole,) = merge(written(run_of(Packet(), [10, 10])))
        assert split(bytearray(whole), False) == split(memoryview(whole), False) == split(whole)


# IPv6: destination options, then a routing header whose last segment is fd00::9.
_ROUTING = b"\x2b\0\1\4\0\0\0\0\6\2\4\1\0\0\0\0" + socket.inet_pton(socket.AF_INET6, "fd00::9")
ROUTED = {
    "loose": Packet(options=b"\x83\7\4\x0a\0\0\x09\0"),
    "strict, behind others": Packet(options=b"\1\x94\4\0\0\x89\7\4\x0a\0\0\x09"),
    "routing header": Packet(version=6, options=_ROUTING),
}


class TestSourceRoutes:
    """The header has the next hop, but the pseudo-header has the final destination."""

    @each_split
    @pytest.mark.parametrize("kind", ROUTED)
    def test_the_partial_checksum_counts(self, split: Split, kind: str) -> None:
        first = ROUTED[kind].but(payload=bytes(range(100)))
        whole = bytearray(bytes(first))
        start = len(whole) - 100 - 32
        final = "10.0.0.9" if first.version == 4 else "fd00::9"
        family = socket.AF_INET if first.version == 4 else socket.AF_INET6
        source = socket.inet_pton(family, A4 if first.version == 4 else A6)
        pseudo = source + socket.inet_pton(family, final)
        partial = 0xFFFF - checksum(pseudo + struct.pack("!II", 132, 6))
        struct.pack_into("!H", whole, start + 16, partial)
        gso_type = GsoType.TCPV4 if first.version == 4 else GsoType.TCPV6
        header = VnetHeader(1, gso_type, start + 32, 40, start, 16)
        parts = split(header.pack() + whole, False)
        assert [len(part) - start - 32 for part in parts] == [40, 40, 20]
        for part in parts:
            body = part[start:]
            assert checksum(pseudo + struct.pack("!II", len(body), 6) + body) == 0

    @each_split
    @pytest.mark.parametrize("kind", ROUTED)
    def test_refused_without_one(self, split: Split, kind: str) -> None:
        whole = bytes(ROUTED[kind].but(payload=bytes(100)))
        gso_type = GsoType.TCPV4 if ROUTED[kind].version == 4 else GsoType.TCPV6
        for header in (VnetHeader(0, gso_type, 0, 40), VnetHeader(1, gso_type, 0, 40, 20, 4)):
            with pytest.raises(ValueError, match="a source route, but no partial checksum"):
                split(header.pack() + whole, False)

    @each_split
    def test_not_where_the_route_is_at_its_end(self, split: Split) -> None:
        options = _ROUTING[:11] + b"\0" + _ROUTING[12:]
        first = Packet(version=6, options=options)
        packets = run_of(first, [40, 40, 20])
        whole = bytes(first.but(payload=b"".join(packet.payload for packet in packets)))
        assert split(VnetHeader(0, GsoType.TCPV6, 0, 40).pack() + whole, False) == written(packets)

    @each_split
    @pytest.mark.parametrize(
        "options", [b"\0\x83\7\4", b"\7\3\x83\0", b"\1\1\1\x44", b"\x44\0\x83\7"]
    )
    def test_options_that_are_none(self, split: Split, options: bytes) -> None:
        """They are after the end of the options, inside another option, or truncated."""
        whole = bytes(Packet(options=options, payload=bytes(100)))
        header = VnetHeader(0, GsoType.TCPV4, 0, 40)
        if options == b"\x44\0\x83\7":  # a length of 0: what follows the two bytes is looked at
            with pytest.raises(ValueError, match="source route"):
                split(header.pack() + whole, False)
        else:
            assert len(split(header.pack() + whole, False)) == 3

    @each_merge
    @pytest.mark.parametrize("kind", ROUTED)
    def test_left_alone_by_merge(self, merge: Merge, kind: str) -> None:
        packets = written(run_of(ROUTED[kind], [100, 100]))
        assert merge(packets, False) == alone(packets)


class TestInProportion:
    """A super-packet from another host can't grow beyond proportion."""

    @each_split
    @each_version
    @pytest.mark.parametrize("gso_size", [1, 2])
    def test_a_tiny_gso_size_is_refused(self, split: Split, version: int, gso_size: int) -> None:
        gso_type = GsoType.TCPV4 if version == 4 else GsoType.TCPV6
        whole = bytes(Packet(version=version, payload=bytes(60_000)))
        with pytest.raises(ValueError, match=f"would become {60_000 // gso_size} packets"):
            split(VnetHeader(1, gso_type, 0, gso_size).pack() + whole, False)

    @each_split
    def test_headers_longer_than_512_bytes_are_refused(self, split: Split) -> None:
        """This holds even for a few packets."""
        header = VnetHeader(1, GsoType.TCPV6, 0, 1).pack()
        last, one_more = b"\6\0\1\4\0\0\0\0", b"\x3c\0\1\4\0\0\0\0"
        whole = bytes(Packet(version=6, options=one_more * 54 + last, payload=b"xy"))
        assert len(whole) == 512 + 2
        assert len(split(header + whole, False)) == 2
        whole = bytes(Packet(version=6, options=one_more * 55 + last, payload=b"xy"))
        with pytest.raises(ValueError, match="headers of 520 bytes"):
            split(header + whole, False)

    @each_split
    def test_thousands_of_vlan_tags_are_refused(self, split: Split) -> None:
        link = ETHERNET + bytes.fromhex("81000005") * 8000
        whole = bytes(Packet(link=link, payload=bytes(32_000)))
        with pytest.raises(ValueError, match="headers of 32066 bytes"):
            split(VnetHeader(1, GsoType.TCPV4, 0, 1000).pack() + whole, True)

    @each_split
    @pytest.mark.parametrize("protocol", ["tcp", "udp"])
    def test_the_smallest_segments_that_linux_sends_are_split(
        self, split: Split, protocol: str
    ) -> None:
        """The smallest payloads: 8 bytes of TCP with 40 bytes of options, 128 datagrams of 1."""
        tagged = ETHERNET + bytes.fromhex("81000005")
        if protocol == "tcp":
            first = Packet(version=6, link=tagged, tcp_options=bytes(40))
            sizes, gso_type = [8] * 8000, GsoType.TCPV6
        else:
            first = Packet(version=6, link=tagged, protocol="udp")
            sizes, gso_type = [1] * 128, GsoType.UDP_L4
        whole = bytes(first.but(payload=bytes(sum(sizes))))
        parts = split(VnetHeader(1, gso_type, 0, sizes[0]).pack() + whole, True)
        assert len(parts) == len(sizes)
        assert sum(map(len, parts)) <= 16 * len(whole) or len(parts) == 128

    @each_merge
    @each_version
    def test_merge_makes_nothing_that_split_refuses(self, merge: Merge, version: int) -> None:
        first = Packet(version=version, link=LINKS["qinq"], tcp_options=bytes(40))
        for size in (1, 3, 9, 60):
            packets = written(run_of(first, [size] * 1000))
            merged = merge(packets, True)
            assert len(merged) < 10
            again = itertools.chain(*(split(each, frame=True) for each in merged))
            assert list(again) == packets


# Packets from other hosts: valid packets, and packets with a few bytes changed or cut off.
PACKETS = st.builds(
    Packet,
    payload=st.binary(max_size=40),
    version=st.sampled_from([4, 6]),
    protocol=st.sampled_from(["tcp", "udp"]),
    link=st.sampled_from(list(LINKS.values())),
    fragment=st.sampled_from([0, 0x4000]),
    flags=st.sampled_from([0x10, 0x18, 0x11]),
    sequence=st.sampled_from([1, 0xFFFFFFFF]),
    options=st.sampled_from([b"", b"\x06\0\1\4\0\0\0\0"]),
)


@st.composite
def lists(draw: st.DrawFn) -> list[bytes]:
    packets: list[bytes] = []
    for first in draw(st.lists(PACKETS, max_size=4)):
        sizes = draw(st.lists(st.integers(0, 30), min_size=1, max_size=6))
        packets += written(run_of(first, sorted(sizes, reverse=True)))
    return packets


@st.composite
def damaged(draw: st.DrawFn, data: st.SearchStrategy[bytes]) -> bytes:
    changed = bytearray(draw(data))
    for _ in range(draw(st.integers(0, 4))):
        if changed:
            changed[draw(st.integers(0, min(len(changed) - 1, 90)))] = draw(st.integers(0, 255))
    end = draw(st.integers(0, len(changed))) if draw(st.booleans()) else len(changed)
    return bytes(changed[:end])


def unidentified(packet: bytes, frame: bool) -> bytes:
    """The packet without its identification and header checksum if it may not be fragmented."""
    try:
        version, ip, *_ = gso._layers(packet, frame)
    except ValueError:
        return packet
    if version == 6 or not packet[ip + 6] & 0x40:
        return packet
    return packet[: ip + 4] + packet[ip + 6 : ip + 10] + packet[ip + 12 :]


# Two equal packets, which follow each other except for their identification. It doesn't count.
TWINS = 2 * written([Packet(protocol="udp", payload=b"x", fragment=0x4000)])


class TestAnyInput:
    @each_merge
    @given(packets=lists(), frame=st.booleans())
    @example(packets=TWINS, frame=False)
    def test_splitting_undoes_merging(
        self, merge: Merge, packets: list[bytes], frame: bool
    ) -> None:
        merged = merge(packets, frame)
        again = itertools.chain(*(split(each, frame=frame) for each in merged))
        assert [unidentified(each, frame) for each in again] == [
            unidentified(each, frame) for each in packets
        ]

    @pytest.mark.skipif(_speedups is None, reason="missing: the C module was not built")
    @settings(max_examples=500)
    @given(packets=st.lists(damaged(PACKETS.map(bytes)), max_size=6), frame=st.booleans())
    def test_merging_is_the_same_in_both(self, packets: list[bytes], frame: bool) -> None:
        assert _speedups.merge(packets, frame) == gso.merge(packets, frame)

    @pytest.mark.skipif(_speedups is None, reason="missing: the C module was not built")
    @settings(max_examples=1000)
    @given(
        header=st.builds(
            VnetHeader,
            flags=st.integers(0, 3),
            gso_type=st.sampled_from([0, 1, 3, 4, 5, 0x81, 0x84, 0x61]) | st.integers(0, 255),
            gso_size=st.integers(0, 50) | st.integers(0, 65535),
            csum_start=st.integers(0, 70) | st.integers(0, 65535),
            csum_offset=st.integers(0, 20) | st.integers(0, 65535),
        ),
        data=damaged(PACKETS.map(bytes)),
        frame=st.booleans(),
    )
    def test_splitting_is_the_same_in_both(
        self, header: VnetHeader, data: bytes, frame: bool
    ) -> None:
        def attempt(split: Split) -> object:
            try:
                return split(header.pack() + data, frame)
            except ValueError as error:
                return str(error)

        result = attempt(_speedups.split)
        assert result == attempt(gso.split)
        if isinstance(result, list):
            assert sum(map(len, result)) <= max(65_535, 16 * len(data))
