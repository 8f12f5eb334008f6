"""Decoding of each kind of bytes, and the error without dpkt."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dpkt
import pytest

import aiotun
from aiotun import decode_frame, decode_packet

from .helpers import make_icmp_echo

FOUR, SIX = make_icmp_echo("10.0.0.1", "10.0.0.2"), make_icmp_echo("fd00::1", "fd00::2")
MACS = bytes(12)


def test_decode_returns_dpkts_objects_by_version() -> None:
    four, six = decode_packet(FOUR), decode_packet(SIX)
    assert isinstance(four, dpkt.ip.IP)
    assert isinstance(six, dpkt.ip6.IP6)
    assert (four.icmp.data.data, six.icmp6.data.data) == (b"ping", b"ping")
    frame = decode_frame(MACS + b"\x86\xdd" + SIX)
    assert isinstance(frame, dpkt.ethernet.Ethernet)
    assert isinstance(frame.data, dpkt.ip6.IP6)


@pytest.mark.parametrize(
    ("decode", "data"),
    [
        (decode_packet, FOUR),
        (decode_packet, SIX),
        (decode_frame, MACS + b"\x08\x00" + FOUR),
        (decode_frame, MACS + b"\0\x0b\xaa\xaa\3\0\0\0\x12\x34xyz"),  # LLC
    ],
)
def test_decoded_objects_copy_any_bytes_like_argument(
    decode: Callable[[Any], Any], data: bytes
) -> None:
    """No part of the result is a view of the caller's buffer."""
    expected = decode(data)
    buffer = bytearray(data)
    for argument in (buffer, memoryview(buffer), memoryview(b"?" + data)[1:]):
        decoded = decode(argument)
        while isinstance(decoded, dpkt.Packet):
            decoded = decoded.data
        assert type(decoded) is bytes
    del argument, decoded
    buffer[:] = b""  # fails if a view still exists
    assert bytes(expected)[: len(data)] == data


@pytest.mark.parametrize(
    "call", ["decode_packet(b'E')", "decode_frame(b'E')", "encode(None)"], ids=lambda call: call[:6]
)
def test_without_dpkt_the_error_names_the_extra(call: str, tmp_path: Path) -> None:
    (tmp_path / "dpkt.py").write_text("raise ImportError('nothing here')")
    source = str(Path(aiotun.__file__).parent.parent)
    code = f"import sys; sys.path[:0] = {[str(tmp_path), source]!r}; import aiotun; aiotun.{call}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ImportError: this needs dpkt, which is not installed: pip install 'aiotun[dpkt]'" in (
        done.stderr
    )
