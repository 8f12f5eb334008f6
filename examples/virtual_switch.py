#!/usr/bin/env python3
"""A learning Ethernet switch whose ports are TAP devices, UDP peers and QEMU's sockets.

    sudo python examples/virtual_switch.py --port tap:sw0 --port unix:/run/switch.sock \\
        --port udp:192.0.2.1:7000=192.0.2.2:7000 &
    qemu-system-x86_64 -netdev stream,id=n,addr.type=unix,addr.path=/run/switch.sock \\
        -device virtio-net-pci,netdev=n ...

Give --port for each port:

    tap:NAME[@NETNS]   a TAP device, created if it does not exist; in a network namespace if given
    udp:LOCAL=REMOTE   a frame in each datagram, for another switch or -netdev dgram; LOCAL and
                       REMOTE are ADDRESS:PORT
    dgram:LOCAL=REMOTE the same between the paths of two Unix sockets
    unix:PATH          listens on a Unix socket for -netdev stream; each connection is a port
    tcp:ADDRESS:PORT   the same on TCP

Prints "ready" when it serves, and its counters on SIGUSR1 and at its end. SIGINT or SIGTERM end it.
It has no spanning tree: two paths between two switches make a loop.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import ipaddress
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from _switching import MAX_FRAME, Counters, Port, Switch

import aiotun

# How many bytes may wait for a slow stream before its frames are dropped.
MAX_BACKLOG = 1 << 20
BUDGET = 64  # datagrams to read before other ports get a turn


# --- Ports ---------------------------------------------------------------------------------------


class TapPort(Port):
    def __init__(self, counters: Counters, tap: aiotun.TapDevice) -> None:
        super().__init__(counters)
        self._tap = tap

    def put(self, frame: bytes) -> bool:
        try:
            self._tap.send_nowait(frame)
        except (BlockingIOError, aiotun.AiotunError):  # full, down, lost, or the kernel refuses it
            return False
        return True


class DatagramPort(Port):
    """A frame in each datagram. Only the socket's buffer holds frames, so nothing piles up here."""

    def __init__(
        self, counters: Counters, sock: socket.socket, remote: str | tuple[str, int]
    ) -> None:
        super().__init__(counters)
        self._sock = sock
        self._remote = remote

    def put(self, frame: bytes) -> bool:
        try:
            self._sock.sendto(frame, self._remote)
        except OSError:  # full, too long, or no peer (UDP reports it later, by ICMP)
            return False
        return True

    def receive(self, switch: Switch) -> None:
        """Read the datagrams that wait, up to a budget, so that other ports get their turn."""
        for _ in range(BUDGET):
            try:
                frame, sender = self._sock.recvfrom(MAX_FRAME + 1)
            except BlockingIOError:
                return
            except OSError:  # the error of a frame that was sent: there is no peer
                continue
            if sender == self._remote or sender[:2] == self._remote:  # IPv6 has two numbers more
                switch.forward(self, frame)
            else:
                self.counters.received += 1
                self.counters.filtered += 1


class StreamPort(Port, asyncio.Protocol):
    """A connection of QEMU's `-netdev stream`: 4 bytes of length, then the frame."""

    def __init__(self, counters: Counters, switch: Switch) -> None:
        super().__init__(counters)
        self._switch = switch
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._switch.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._switch.remove(self)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        start = 0
        while len(self._buffer) - start >= 4:
            length = int.from_bytes(self._buffer[start : start + 4], "big")
            if length > MAX_FRAME:
                self._give_up()
                return
            end = start + 4 + length
            if end > len(self._buffer):
                break
            self._switch.forward(self, bytes(self._buffer[start + 4 : end]))
            start = end
        del self._buffer[:start]

    def _give_up(self) -> None:
        """Close it: no frame is that long, so the next frame in the stream can't be found."""
        self.counters.received += 1
        self.counters.malformed += 1
        self._buffer.clear()
        assert self._transport is not None
        self._transport.abort()

    def put(self, frame: bytes) -> bool:
        transport = self._transport
        if transport is None or transport.is_closing():
            return False
        if transport.get_write_buffer_size() > MAX_BACKLOG:
            return False
        transport.write(len(frame).to_bytes(4, "big") + frame)
        return True

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()  # close() would wait until a peer reads, and it may never


# --- Opening them --------------------------------------------------------------------------------

# A Unix socket's path, or an IP address and a port.
Place = str | tuple[str, int]


@dataclasses.dataclass
class Spec:
    """The parts of a --port option."""

    text: str
    kind: str
    local: Place
    remote: Place = ""
    counters: Counters = dataclasses.field(default_factory=Counters)

    def open(self, switch: Switch) -> contextlib.AbstractAsyncContextManager[None]:
        if self.kind == "tap":
            return open_tap(self, switch)
        if self.kind in ("udp", "dgram"):
            return open_datagrams(self, switch)
        return open_streams(self, switch)


