"""The parsers of the examples that read Ethernet frames: DHCP, VXLAN, the virtual switch."""

from ipaddress import IPv4Address, IPv4Interface
from typing import Any

import _dhcp_frames
import _dhcp_leases
import _dhcp_message
import _dhcp_rules
import _switching
import virtual_switch
import vxlan

from ._target import Choices, Target

__all__ = ["TARGETS"]

_SERVER = IPv4Interface("10.85.0.1/24")
_MAC = b"\2\0\0\0\0\1"


def dhcp(data: bytes) -> None:
    """The first byte says whether the rest is a frame or a bare DHCP message."""
    if not data:
        return
    message = data[1:]
    if data[0] & 1:
        _dhcp_frames.read_arp(message)
        try:
            datagram = _dhcp_frames.read_udp(message)
        except _dhcp_message.MalformedError:
            return
        if datagram is None:
            return
        assert len(datagram.payload) <= len(message) - 42
        message = datagram.payload
    else:
        datagram = _dhcp_frames.Datagram(b"\2\0\0\0\0\2", _SERVER.ip, message)
    try:
        request = _dhcp_message.Message.parse(message)
    except _dhcp_message.MalformedError:
        return
    again = _dhcp_message.Message.parse(request.pack(op=1))
    assert again == request, (again, request)
    leases = _dhcp_leases.Leases(IPv4Address("10.85.0.10"), IPv4Address("10.85.0.12"), ":memory:")
    try:
        rules = _dhcp_rules.Rules(_dhcp_rules.Config(_SERVER), leases)
        answer: Any = rules.handle(request, 1e6, direct=True)
        if isinstance(answer, _dhcp_rules.Probe):
            answer = rules.probed(answer, None, 1e6)
        if answer is not None:
            frame = _dhcp_frames.deliver(answer, datagram, _MAC, _SERVER.ip)
            assert len(frame) <= 1514
            assert _dhcp_message.Message.parse(answer.pack(), op=2).xid == request.xid
    finally:
        leases.close()


def vxlan_(data: bytes) -> None:
    """Receive a datagram from a remote and from a stranger, and send its frame back."""
    remote, stranger = ("192.0.2.2", 4789), ("198.51.100.1", 4789)
    end = vxlan.Vxlan(42, [remote])
    assert end.receive([data], stranger, 0.0) == []
    frames = end.receive([data, data], remote, 0.0)
    assert len(frames) + end.dropped.total() == 3
    for frame in frames:
        assert frame == data[8:]
        assert len(frame) >= 14
        sent = end.send([frame], 1.0)
        ((address, (datagram,)),) = sent
        assert address == remote
        assert datagram[8:] == frame
        assert datagram[4:7] == (42).to_bytes(3, "big")


class _Port(_switching.Port):
    def __init__(self) -> None:
        super().__init__(_switching.Counters())
        self.frames: list[bytes] = []

    def put(self, frame: bytes) -> bool:
        self.frames.append(frame)
        return True


class _Transport:
    aborted = False

    def abort(self) -> None:
        self.aborted = True

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self.aborted

    def write(self, data: bytes) -> None:
        pass


def switch(data: bytes) -> None:
    """Receive a QEMU stream in pieces. The frames that come out must account for all its bytes."""
    choices = Choices(data[:16])
    counters, learner = _switching.Counters(), _switching.Switch(300.0, lambda: 1.0)
    other = _Port()
    learner.add(other)
    stream = virtual_switch.StreamPort(counters, learner)
    transport: Any = _Transport()
    stream._transport = transport
    learner.add(stream)
    at = 16
    while at < len(data) and not transport.aborted:
        size = choices.randrange(1, 200)
        stream.data_received(data[at : at + size])
        at += size
    assert len(stream._buffer) <= _switching.MAX_FRAME + 4 + 200
    assert sum(len(frame) + 4 for frame in other.frames) <= max(0, len(data) - 16)
    assert counters.received == (len(other.frames) + counters.malformed + counters.filtered), (
        counters
    )


TARGETS = [
    Target(
        "dhcp",
        dhcp,
        "raises only MalformedError; a message that is written and read again is the same; an "
        "answer fits into a frame and has the request's transaction ID",
    ),
    Target(
        "vxlan",
        vxlan_,
        "raises nothing; drops what does not come from a remote; frames come out unchanged, and "
        "everything else is counted",
    ),
    Target(
        "switch",
        switch,
        "raises nothing; counts each frame of a stream as forwarded, filtered or malformed; "
        "buffers at most one frame of a stream",
    ),
]
