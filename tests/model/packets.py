"""Numbered packets: made, recognised, and accounted for."""

import dataclasses
import ipaddress
import itertools
import struct

__all__ = [
    "IN",
    "LOCAL_EXPERIMENT",
    "OUT",
    "Fault",
    "Flow",
    "Ledger",
    "Packet",
    "Seen",
    "begin_run",
    "make",
    "make_super",
    "numbers_in",
    "payload",
    "waiting_frame",
]

IN, OUT = 0, 1  # what a packet is to the program: received, or sent

_HEAD = struct.Struct("!3sBHHI")  # whose, direction, flow, length of the payload, number
_runs = itertools.count()
_mark = b"md\0"
_MAC_OURS, _MAC_THEIRS = b"\x02\0\0\0\0\x09", b"\x02\0\0\0\0\x0a"
_VNET = struct.Struct("=BBHHHH")  # virtio_net.h
_NEEDS_CSUM, _GSO_UDP_L4 = 1, 5

LOCAL_EXPERIMENT = 0x88B5  # an EtherType that nobody has (IEEE 802)


def begin_run() -> None:
    """From now on packets of earlier runs are foreign: a slow queue may still have some."""
    global _mark
    _mark = b"md" + bytes([next(_runs) % 256])


class Fault(Exception):  # noqa: N818 - an error of the library, not of the model
    """The library broke a promise. `kind` names the promise, and is what shrinking preserves."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


@dataclasses.dataclass(frozen=True)
class Flow:
    """One UDP flow: its addresses, and the ports on the kernel's side and on ours."""

    number: int
    kernel: str
    ours: str

    @property
    def ports(self) -> tuple[int, int]:
        return 5000 + self.number, 6000 + self.number

    @property
    def version(self) -> int:
        return ipaddress.ip_address(self.kernel).version


def payload(direction: int, flow: int, number: int, size: int) -> bytes:
    """What a packet carries: who it is, and padding that shows whether it is whole."""
    head = _HEAD.pack(_mark, direction, flow, size, number)
    return head + bytes([number & 0xFF]) * (size - len(head))


def make(flow: Flow, payloads: list[bytes], frame: bool, *, to_kernel: bool = True) -> bytes:
    """A packet or frame of this flow; with several payloads the body of a super-packet."""
    return _make(flow, payloads, frame, to_kernel)[0]


def waiting_frame(frame: bytes) -> bytes:
    """The same frame as another protocol's: the bridge charges only such ones to the sender."""
    return frame[:12] + LOCAL_EXPERIMENT.to_bytes(2, "big") + frame[14:]


def make_super(flow: Flow, payloads: list[bytes], *, to_kernel: bool) -> bytes:
    """The same behind a virtio-net header, as the kernel hands it over."""
    packet, start = _make(flow, payloads, False, to_kernel)
    if len(payloads) == 1:
        return bytes(_VNET.size) + packet
    header = _VNET.pack(_NEEDS_CSUM, _GSO_UDP_L4, start + 8, len(payloads[0]), start, 6)
    return header + packet


def _make(flow: Flow, payloads: list[bytes], frame: bool, to_kernel: bool) -> tuple[bytes, int]:
    kernel_port, our_port = flow.ports
    source, target, ports = flow.ours, flow.kernel, (our_port, kernel_port)
    if not to_kernel:
        source, target, ports = target, source, (kernel_port, our_port)
    addresses = ipaddress.ip_address(source).packed + ipaddress.ip_address(target).packed
    length = 8 + sum(map(len, payloads))
    pseudo = addresses + struct.pack("!II", length, 17)
    udp = struct.pack("!HHHH", *ports, length, 0)
    if len(payloads) == 1:
        value = _checksum(pseudo + udp + payloads[0]) or 0xFFFF
    else:  # the kernel, or whoever splits it, completes the sum of the pseudo-header
        value = _checksum(pseudo) ^ 0xFFFF
    body = udp[:6] + struct.pack("!H", value) + b"".join(payloads)
    if flow.version == 4:
        # Not to be fragmented: else its identification counts, and nothing may be merged.
        head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + length, 0, 0x4000, 64, 17, 0)
        head = head[:10] + struct.pack("!H", _checksum(head + addresses)) + addresses
        kind = b"\x08\x00"
    else:
        head = struct.pack("!IHBB", 6 << 28, length, 17, 64) + addresses
        kind = b"\x86\xdd"
    ethernet = _MAC_THEIRS + _MAC_OURS + kind if frame else b""
    return ethernet + head + body, len(head)


