"""Merging by flow: runs of several flows that come interleaved, by C and by Python."""

import itertools
import os
import random
import socket
from collections.abc import Callable, Iterable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiotun._kernel import abi
from aiotun._packets import gso, native
from aiotun.offload import split

from .test_gso import ETHERNET, LINKS, Merge, Packet, alone, each_merge, run_of, written
from .test_native import _speedups, twins

each_write_merged = twins(native._write_merged, "write_merged")

ICMP = bytes(Packet(protocol="udp", payload=bytes(40)))
ICMP = ICMP[:9] + b"\x01\0\0" + ICMP[12:]
ARP = ETHERNET + bytes.fromhex("0806") + bytes(28)


def flows(count: int, length: int = 4, size: int = 100, **fields: object) -> list[list[bytes]]:
    """Runs of several flows, which differ in their ports."""
    return [
        written(run_of(Packet(ports=(1000 + flow, 2000)).but(**fields), [size] * length, flow))
        for flow in range(count)
    ]


def interleaved(runs: Iterable[list[bytes]]) -> list[bytes]:
    return [packet for turn in zip(*runs, strict=True) for packet in turn]


def separated(merged: Iterable[bytes], frame: bool = False) -> list[list[bytes]]:
    return [split(each, frame=frame) for each in merged]


class TestSeveralFlows:
    @each_merge
    @pytest.mark.parametrize("protocol", ["tcp", "udp"])
    @pytest.mark.parametrize("version", [4, 6])
    def test_each_flow_becomes_one_super_packet(
        self, merge: Merge, version: int, protocol: str
    ) -> None:
        """In the order in which the flows first appeared."""
        runs = flows(5, version=version, protocol=protocol)
        assert separated(merge(interleaved(runs), False)) == runs

    @each_merge
    def test_frames_of_several_flows(self, merge: Merge) -> None:
        runs = flows(3, link=LINKS["vlan"])
        assert separated(merge(interleaved(runs), True), True) == runs

    @each_merge
    def test_the_same_ports_of_another_protocol_are_another_flow(self, merge: Merge) -> None:
        runs = [*flows(1, protocol="tcp"), *flows(1, protocol="udp")]
        assert separated(merge(interleaved(runs), False)) == runs

    @each_merge
    def test_the_same_ports_of_another_address_are_another_flow(self, merge: Merge) -> None:
        runs = [*flows(1), *flows(1, source="10.0.0.9"), *flows(1, version=6)]
        assert separated(merge(interleaved(runs), False)) == runs

    @each_merge
    def test_one_flow_in_two_vlans_keeps_its_order(self, merge: Merge) -> None:
        runs = [*flows(1, link=LINKS["vlan"]), *flows(1, link=LINKS["qinq"])]
        mixed = interleaved(runs)
        assert merge(mixed, True) == alone(mixed)

    @each_merge
    @pytest.mark.parametrize("count", [128, 129])
    def test_128_flows_may_be_open_and_then_the_oldest_goes(self, merge: Merge, count: int) -> None:
        runs = flows(count, 1)
        again = [bytes(Packet(sequence=101, payload=bytes(100)))]
        merged = merge([*itertools.chain(*runs), *again], False)
        assert len(merged) == (128 if count == 128 else 130)
        # With the second flow, which is still open, it is always possible.
        again = [bytes(Packet(ports=(1001, 2000), sequence=101, payload=bytes(100)))]
        assert len(merge([*itertools.chain(*runs), *again], False)) == count

    @each_merge
    def test_a_flow_that_ended_makes_room(self, merge: Merge) -> None:
        """A run that can take no more is not open."""
        runs = flows(128, 2)
        ended = written(run_of(Packet(ports=(1, 1)), [100, 50]))
        mixed = [ended[0], *ended[1:], *interleaved(runs)]
        assert separated(merge(mixed, False)) == [ended, *runs]

    @each_merge
    def test_the_places_are_those_in_the_batch(self, merge: Merge) -> None:
        places = [99]
        merge([*interleaved(flows(2, 3)), b""], False, True, places)
        assert places == [99, 0, 2, 4, 1, 3, 5, 6]

    @each_merge
    def test_many_thousand_packets(self, merge: Merge) -> None:
        runs = flows(100, 60, 10)
        assert separated(merge(interleaved(runs), False)) == runs


