"""The far end of a device under test: where numbered packets come from, and where they arrive."""

import abc
import contextlib
import socket

import aiotun

from .packets import IN, LOCAL_EXPERIMENT, Flow, Seen, make, make_super, numbers_in, payload
from .steps import Config

__all__ = ["KernelLine", "Line", "MemoryLine", "PairLine"]

_UDP_SEGMENT, _SO_RCVBUFFORCE = 103, 33  # udp.h, asm-generic/socket.h


_BARE = b"\x45" + bytes(27)  # headers that nobody looks at


class Line(abc.ABC):
    """Feeds the device, and collects what the program sent."""

    @abc.abstractmethod
    def feed(self, flow: Flow, payloads: list[bytes]) -> bool:
        """Send these as one super-packet, or a single one as it is; False if that was refused."""

    @abc.abstractmethod
    def collect(self) -> list[Seen]:
        """All that has arrived since the last call."""

    @abc.abstractmethod
    def close(self) -> None:
        """The far end goes away."""


class KernelLine(Line):
    """UDP sockets in the device's namespace: packets come and go as the kernel has them."""

    def __init__(self, flows: list[Flow], *, frames: bool) -> None:
        self._frames: socket.socket | None = None
        if frames:
            self._frames = socket.socket(
                socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0
            )
            self._frames.bind(("v1", LOCAL_EXPERIMENT))
            with contextlib.suppress(PermissionError):
                self._frames.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 8 << 20)
        self._socks: list[socket.socket] = []
        self._segments: dict[int, int] = {}
        for flow in flows:
            family = socket.AF_INET if flow.version == 4 else socket.AF_INET6
            sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            self._socks.append(sock)
            with contextlib.suppress(PermissionError):
                sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 8 << 20)
            theirs, ours = flow.ports
            sock.bind((flow.kernel, theirs))
            sock.connect((flow.ours, ours))

    def feed(self, flow: Flow, payloads: list[bytes]) -> bool:
        sock = self._socks[flow.number]
        size = len(payloads[0]) if len(payloads) > 1 else 0
        try:
            if self._segments.get(flow.number, 0) != size:
                sock.setsockopt(socket.IPPROTO_UDP, _UDP_SEGMENT, size)
                self._segments[flow.number] = size
            sock.send(b"".join(payloads))
        except OSError:  # no route, no room, or an ICMP error about what was sent before
            return False
        return True

    def collect(self) -> list[Seen]:
        found = []
        with contextlib.suppress(BlockingIOError):
            while self._frames is not None:
                found += numbers_in(self._frames.recv(65536), True, False)
        for sock in self._socks:
            while True:
                try:
                    data = sock.recv(65536)
                except BlockingIOError:
                    break
                except OSError:  # an ICMP error about a packet that we sent; it is told once
                    continue
                found += numbers_in(_BARE + data, False, False)
        return found

    def close(self) -> None:
        if self._frames is not None:
            self._frames.close()
        for sock in self._socks:
            sock.close()


class PairLine(Line):
    """The other end of a socket pair, in the kernel's place."""

    def __init__(self, sock: socket.socket, config: Config) -> None:
        self._sock = sock
        self._header = config.split or config.raw

    def feed(self, flow: Flow, payloads: list[bytes]) -> bool:
        if self._header:
            packet = make_super(flow, payloads, to_kernel=False)
        else:
            packet = make(flow, payloads, False, to_kernel=False)
        try:
            self._sock.send(packet)
        except OSError:
            return False
        return True

    def collect(self) -> list[Seen]:
        found: list[Seen] = []
        with contextlib.suppress(OSError):
            while data := self._sock.recv(70000):
                found += numbers_in(data, False, self._header)
        return found

    def close(self) -> None:
        self._sock.close()


class MemoryLine(Line):
    """The other device of a `memory_pair`."""

    def __init__(self, device: aiotun.Device) -> None:
        self._device = device

    def feed(self, flow: Flow, payloads: list[bytes]) -> bool:
        try:
            self._device.send_nowait(make(flow, payloads, False, to_kernel=False))
        except (BlockingIOError, aiotun.AiotunError):
            return False
        return True

    def collect(self) -> list[Seen]:
        found: list[Seen] = []
        with contextlib.suppress(BlockingIOError, aiotun.AiotunError):
            while True:
                found += numbers_in(self._device.recv_nowait(), False, False)
        return found

    def close(self) -> None:
        self._device.close()


def payloads_for(flow: Flow, numbers: list[int], size: int) -> list[bytes]:
    """What goes to the program under these numbers."""
    return [payload(IN, flow.number, number, size) for number in numbers]
