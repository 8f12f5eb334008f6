"""The requests of examples/virtual_host.py, and the frames that it accepts as answers."""

import argparse
from collections.abc import Callable
from ipaddress import ip_address, ip_interface
from typing import Any

import dpkt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiotun import decode_frame, reply

from .integration.programs import example_module

Neighbour = example_module("_neighbours").Neighbour
Host = example_module("virtual_host").Host

OURS, THEIRS, OTHER = (bytes.fromhex(f"0200000000{number}") for number in ("01", "02", "03"))
FOUR = Neighbour(OURS, ip_address("10.84.0.1"), ip_address("10.84.0.2"), 0x1234)
SIX = Neighbour(OURS, ip_address("fd84::1"), ip_address("fd84::2"), 0x1234)
BOTH = pytest.mark.parametrize("host", [FOUR, SIX], ids=["IPv4", "IPv6"])


def told(host: Any) -> bytes:
    """The neighbor's answer to a request for its MAC."""
    answer = (reply.arp if host is FOUR else reply.neighbour_advertisement)(
        host.find(), THEIRS, {host.target}
    )
    assert answer is not None
    return answer


def ponged(host: Any, number: int = 7) -> bytes:
    """The neighbor's answer to a ping."""
    frame = host.ping(THEIRS, number)
    packet = (reply.icmp_echo if host is FOUR else reply.icmpv6_echo)(frame[14:])
    assert packet is not None
    return bytes(OURS + THEIRS + frame[12:14] + packet)


@BOTH
def test_the_asked_neighbor_is_found(host: Any) -> None:
    assert host.found(told(host)) == THEIRS
    assert host.found(told(host) + bytes(18)) == THEIRS  # padding
    assert host.found(OTHER + told(host)[6:]) is None
    assert host.found(host.find()) is None


@BOTH
def test_another_is_not_taken_for_it(host: Any) -> None:
    others = {FOUR: "10.84.0.3", SIX: "fd84::3"}
    other = Neighbour(OURS, host.source, ip_address(others[host]), 0x1234)
    assert other.found(told(host)) is None
    assert other.reply(ponged(host)) is None
    stranger = Neighbour(OURS, host.source, host.target, 0x1235)
    assert stranger.reply(ponged(host)) is None


def test_arp_and_neighbor_requests_are_valid() -> None:
    """dpkt decodes them."""
    frame = decode_frame(FOUR.find())
    assert (frame.src, frame.dst) == (OURS, b"\xff" * 6)
    assert isinstance(frame.data, dpkt.arp.ARP)
    assert (frame.data.op, frame.data.sha, frame.data.tha) == (1, OURS, bytes(6))
    assert (frame.data.spa, frame.data.tpa) == (FOUR.source.packed, FOUR.target.packed)
    frame = decode_frame(SIX.find())
    assert (frame.src, frame.dst) == (OURS, bytes.fromhex("3333ff000002"))
    assert (frame.data.src, frame.data.hlim) == (SIX.source.packed, 255)
    assert frame.data.dst == ip_address("ff02::1:ff00:2").packed
    assert frame.data.data.type == 135


@BOTH
@pytest.mark.parametrize("number", [0, 1, 255, 65535])
def test_echo_requests_are_valid_and_replies_are_read(host: Any, number: int) -> None:
    """dpkt decodes the requests; padded replies are read, too."""
    frame = decode_frame(host.ping(THEIRS, number))
    assert (frame.src, frame.dst) == (OURS, THEIRS)
    assert (frame.data.src, frame.data.dst) == (host.source.packed, host.target.packed)
    assert bytes(frame.data.data)[6:8] == number.to_bytes(2, "big")
    for answer in (ponged(host, number), ponged(host, number) + bytes(9)):
        found = host.reply(answer)
        assert (found.number, found.bytes, found.ttl) == (number, 64, 64)


@BOTH
def test_each_bit_of_an_answer_counts(host: Any) -> None:
    """Except bits that no checksum covers and that have no meaning here."""
    answer = ponged(host)
    # The source's MAC; IPv6's class, flow label and hop limit.
    free = {*range(6, 12), *(() if host is FOUR else (14, 15, 16, 17, 21))}
    for at in set(range(len(answer))) - free:
        damaged = bytearray(answer)
        damaged[at] ^= 0x11
        assert host.reply(bytes(damaged)) is None, at


@pytest.mark.parametrize(
    "damage",
    [
        lambda frame: frame[:21] + b"\x40" + frame[22:],  # forwarded by a router
        lambda frame: frame[:57] + b"\x00" + frame[58:],
        lambda frame: frame[:85],
    ],
)
def test_advertisements_that_are_none(damage: Callable[[bytes], bytes]) -> None:
    assert SIX.found(damage(told(SIX))) is None


@given(st.integers(0, 200), st.dictionaries(st.integers(0, 110), st.integers(0, 255), max_size=4))
def test_damaged_frames_are_not_mistaken_for_answers(length: int, changes: dict[int, int]) -> None:
    """No length raises, and no damaged frame is accepted with wrong contents."""
    for host in (FOUR, SIX):
        for frame in (told(host), ponged(host)):
            changed = bytearray(frame)
            for at, value in changes.items():
                if at < len(changed):
                    changed[at] = value
            mac = host.found(bytes(changed[:length]))
            assert mac is None or len(mac) == 6
            found = host.reply(bytes(changed[:length]))
            assert found is None or (found.number, found.bytes) == (7, 64)


@BOTH
@pytest.mark.parametrize("tag", [b"\x81\0\0\0", b"\x81\0\xe0\0", b"\x88\xa8\x60\0"])
def test_a_priority_tagged_frame_is_no_other_network(host: Any, tag: bytes) -> None:
    """VLAN 0: the host answers with the tag, and accepts answers that have one."""

    def tagged(frame: bytes) -> bytes:
        return frame[:12] + tag + frame[12:]

    other = Host(argparse.Namespace(mac=THEIRS, address=[ip_interface(host.target)]))
    for question in (host.find(), host.ping(THEIRS, 7)):
        answer = other.answer(question)
        assert answer is not None
        assert other.answer(tagged(question)) == tagged(answer)
        assert other.answer(question[:12] + b"\x81\0\0\5" + question[12:]) is None
    assert host.found(tagged(told(host))) == THEIRS
    assert host.reply(tagged(ponged(host))) == host.reply(ponged(host)) is not None