class TestWhatEndsARun:
    """What can't be merged must not overtake, nor be overtaken by, packets of its own flow."""

    @each_merge
    @pytest.mark.parametrize(
        "changes",
        [
            {"payload": b""},  # an acknowledgement
            {"flags": 0x11},
            {"flags": 0x12},
            {"flags": 0x14},
            {"options": b"\1\1\1\1"},
            {"window": 1},
            {"sequence": 9},
        ],
        ids=repr,
    )
    def test_a_packet_of_its_flow(self, merge: Merge, changes: dict[str, object]) -> None:
        one, two = flows(2)
        odd = bytes(run_of(Packet(), [100] * 4)[1].but(**changes))
        mixed = [one[0], two[0], odd, one[1], two[1]]
        merged = separated(merge(mixed, False))
        assert merged == [[one[0]], two[:2], [odd], [one[1]]]

    @each_merge
    @pytest.mark.parametrize(
        "odd",
        [
            pytest.param(ICMP, id="ICMP"),
            pytest.param(bytes(Packet(fragment=0x2000, payload=bytes(64))), id="first fragment"),
            pytest.param(bytes(Packet(fragment=8, payload=bytes(64))), id="later fragment"),
            pytest.param(bytes(Packet()) + b"\0\0", id="trailing bytes"),
            pytest.param(bytes(Packet(payload=bytes(64)))[:-1], id="cut"),
        ],
    )
    def test_a_packet_whose_ports_are_unknown_ends_the_runs_between_its_addresses(
        self, merge: Merge, odd: bytes
    ) -> None:
        one, two = flows(2)
        (elsewhere,) = flows(1, source="10.0.0.9")
        mixed = [one[0], two[0], elsewhere[0], odd, elsewhere[1], one[1], two[1]]
        expected = [[one[0]], [two[0]], elsewhere[:2], [odd], [one[1]], [two[1]]]
        assert separated(merge(mixed, False)) == expected

    @each_merge
    def test_fragments_of_ipv6(self, merge: Merge) -> None:
        """Their ports are in the first one only."""
        one, two = flows(2, version=6)
        fragment = Packet(version=6, payload=bytes(64))
        odd = bytes(fragment)[:6] + b"\x2c" + bytes(fragment)[7:]
        mixed = [one[0], odd, odd, two[0], one[1], two[1]]
        assert separated(merge(mixed, False)) == [[one[0]], [odd], [odd], two[:2], [one[1]]]

    @each_merge
    @pytest.mark.parametrize(
        "odd", [b"", b"\0", b"\x45", b"\x60" * 39, b"E" * 70_000, b"\x10" * 40], ids=len
    )
    def test_what_may_be_invalid_ends_every_run(self, merge: Merge, odd: bytes) -> None:
        """So if the kernel refuses it, nothing behind it was written."""
        one, two = flows(2)
        mixed = [one[0], two[0], odd, one[1], two[1]]
        assert merge(mixed, False) == alone(mixed)

    @each_merge
    @pytest.mark.parametrize("odd", [ARP, b"", ETHERNET, ETHERNET + b"\x08\0\x45"], ids=len)
    def test_a_frame_that_is_not_ip_ends_every_run(self, merge: Merge, odd: bytes) -> None:
        one, two = flows(2, link=ETHERNET)
        mixed = [one[0], two[0], odd, one[1], two[1]]
        assert merge(mixed, True) == alone(mixed)

    @each_merge
    def test_datagrams_that_are_not_merged_leave_streams_alone(self, merge: Merge) -> None:
        (stream,), (datagrams,) = flows(1), flows(1, protocol="udp")
        mixed = interleaved([datagrams, stream])
        expected = [[datagrams[0]], stream, *([each] for each in datagrams[1:])]
        assert separated(merge(mixed, False, False)) == expected


# Any batch of packets of a few flows, with everything that may come between them.


def flow_of(packet: bytes, frame: bool) -> tuple[bytes, ...]:
    """Addresses, and then protocol and ports, as far as they can be known."""
    ip = 0
    if frame:
        ip = 14
        while packet[ip - 2 : ip] in (b"\x81\0", b"\x88\xa8"):
            ip += 4
        if packet[ip - 2 : ip] not in (b"\x08\0", b"\x86\xdd"):
            return ()
    version = packet[ip] >> 4 if len(packet) > ip else 0
    addresses = packet[ip + 12 : ip + 20] if version == 4 else packet[ip + 8 : ip + 40]
    if version not in (4, 6) or len(addresses) != {4: 8, 6: 32}[version]:
        return ()
    if version == 4:
        protocol, ports = packet[ip + 9], ip + (packet[ip] & 15) * 4
        whole = not (packet[ip + 6] & 0x3F or packet[ip + 7])
    else:
        protocol, ports, whole = packet[ip + 6], ip + 40, True
        while protocol in (0, 43, 60) and len(packet) >= ports + 8:
            protocol, ports = packet[ports], ports + (packet[ports + 1] + 1) * 8
    if protocol not in (6, 17) or not whole:
        return (addresses,)
    return (addresses, bytes([protocol]) + packet[ports : ports + 4])


def may_be_one_flow(one: tuple[bytes, ...], other: tuple[bytes, ...]) -> bool:
    return all(a == b for a, b in zip(one, other, strict=False))


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[bytes], bool]:
    link = LINKS[draw(st.sampled_from(list(LINKS)))]
    choose = random.Random(draw(st.integers(0, 2**32)))
    streams = [
        Packet(
            version=choose.choice((4, 4, 6)),
            protocol=choose.choice(("tcp", "tcp", "udp")),
            link=link,
            ports=(choose.randrange(3), 2000),
            source=choose.choice(("", "", "10.0.0.9")),
            fragment=choose.choice((0x4000, 0x4000, 0)),
            sequence=choose.choice((1, 0xFFFFFF00)),
        )
        for _ in range(draw(st.integers(1, 6)))
    ]
    streams = [each.but(source="") if each.version == 6 else each for each in streams]
    return list(_packets(choose, streams, draw(st.integers(1, 60)))), bool(link)


