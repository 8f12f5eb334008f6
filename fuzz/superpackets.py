"""Super-packets: the virtio-net header, and split and merge, in C and in Python.

AIOTUN_FUZZ_MODULE=PATH in the environment selects another build of the C module: the one with
sanitizers. Each input is in a buffer of exactly its length, so that a sanitizer sees a read of one
byte too many.
"""

import ctypes
import importlib.util
import io
import os
import select
import socket
from typing import Any

from aiotun import IPHeader
from aiotun._packets import gso, native, runs
from aiotun._packets.flow import flow_hash
from aiotun.offload import VnetHeader
from tests.test_gso import LINKS, Packet, run_of

from ._target import Choices, Target

__all__ = ["MODULE", "TARGETS", "damaged", "exact"]

_TCP, _SYN_OR_RST = 6, 0x06

_KINDS = [0, 1, 3, 4, 5, 0x81, 0x84, 0x85, 0x61]


def _load() -> Any:
    path = os.environ.get("AIOTUN_FUZZ_MODULE")
    if path is None:
        try:
            return importlib.import_module("aiotun._packets._speedups")
        except ImportError:  # no compiler here: the twin is checked by itself
            return gso
    spec = importlib.util.spec_from_file_location("aiotun._packets._speedups", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MODULE = _load()
# The functions of the C module that read from a device and write to it use this pair instead.
NEAR, FAR = (each.detach() for each in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
os.set_blocking(NEAR, False)


def vnet_header(data: bytes) -> None:
    for size in (VnetHeader.SIZE, 12):
        try:
            head = VnetHeader.unpack(data, size)
        except ValueError:
            assert len(data) < size
            continue
        assert head.pack() == data[:size]


def exact(data: bytes) -> memoryview:
    """Return the bytes in a buffer of exactly their length."""
    buffer = (ctypes.c_char * len(data)).from_buffer_copy(data) if data else b""
    return memoryview(buffer).cast("B")


def _split(data: bytes, frame: bool) -> list[bytes] | None:
    """Split with the C module and its Python twin, which must agree, also in their errors."""

    def attempt(function: Any, argument: Any) -> list[bytes] | str:
        try:
            parts: list[bytes] = function(argument, frame)
        except ValueError as error:
            return str(error)
        return parts

    ours, theirs = attempt(MODULE.split, exact(data)), attempt(gso.split, data)
    assert ours == theirs, (ours, theirs)
    if data and MODULE is not gso:
        os.write(FAR, data)
        read = MODULE.read_split(NEAR, frame, 1)
        assert read == (([], 1) if isinstance(ours, str) else (ours, 0))
        # The same with a 12-byte header, whatever its last two bytes are.
        os.write(FAR, data[:10] + b"\xff\xff" + data[10:])
        assert MODULE.read_split(NEAR, frame, 1, 12) == read
    return None if isinstance(ours, str) else ours


def splitting(data: bytes) -> None:
    """The first byte says whether it is a packet or a frame; the rest is a super-packet."""
    if not data:
        return
    frame, data = bool(data[0] & 1), data[1:]
    parts = _split(data, frame)
    if parts is None:
        return
    head, body = VnetHeader.unpack(data), data[VnetHeader.SIZE :]
    if head.gso_type & ~0x80 == 0:
        assert [len(part) for part in parts] == [len(body)]
        return
    # The bounds are repeated here, so that a mistake in the library alone can't remove them.
    assert sum(map(len, parts)) <= max(65_535, 16 * len(body))
    # Only headers are added, and no segment is larger than the header says.
    headers = len(parts[0]) - min(head.gso_size, len(parts[0]))
    assert all(len(part) <= len(body) for part in parts)
    assert all(len(part) == len(parts[0]) for part in parts[:-1])
    assert len(parts[-1]) <= len(parts[0])
    assert sum(map(len, parts)) <= len(body) + len(parts) * max(headers, 0) + len(body)


def merging(data: bytes) -> None:
    """Merge interleaved runs of packets, some of them damaged, and split the result again."""
    choices = Choices(data)
    frame, batch = bool(choices.getrandbits(1)), _interleaved(choices)
    places: list[int] = []
    merged = MODULE.merge([exact(packet) for packet in batch], frame, True, places)
    order: list[int] = []
    assert merged == gso.merge(batch, frame, True, order)
    assert places == order
    assert sorted(places) == list(range(len(batch)))
    if MODULE is not gso:
        exactly = [exact(packet) for packet in batch]
        assert MODULE.write_merged(FAR, exactly, frame) == []
        assert native._read_many(NEAR, 1 << 17, 99) == merged
        assert MODULE.write_merged(FAR, exactly, frame, 12) == []
        longer = [each[:10] + bytes(2) + each[10:] for each in merged]
        assert native._read_many(NEAR, 1 << 17, 99) == longer
    assert len(merged) <= len(batch)
    again = [part for whole in merged for part in _split(whole, frame) or []]
    assert [_comparable(part, frame) for part in again] == [
        _comparable(batch[place], frame) for place in places
    ]
    _in_order(batch, places, frame)
    for whole in merged:
        _split(damaged(choices, whole), frame)
    initial = choices.choice((0, 0xFFFF, 2**64 - 1, 2**70))
    for packet in batch:
        assert MODULE.checksum(exact(packet), initial) == gso.checksum(packet, initial)


def _no_module() -> str | None:
    return "missing: the C module was not built" if MODULE is gso else None


def running(data: bytes) -> None:
    """Read super-packets and single packets into a buffer, and write them from there."""
    choices = Choices(data)
    frame, header = bool(choices.getrandbits(1)), choices.choice((10, 12, 0))
    batch = _packets(choices)
    if header and choices.getrandbits(1):
        batch = [each[10:] for each in gso.merge(batch, frame)]
        whole = gso.merge(_packets(choices), frame)
        reads = [damaged(choices, each) for each in whole] + [bytes(10) + each for each in batch]
    else:
        reads = [damaged(choices, bytes(10 if header else 0) + each) for each in batch]
    reads = [each[:10] + bytes(header - 10) + each[10:] if header else each for each in reads]
    layout = runs.Layout(
        before=choices.choice((0, 4, 16)),
        after=choices.choice((0, 16)),
        align=choices.choice((1, 4, 16)),
        most=choices.choice((0, 60, 1500)),
        limit=choices.choice((1, 3, 45)),
    )
    # A single packet always fits.
    room = layout.before + max(map(len, reads)) + layout.align + layout.after
    room += choices.choice((0, 0, 100, 1000))
    kept: bytes | None = None
    while reads or kept is not None:
        results = []
        for function in (MODULE.read_run, native._read_run):
            for each in reads:
                os.write(FAR, each)
            buffer = memoryview((ctypes.c_char * room)()).cast("B")
            first: Any = kept
            if kept is not None and function is not native._read_run:
                first = exact(kept)
            try:
                taken = function(NEAR, first, buffer, layout, frame, header)
            except (ValueError, OSError) as error:
                taken = type(error)
                buffer[:] = bytes(room)  # what is in it then is not promised
            left = native._read_many(NEAR, 1 << 17, 99) if reads and _waits() else []
            results.append((taken, buffer.tobytes(), left))
        assert results[0] == results[1], results
        taken, filled, reads = results[0]
        if isinstance(taken, type):
            kept = None
            continue
        count, size, last, stride, kept, _ = taken
        if not count:
            kept = None
            continue
        lengths = [size] * (count - 1) + [last]
        written = []
        for function in (MODULE.write_run, native._write_run):
            unwritten = function(FAR, exact(filled), layout.before, stride, lengths, frame, header)
            done = len(unwritten) < count
            written.append(([*unwritten], native._read_many(NEAR, 1 << 17, 99) if done else []))
        assert written[0] == written[1], written


def sending(data: bytes) -> None:
    """Send datagrams as one run, through a socket that takes any piece and gives it back."""
    choices = Choices(data)
    size, count = choices.choice((0, 1, 9, 700, 1452, 40_000)), choices.choice((2, 3, 45, 64, 65))
    datagrams: list[Any] = [bytes([each]) * size for each in range(count)]
    for _ in range(choices.choice((0, 1, 1, 2))):
        place = choices.choice((0, count // 2, count - 1))
        others = (bytes(max(size - 1, 0)), bytes(size + 1), b"", bytearray(size), None)
        datagrams[place] = choices.choice(others)
    largest = choices.choice((65_507, size, max(size - 1, 0), 0))
    lengths = [len(each) if type(each) is bytes else 0 for each in datagrams]
    fits = count <= 64 and sum(lengths) <= 65_487 and max(lengths) <= largest
    fits = fits and min(lengths) > 0 and lengths[-1] <= lengths[0] == min(lengths[:-1])
    fits = fits and max(lengths) == lengths[0]
    assert MODULE.send_run(FAR, datagrams, None, largest) == (count if fits else 0)
    sent = native._read_many(NEAR, 1 << 17, 2) if fits else []
    assert sent == ([b"".join(datagrams)] if fits else [])


def _waits() -> bool:
    return bool(select.select([NEAR], [], [], 0)[0])


def _packets(choices: Choices) -> list[bytes]:
    first = Packet(
        version=choices.choice((4, 6)),
        protocol=choices.choice(("tcp", "udp")),
        link=choices.choice(list(LINKS.values())),
        fragment=choices.choice((0x4000, 0, 0x2000)),
        flags=choices.choice((0x10, 0x18, 0x11, 0xFF)),
        options=choices.choice((b"", b"", b"\x06\0\1\4\0\0\0\0", b"\x2b\0\1\4\0\0\0\0" * 2)),
        sequence=choices.choice((1, 0xFFFFFFF0)),
        ports=choices.choice(((1000, 2000), (1000, 2001))),
    )
    sizes = sorted((choices.randrange(60) for _ in range(choices.randrange(1, 6))), reverse=True)
    return [damaged(choices, bytes(packet)) for packet in run_of(first, sizes)]


def _interleaved(choices: Choices) -> list[bytes]:
    """Several runs, whose packets come in turn; runs may have the same flow."""
    runs = [_packets(choices) for _ in range(choices.choice((1, 1, 2, 3)))]
    longest = max(map(len, runs))
    return [run[turn] for turn in range(longest) for run in runs if turn < len(run)]


def _in_order(batch: list[bytes], places: list[int], frame: bool) -> None:
    """The packets of each flow keep their order, and so do those that have none."""
    last: dict[tuple[int, bytes], int] = {}
    for place in places:
        packet, ip = batch[place], _ip_header(batch[place], frame)
        protocol = ip + (9 if packet[ip : ip + 1] < b"\x50" else 6)
        flow = flow_hash(packet, 0, frame=frame), packet[protocol : protocol + 1]
        assert last.get(flow, -1) < place
        last[flow] = place


def damaged(choices: Choices, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(choices.choice((0, 0, 0, 1, 2, 8))):
        changed[choices.randrange(min(len(changed), 90))] = choices.randrange(256)
    if choices.randrange(8) == 7:
        del changed[choices.randrange(len(changed) + 1) :]
    return bytes(changed) or b"\0"


def _ip_header(packet: bytes, frame: bool) -> int:
    start = 0
    if frame:
        start = 14
        while packet[start - 2 : start] in (b"\x81\0", b"\x88\xa8"):
            start += 4
    return start


def _comparable(packet: bytes, frame: bool) -> bytes:
    """Remove what `merge` may change: the IPv4 identification of a don't-fragment packet."""
    start = _ip_header(packet, frame)
    head = packet[start : start + 20]
    if len(head) == 20 and head[0] >> 4 == 4 and head[6] & 0x40:
        return packet[: start + 4] + packet[start + 6 : start + 10] + packet[start + 12 :]
    return packet


def finding(data: bytes) -> None:
    """The first byte chooses the virtio-net header's size and `tcp`; the rest is many packets."""
    if not data:
        return
    header, tcp = (0, 10, 12)[data[0] % 3], bool(data[0] & 0x80)
    stream, packets = io.BytesIO(data[1:]), list[Any]()
    while head := stream.read(2):
        packets.append(stream.read(int.from_bytes(head, "big")))
    ours = _found(getattr(MODULE, "find_other", native._find_other), packets, header, tcp)
    assert ours == _found(native._find_other, packets, header, tcp)
    for at, packet in enumerate(packets):
        assert at in ours or not _is_asked_about(packet[header:], tcp), packet.hex()


def _found(find: Any, packets: list[Any], header: int, tcp: bool) -> set[int]:
    found, at = set[int](), -1
    while (at := find(packets, at + 1, header, tcp)) < len(packets):
        found.add(at)
    return found


def _is_asked_about(packet: bytes, tcp: bool) -> bool:
    """Whether a stack must look at a packet, by the parser that it then uses."""
    try:
        view = IPHeader(packet)
    except ValueError:
        return False
    if view.proto != _TCP:
        return True
    flags = packet[view.payload_offset + 13 : view.payload_offset + 14]
    return tcp and (view.fragment or bool(flags and flags[0] & _SYN_OR_RST))


TARGETS = [
    Target(
        "find",
        finding,
        "raises nothing; the C module and its Python twin find the same packets; they miss no "
        "packet but TCP, no SYN, no RST and no fragment",
    ),
    Target(
        "run",
        running,
        "raises only ValueError or the errors of read; the C module and its Python twin fill a "
        "buffer with the same bytes, keep the same packet, and write the same from a buffer",
        missing=_no_module,
    ),
    Target(
        "send-run",
        sending,
        "raises nothing; sends all datagrams as one piece if they are bytes of one size, of which "
        "the last may be shorter, and fit; sends nothing otherwise",
        lambda: "missing: the C module" if MODULE is gso else None,
    ),
    Target(
        "vnet-header",
        vnet_header,
        "VnetHeader.unpack raises ValueError only for fewer bytes than its size of 10 or 12, and "
        "pack gives the same bytes back",
    ),
    Target(
        "split",
        splitting,
        "raises only ValueError; the C module and its Python twin give the same results and error "
        "texts; all segments have the same size, only the last may be smaller; none is longer than "
        "the super-packet; together they are no longer than 64 KiB or 16 times the super-packet",
    ),
    Target(
        "merge",
        merging,
        "raises nothing; the C module and its Python twin give the same; split gives back the "
        "packets, except the IPv4 identification of those that must not be fragmented; the packets "
        "of each flow keep their order",
    ),
]