def _checksum(data: bytes) -> int:
    if len(data) % 2:
        data += b"\0"
    value = int.from_bytes(data, "big") % 0xFFFF
    return (value or 0xFFFF) ^ 0xFFFF


def numbers_in(data: bytes, frame: bool, header: bool, *, cut: bool = False) -> list["Seen"]:
    """Give who came in a packet: several in a super-packet, none in a packet of the kernel's own.

    Raises:
        Fault: it was torn, or its checksum would not pass.
    """
    size = 0
    if header:
        _, kind, _, size, _, _ = _VNET.unpack_from(data)
        size = size if kind else 0
        data = data[_VNET.size :]
    if frame:
        data = data[14:]
    if len(data) < 28:
        return []
    start = 28 if data[0] >> 4 == 4 else 48
    body = data[start:]
    if body[:3] != _mark:
        return []
    step = size or len(body)
    return [_seen(body[at : at + step], cut) for at in range(0, len(body), step)]


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a payload says of itself."""

    direction: int
    flow: int
    number: int


def _seen(body: bytes, cut: bool) -> Seen:
    magic, direction, flow, size, number = _HEAD.unpack_from(body.ljust(_HEAD.size, b"\0"))
    if magic != _mark:
        raise Fault("torn", f"a segment begins with {body[:20].hex()}")
    whole = payload(direction, flow, number, size)
    if body != (whole[: len(body)] if cut else whole):
        raise Fault("torn", f"packet {number} of flow {flow}: {len(body)} bytes of {size}")
    return Seen(direction, flow, number)


@dataclasses.dataclass
class Packet:
    """One packet's fate."""

    flow: int
    number: int
    epoch: int
    """Packets of one flow and epoch keep their order."""
    ring: int | None = None
    """Which queue of the kernel it is in, where that is known."""
    group: int = -1
    """The super-packet that it came in."""
    captured: bool = True
    """Whether a capture of the device sees it."""
    state: str = ""
    """``there`` must come; ``doubtful`` may come; ``done`` came; ``never`` must not come."""


class Ledger:
    """The packets of one direction."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.packets: dict[tuple[int, int], Packet] = {}
        self.there: dict[int, Packet] = {}
        """Those that must come yet, by number: in the order they were made."""
        self.done = 0
        self._newest: dict[tuple[int, int], int] = {}

    def add(self, flow: int, epoch: int, state: str) -> Packet:
        packet = Packet(flow, len(self.packets) + 1, epoch)
        self.packets[flow, packet.number] = packet
        self.mark(packet, state)
        return packet

    def mark(self, packet: Packet, state: str) -> None:
        packet.state = state
        if state == "there":
            self.there[packet.number] = packet
        else:
            self.there.pop(packet.number, None)

    def came(self, seen: Seen) -> Packet:
        """Note that a packet arrived at its end."""
        packet = self.packets.get((seen.flow, seen.number))
        if packet is None:
            raise Fault("invented", f"{self.what} {seen} was never made")
        if packet.state == "done":
            raise Fault("twice", f"{self.what} packet {packet.number} came twice")
        if packet.state == "never":
            raise Fault("unsent", f"{self.what} packet {packet.number} came, and was told unsent")
        way = packet.flow, packet.epoch
        if packet.number < self._newest.get(way, 0):
            raise Fault(
                "order",
                f"{self.what} packet {packet.number} of flow {packet.flow} came after "
                f"{self._newest[way]}",
            )
        self._newest[way] = packet.number
        self.done += 1
        self.mark(packet, "done")
        return packet

    def doubt(self, ring: int | None = None) -> None:
        """Packets of a ring, or all, may be gone from now on."""
        for packet in list(self.there.values()):
            if ring is None or packet.ring in (None, ring):
                self.mark(packet, "doubtful")
