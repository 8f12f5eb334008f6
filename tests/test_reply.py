"""The answers to pings: right where one is due, None for everything else, and never an error."""

import struct
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aiotun.reply import icmp_echo, icmpv6_echo

from .helpers import checksum, make_icmp_echo

four, six = ("10.0.0.1", "10.0.0.2"), ("fd00::1", "fd00::2")


def parts6(packet: bytes) -> bytes:
    """What an ICMPv6 checksum covers."""
    return packet[8:40] + struct.pack("!II", len(packet) - 40, 58) + packet[40:]


@given(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF), st.binary(max_size=100), st.integers(1, 255))
# The checksum in the request is the last before it wraps round, and the first after.
@example(0xF7FF, 0, b"", 64)
@example(0xF800, 0, b"", 1)
@example(0, 0, b"", 64)
@example(0xFFFF, 0, b"", 64)
def test_icmp(ident: int, seq: int, payload: bytes, ttl: int) -> None:
    request = make_icmp_echo(*four, ident, seq, payload)
    head = request[:8] + bytes([ttl]) + request[9:10] + b"\0\0" + request[12:20]
    request = head[:10] + struct.pack("!H", checksum(head)) + head[12:] + request[20:]
    answer = icmp_echo(request)
    assert answer is not None
    assert (answer[12:16], answer[16:20]) == (request[16:20], request[12:16])
    assert (answer[8], answer[20], answer[21]) == (64, 0, 0)
    assert answer[24:] == request[24:]
    assert checksum(answer[:20]) == 0
    assert checksum(answer[20:]) == 0
    assert len(answer) == len(request)


@given(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF), st.binary(max_size=100))
@example(0, 0, b"")
def test_icmpv6(ident: int, seq: int, payload: bytes) -> None:
    request = make_icmp_echo(*six, ident, seq, payload)
    answer = icmpv6_echo(request)
    assert answer is not None
    assert (answer[8:24], answer[24:40]) == (request[24:40], request[8:24])
    assert (answer[7], answer[40], answer[41]) == (64, 129, 0)
    assert answer[44:] == request[44:]
    assert checksum(parts6(answer)) == 0


@given(st.integers(0, 0xFFFF))
def test_the_sum_is_updated_whatever_it_is(value: int) -> None:
    """What the update gives is what a new sum over the answer would be off by: nothing."""
    number = struct.pack("!H", value)
    damaged = changed(make_icmp_echo(*four), 22, number)
    answer = icmp_echo(damaged)
    assert answer is not None
    assert checksum(answer[20:]) % 0xFFFF == checksum(damaged[20:]) % 0xFFFF
    damaged = changed(make_icmp_echo(*six), 42, number)
    answer = icmpv6_echo(damaged)
    assert answer is not None
    assert checksum(parts6(answer)) % 0xFFFF == checksum(parts6(damaged)) % 0xFFFF


@pytest.mark.parametrize("form", [bytearray, memoryview])
def test_any_bytes_and_none_changed(form: Any) -> None:
    for function, addresses in ((icmp_echo, four), (icmpv6_echo, six)):
        request = make_icmp_echo(*addresses)
        given_ = form(bytearray(request))
        assert function(given_) == function(request)
        assert bytes(given_) == request


def test_bytes_behind_the_end_are_left_out() -> None:
    for function, addresses in ((icmp_echo, four), (icmpv6_echo, six)):
        request = make_icmp_echo(*addresses)
        assert function(request + b"padding") == function(request)


def changed(request: bytes, at: int, value: bytes) -> bytes:
    return request[:at] + value + request[at + len(value) :]


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (0, b"\x55"),  # version 5
        (0, b"\x46"),  # options
        (2, b"\0\x1b"),  # shorter than its headers
        (2, b"\xff\xff"),  # longer than what came
        (6, b"\x20\0"),  # more fragments
        (6, b"\0\1"),  # a later fragment
        (9, b"\x11"),  # UDP
        (12, b"\0\0\0\0"),  # from nowhere
        (12, b"\xe0\0\0\1"),  # from a group
        (16, b"\xe0\0\0\1"),  # to a group
        (16, b"\xff\xff\xff\xff"),  # to everybody
        (20, b"\0"),  # an answer
        (20, b"\x0d"),  # a timestamp request
        (21, b"\1"),  # a code that there is not
    ],
)
def test_no_answer_to(at: int, value: bytes) -> None:
    assert icmp_echo(changed(make_icmp_echo(*four), at, value)) is None


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (0, b"\x40"),  # version 4
        (4, b"\0\7"),  # shorter than its headers
        (4, b"\xff\xff"),  # longer than what came
        (6, b"\x2c"),  # a fragment
        (6, b"\0"),  # a hop-by-hop header
        (8, bytes(16)),  # from nowhere
        (8, b"\xff\x02"),  # from a group
        (24, b"\xff\x02"),  # to a group
        (40, b"\x81"),  # an answer
        (40, b"\x87"),  # a neighbour solicitation
        (41, b"\1"),  # a code that there is not
    ],
)
def test_no_answer_of_ipv6_to(at: int, value: bytes) -> None:
    assert icmpv6_echo(changed(make_icmp_echo(*six), at, value)) is None


@given(st.binary(max_size=120))
@example(b"")
def test_strangers_bytes(data: bytes) -> None:
    """Whatever comes, there is an answer or None."""
    for function in (icmp_echo, icmpv6_echo):
        answer = function(data)
        assert answer is None or len(answer) <= len(data)


@given(st.data())
def test_strangers_changes(data: st.DataObject) -> None:
    for function, addresses in ((icmp_echo, four), (icmpv6_echo, six)):
        request = make_icmp_echo(*addresses)
        at = data.draw(st.integers(0, len(request) - 1))
        request = changed(request, at, data.draw(st.binary(min_size=1, max_size=1)))
        request = request[: data.draw(st.integers(0, len(request)))]
        answer = function(request)
        assert answer is None or len(answer) <= len(request)