def _packets(choose: random.Random, streams: list[Packet], count: int) -> Iterator[bytes]:
    for _ in range(count):
        which = choose.randrange(len(streams))
        now = streams[which].but(payload=choose.randbytes(choose.choice((100, 100, 100, 30, 0))))
        streams[which] = now.but(
            sequence=(now.sequence + len(now.payload)) & 0xFFFFFFFF,
            identity=(now.identity + 1) & 0xFFFF,
        )
        odd = choose.randrange(30)
        if odd == 0:
            now = now.but(flags=choose.choice((0x11, 0x18, 0x02, 0x14)))
        elif odd == 1 and now.version == 4:
            now = now.but(fragment=choose.choice((0x2000, 5)))
        elif odd == 2:
            now = now.but(options=b"\x06\0\1\4\0\0\0\0" if now.version == 6 else b"\1\1\1\1")
        packet = bytes(now)
        if odd == 3:
            packet = packet[: choose.randrange(len(packet))]
        elif odd == 4:
            at = choose.randrange(min(len(packet), 80))
            packet = packet[:at] + choose.randbytes(1) + packet[at + 1 :]
        yield packet


@each_merge
@settings(max_examples=300)
@given(batches())
def test_every_flow_keeps_its_order(merge: Merge, batch: tuple[list[bytes], bool]) -> None:
    packets, frame = batch
    places: list[int] = []
    merged = merge(packets, frame, True, places)
    assert sorted(places) == list(range(len(packets)))
    again = [part for whole in merged for part in split(whole, frame=frame)]
    # Byte for byte, except the identification of what must not be fragmented: these had none that
    # matters, but here they count up, so they come back unless a run has a gap.
    assert [_without_identity(each, frame) for each in again] == [
        _without_identity(packets[place], frame) for place in places
    ]
    # No packet overtakes another one that may be of the same flow.
    for one, other in itertools.combinations(range(len(places)), 2):
        if places[one] > places[other]:
            ours, theirs = flow_of(again[one], frame), flow_of(again[other], frame)
            assert not may_be_one_flow(ours, theirs)


def _without_identity(packet: bytes, frame: bool) -> bytes:
    ip = 0
    if frame:
        ip = 14
        while packet[ip - 2 : ip] in (b"\x81\0", b"\x88\xa8"):
            ip += 4
    if len(packet) < ip + 20 or packet[ip] >> 4 != 4:
        return packet
    return packet[: ip + 4] + packet[ip + 6 : ip + 10] + packet[ip + 12 :]


@pytest.mark.skipif(_speedups is None, reason="missing: the C module")
@settings(max_examples=500)
@given(batches(), st.booleans())
def test_c_and_python_merge_alike(batch: tuple[list[bytes], bool], udp: bool) -> None:
    packets, frame = batch
    ours: list[int] = []
    theirs: list[int] = []
    assert _speedups.merge(packets, frame, udp, ours) == gso.merge(packets, frame, udp, theirs)
    assert ours == theirs


# Writing


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        yield ours, theirs


Pair = tuple[socket.socket, socket.socket]


class TestWriting:
    @each_write_merged
    def test_what_is_left_when_it_is_full(
        self, pair: Pair, write_merged: Callable[..., list[int]]
    ) -> None:
        """The packets of the runs that were not written, in the order of the batch."""
        runs = flows(40, 8, 1000)
        packets = interleaved(runs)
        left = write_merged(pair[1].fileno(), packets, False)
        arrived = native.read_many(pair[0].fileno(), abi.READ_SIZE, 1000)
        assert 0 < len(arrived) < 40
        assert separated(arrived) == runs[: len(arrived)]
        assert [packets[place] for place in left] == interleaved(runs[len(arrived) :])
        assert list(left) == sorted(left)

    @each_write_merged
    def test_an_object_that_is_no_packet(
        self, pair: Pair, write_merged: Callable[..., list[int]]
    ) -> None:
        """Everything before it is written, and nothing behind it."""
        one, two = flows(2)
        packets = [one[0], two[0], one[1], 5, one[2], two[1]]
        assert list(write_merged(pair[1].fileno(), packets, False)) == [3, 4, 5]
        arrived = native.read_many(pair[0].fileno(), abi.READ_SIZE, 1000)
        assert separated(arrived) == [one[:2], two[:1]]

    @each_write_merged
    def test_more_than_fit_on_a_small_stack(
        self, pair: Pair, write_merged: Callable[..., list[int]]
    ) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            assert list(write_merged(null, interleaved(flows(200, 100, 1)), False)) == []
        finally:
            os.close(null)