@contextlib.asynccontextmanager
async def open_tap(spec: Spec, switch: Switch) -> AsyncIterator[None]:
    async with aiotun.open_tap(str(spec.local), netns=str(spec.remote) or None) as tap:
        port = TapPort(spec.counters, tap)
        switch.add(port)
        task = asyncio.create_task(read_tap(tap, port, switch))
        try:
            yield
        finally:
            tap.close()
            await task


async def read_tap(tap: aiotun.TapDevice, port: TapPort, switch: Switch) -> None:
    try:
        async for batch in tap.batches():
            for frame in batch:
                switch.forward(port, frame)
    except aiotun.DeviceLostError as error:
        switch.remove(port)  # the other ports continue
        print(f"{sys.argv[0]}: {error.strerror}", file=sys.stderr)


@contextlib.asynccontextmanager
async def open_datagrams(spec: Spec, switch: Switch) -> AsyncIterator[None]:
    loop = asyncio.get_running_loop()
    with bound(spec.local, socket.SOCK_DGRAM) as sock:
        port = DatagramPort(spec.counters, sock, spec.remote)
        switch.add(port)
        loop.add_reader(sock, port.receive, switch)
        try:
            yield
        finally:
            loop.remove_reader(sock)


@contextlib.asynccontextmanager
async def open_streams(spec: Spec, switch: Switch) -> AsyncIterator[None]:
    loop = asyncio.get_running_loop()

    def connection() -> StreamPort:
        return StreamPort(spec.counters, switch)

    with bound(spec.local, socket.SOCK_STREAM) as sock:
        if sock.family == socket.AF_UNIX:
            server = await loop.create_unix_server(connection, sock=sock)
        else:
            server = await loop.create_server(connection, sock=sock)
        try:
            yield
        finally:
            server.close()
            for port in list(switch.ports):
                if isinstance(port, StreamPort) and port.counters is spec.counters:
                    port.close()


@contextlib.contextmanager
def bound(place: Place, kind: socket.SocketKind) -> Iterator[socket.socket]:
    """A bound, non-blocking socket; the file of a Unix socket is deleted with it."""
    path = Path(place) if isinstance(place, str) else None
    family = socket.AF_UNIX
    if path is None:
        family = socket.AF_INET6 if ":" in place[0] else socket.AF_INET
    elif path.is_socket():
        path.unlink()  # left behind by a process that was killed
    with socket.socket(family, kind) as sock:
        sock.setblocking(False)
        if kind == socket.SOCK_STREAM and path is None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(place)
        except OSError as error:
            raise OSError(error.errno, f"{place}: {error.strerror}") from None
        try:
            yield sock
        finally:
            if path is not None:
                path.unlink(missing_ok=True)


# --- The command ---------------------------------------------------------------------------------


def port_spec(text: str) -> Spec:
    """Parse a --port; raises the errors that argparse shows."""
    kind, _, rest = text.partition(":")
    local, equals, remote = rest.partition("=")
    try:
        if kind == "tap":
            name, _, netns = rest.partition("@")
            return Spec(text, kind, aiotun.Link(name).name, netns)
        if kind == "unix" and rest:
            return Spec(text, kind, rest)
        if kind == "dgram" and local and remote:
            return Spec(text, kind, local, remote)
        if kind == "tcp":
            return Spec(text, kind, inet(rest))
        if kind == "udp" and equals:
            return Spec(text, kind, inet(local), inet(remote))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None
    raise argparse.ArgumentTypeError(f"{text!r} is not a valid port; see --help")


def inet(text: str) -> tuple[str, int]:
    """Parse ADDRESS:PORT; an IPv6 address is in brackets."""
    address, _, port = text.rpartition(":")
    if address.startswith("[") and address.endswith("]"):
        address = str(ipaddress.IPv6Address(address[1:-1]))
    else:
        address = str(ipaddress.IPv4Address(address))
    if not (port.isascii() and port.isdecimal() and 1 <= int(port) <= 65535):
        raise ValueError(f"a port is a number from 1 to 65535, not {port!r}")
    return address, int(port)


def seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError
    return value


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--port", metavar="KIND:...", type=port_spec, action="append", required=True
    )
    parser.add_argument(
        "--ageing",
        metavar="SECONDS",
        type=seconds,
        default=300.0,
        help="after how long without a frame a station is forgotten (default: %(default)s)",
    )
    return parser.parse_args()


async def main(args: argparse.Namespace) -> None:
    switch = Switch(args.ageing)
    end = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end.set)
    loop.add_signal_handler(signal.SIGUSR1, report, args.port)
    async with contextlib.AsyncExitStack() as stack:
        for spec in args.port:
            await stack.enter_async_context(spec.open(switch))
        print("ready", flush=True)
        await end.wait()
    report(args.port)


def report(specs: list[Spec]) -> None:
    for spec in specs:
        print(f"{spec.text} {spec.counters}", flush=True)


if __name__ == "__main__":
    try:
        asyncio.run(main(arguments()))
    except (aiotun.AiotunError, OSError) as error:
        print(f"{sys.argv[0]}: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:  # before it was ready
        sys.exit(130)
