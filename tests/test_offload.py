"""The Internet checksum and the virtio-net header."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiotun.offload import GsoType, VnetHeader, checksum

from . import helpers


@given(st.binary(max_size=200))
def test_checksum_is_that_of_rfc_1071(data: bytes) -> None:
    assert checksum(data) == helpers.checksum(data)
    assert checksum(bytearray(data)) == checksum(memoryview(data)) == checksum(data)


@given(st.binary(max_size=64), st.binary(max_size=64))
def test_checksum_goes_on_from_a_sum(first: bytes, second: bytes) -> None:
    """`initial` is a sum as it is, not yet complemented."""
    if len(first) % 2:
        first += b"\0"
    initial = sum(struct.unpack(f"!{len(first) // 2}H", first))
    assert checksum(second, initial) == helpers.checksum(first + second)


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"", 0xFFFF),
        (b"\0\0", 0xFFFF),
        (b"\xff\xff", 0),  # not 0xffff: only a sum of zeroes is zero
        (b"\xff\xfe\0\1", 0),
        (b"\0\1\xf2\3\xf4\xf5\xf6\xf7", 0x220D),  # the example of RFC 1071, section 3
        (b"\1", 0xFEFF),
    ],
)
def test_checksum_of_known_data(data: bytes, value: int) -> None:
    assert checksum(data) == value


@given(st.binary(min_size=2, max_size=100))
def test_data_with_its_checksum_in_it_gives_zero(data: bytes) -> None:
    data = b"\0\0" + data
    assert checksum(struct.pack("!H", checksum(data)) + data[2:]) == 0


byte, word = st.integers(0, 255), st.integers(0, 0xFFFF)


@given(byte, byte, word, word, word, word)
def test_header_there_and_back(a: int, b: int, c: int, d: int, e: int, f: int) -> None:
    header = VnetHeader(a, b, c, d, e, f)
    assert header.pack() == struct.pack("=BBHHHH", a, b, c, d, e, f)
    assert VnetHeader.unpack(header.pack() + b"and a packet") == header
    assert len(header.pack()) == VnetHeader.SIZE == 10


def test_header_by_name() -> None:
    header = VnetHeader(flags=1, gso_type=GsoType.TCPV4, gso_size=1448)
    assert (header.flags, header.gso_type, header.hdr_len) == (1, 1, 0)
    assert (header.gso_size, header.csum_start, header.csum_offset) == (1448, 0, 0)


def test_wrong_headers() -> None:
    with pytest.raises(ValueError, match="10 bytes"):
        VnetHeader.unpack(bytes(9))
    with pytest.raises(ValueError, match="does not fit"):
        VnetHeader(gso_size=65536).pack()
    with pytest.raises(ValueError, match="does not fit"):
        VnetHeader(flags=-1).pack()
