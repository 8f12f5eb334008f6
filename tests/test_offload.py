"""The Internet checksum, compared with a simple algorithm, and the virtio-net header."""

import array
import struct
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiotun.offload import GsoType, VnetHeader, checksum

from . import helpers

U8, U16 = st.integers(0, 0xFF), st.integers(0, 0xFFFF)
HEADERS = st.builds(VnetHeader, U8, U8, U16, U16, U16, U16, st.none() | U16)


class TestChecksum:
    @pytest.mark.parametrize(
        ("data", "expected"),
        [
            # RFC 1071, section 3: the sum of these is 0xddf2.
            ("0001f203f4f5f6f7", 0x220D),
            ("", 0xFFFF),
            ("00", 0xFFFF),
            ("0000", 0xFFFF),
            ("00" * 1501, 0xFFFF),
            # A sum of 0xffff is the other zero: something was added.
            ("ffff", 0),
            ("ffff" * 3, 0),
            ("0001fffe", 0),
            ("01", 0xFEFF),
            ("000001", 0xFEFF),
            ("ff", 0x00FF),
        ],
    )
    def test_checksum_of_known_data(self, data: str, expected: int) -> None:
        assert checksum(bytes.fromhex(data)) == expected
        assert helpers.checksum(bytes.fromhex(data)) == expected

    @given(st.binary(max_size=200))
    def test_checksum_agrees_with_the_plain_algorithm(self, data: bytes) -> None:
        assert checksum(data) == helpers.checksum(data)

    @given(st.binary(max_size=40), st.integers(1, 70_000), st.booleans())
    def test_checksum_of_long_data_agrees_with_the_plain_algorithm(
        self, pattern: bytes, length: int, odd: bool
    ) -> None:
        data = (pattern * (length // max(1, len(pattern)) + 1))[:length] + b"\1" * odd
        assert checksum(data) == helpers.checksum(data)

    @given(st.binary(max_size=60), st.binary(max_size=60))
    def test_initial_is_the_sum_of_what_stands_before(self, before: bytes, data: bytes) -> None:
        before += bytes(len(before) % 2)
        # The plain sum of 16-bit words, not folded, as a caller sums a pseudo-header.
        initial = sum(struct.unpack(f"!{len(before) // 2}H", before))
        assert checksum(data, initial) == helpers.checksum(before + data)

    @pytest.mark.parametrize(
        ("initial", "expected"), [(0, 0xFFFF), (1, 0xFFFE), (0xFFFF, 0), (0x1_FFFE, 0)]
    )
    def test_checksum_of_no_data_is_that_of_the_initial_sum(
        self, initial: int, expected: int
    ) -> None:
        assert checksum(b"", initial) == expected
        assert checksum(bytes(6), initial) == expected

    @given(st.binary(max_size=100))
    def test_data_with_its_checksum_in_it_gives_0(self, data: bytes) -> None:
        data += bytes(len(data) % 2)
        assert checksum(data + checksum(data).to_bytes(2, "big")) == 0

    @pytest.mark.parametrize("data", [b"", b"\x12", b"\x12\x34\x56", bytes(range(100))])
    def test_checksum_takes_any_bytes_like_object(self, data: bytes) -> None:
        expected = checksum(data)
        buffer = bytearray(data)
        assert checksum(buffer) == checksum(memoryview(buffer)) == expected
        assert buffer == data
        inside = memoryview(b"?" + data + b"??")[1:-2]
        assert checksum(inside) == expected

    def test_wider_items_are_taken_as_bytes(self) -> None:
        items = array.array("H", [1, 2, 3])
        assert checksum(items) == checksum(memoryview(items)) == checksum(items.tobytes())


class TestVnetHeader:
    def test_pack_uses_the_machines_byte_order(self) -> None:
        header = VnetHeader(1, GsoType.TCPV4, 52, 1448, 20, 16)
        words = [each.to_bytes(2, sys.byteorder) for each in (52, 1448, 20, 16)]
        assert header.pack() == b"\x01\x01" + b"".join(words)
        assert VnetHeader.SIZE == 10
        longer = header._replace(num_buffers=3)
        assert longer.pack() == header.pack() + (3).to_bytes(2, sys.byteorder)

    def test_a_header_is_all_zero_by_default(self) -> None:
        assert VnetHeader().pack() == bytes(10)
        assert VnetHeader.unpack(bytes(10)) == VnetHeader()
        assert VnetHeader.unpack(bytes(10)).num_buffers is None
        assert VnetHeader.unpack(bytes(12), 12) == VnetHeader(num_buffers=0)
        assert VnetHeader(num_buffers=0).pack() == bytes(12)

    @given(HEADERS, st.binary(max_size=20))
    def test_unpack_returns_what_pack_wrote(self, header: VnetHeader, packet: bytes) -> None:
        data = header.pack()
        assert len(data) == (VnetHeader.SIZE if header.num_buffers is None else 12)
        for buffer in (data + packet, bytearray(data + packet), memoryview(data + packet)):
            found = VnetHeader.unpack(buffer, len(data))
            assert isinstance(found, VnetHeader)
            assert found == header

    @pytest.mark.parametrize("length", range(10))
    def test_unpack_refuses_less_than_10_bytes(self, length: int) -> None:
        with pytest.raises(ValueError, match="10 bytes"):
            VnetHeader.unpack(bytes(length))
        for more in (length, 10, 11):
            with pytest.raises(ValueError, match="12 bytes"):
                VnetHeader.unpack(bytes(more), 12)

    @pytest.mark.parametrize("size", [0, 9, 11, 13, 24, -12, None, "10"])
    def test_no_such_size(self, size: Any) -> None:
        with pytest.raises(ValueError, match="10 or 12 bytes, not"):
            VnetHeader.unpack(bytes(30), size)

    @pytest.mark.parametrize(
        ("field", "most"),
        [
            ("flags", 0xFF),
            ("gso_type", 0xFF),
            ("hdr_len", 0xFFFF),
            ("gso_size", 0xFFFF),
            ("csum_start", 0xFFFF),
            ("csum_offset", 0xFFFF),
        ],
    )
    def test_a_field_that_does_not_fit(self, field: str, most: int) -> None:
        assert getattr(VnetHeader.unpack(VnetHeader(**{field: most}).pack()), field) == most
        for value in (-1, most + 1):
            with pytest.raises(ValueError, match=field):
                VnetHeader(**{field: value}).pack()

    def test_a_number_of_buffers_that_does_not_fit(self) -> None:
        for value in (-1, 0x10000):
            with pytest.raises(ValueError, match=f"num_buffers={value}"):
                VnetHeader(num_buffers=value).pack()

    @pytest.mark.parametrize("name", ["flags", "csum_offset", "another"])
    def test_a_header_cannot_be_changed(self, name: str) -> None:
        header = VnetHeader()
        with pytest.raises(AttributeError):
            setattr(header, name, 1)

    def test_gso_types_are_the_kernels(self) -> None:
        assert {each.name: each.value for each in GsoType} == {
            "NONE": 0,
            "TCPV4": 1,
            "UDP": 3,
            "TCPV6": 4,
            "UDP_L4": 5,
            "ECN": 0x80,
        }
