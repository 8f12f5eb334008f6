"""A UDP socket on the event loop, many datagrams at a time.

With UDP_SEGMENT the kernel accepts a run of datagrams to one address in one call, and with UDP_GRO
it returns one. This does for UDP what offload="split" does for a device. If the kernel lacks
either, datagrams go one by one.
"""

import asyncio
import contextlib
import errno
import socket
import struct
from collections import Counter
from collections.abc import Callable, Sequence

__all__ = ["Address", "DatagramSocket", "Run", "bind", "resolve"]

Address = tuple[str, int] | tuple[str, int, int, int]

Run = tuple[list[bytes], Address]
"""Consecutive datagrams from one address, and that address."""

# linux/udp.h, linux/in.h and linux/in6.h; not in Python's socket module.
_UDP_SEGMENT, _UDP_GRO = 103, 104
_MTU_DISCOVER = {
    socket.AF_INET: (socket.IPPROTO_IP, 10),
    socket.AF_INET6: (socket.IPPROTO_IPV6, 23),
}
_PMTUDISC_DONT = 0
# asm-generic/socket.h. The last of SO_MEMINFO's nine numbers counts dropped datagrams
# (sock_diag.h).
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE, _SO_MEMINFO = 32, 33, 55
_MEMINFO = struct.Struct("9I")

_BUFFER_BYTES = 16 << 20
_LARGEST_RUN = 64  # datagrams; UDP_MAX_SEGMENTS before Linux 6.9
_LARGEST_BYTES = 65_487  # fits an IPv6 packet, and an IPv4 packet with its header
_READS, _RECEIVED = 64, 256  # limits for one wake-up: reads, and datagrams in them
_CONTROL_BYTES = socket.CMSG_SPACE(4)
# Errors with which a run fails although each of its datagrams could be sent.
_NOT_AT_ONCE = (
    errno.EINVAL,  # larger than the path's MTU, or Linux before 4.18
    errno.EMSGSIZE,
    errno.EIO,  # the outgoing interface has no checksum offload
)


def resolve(text: str) -> tuple[socket.AddressFamily, Address]:
    """Resolve HOST:PORT or [HOST]:PORT; raises ValueError and OSError."""
    host, colon, port = text.rpartition(":")
    if not colon:
        raise ValueError(f"{text} is not HOST:PORT")
    family, _, _, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_DGRAM)[0]
    return family, address  # type: ignore[return-value]  # no other family is asked for


def bind(family: socket.AddressFamily, address: Address, mark: int = 0) -> socket.socket:
    """Make a UDP socket of one family, with buffers as large as the kernel allows."""
    sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if mark:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        # Let routers fragment a tunnel's datagrams: without fragmentation they would be dropped,
        # and the sender inside the tunnel would not learn why.
        sock.setsockopt(*_MTU_DISCOVER[family], _PMTUDISC_DONT)
        for force, option in (
            (_SO_RCVBUFFORCE, socket.SO_RCVBUF),
            (_SO_SNDBUFFORCE, socket.SO_SNDBUF),
        ):
            try:
                sock.setsockopt(socket.SOL_SOCKET, force, _BUFFER_BYTES)
            except PermissionError:
                sock.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
        sock.bind(address)
    except BaseException:
        sock.close()
        raise
    return sock


class DatagramSocket:
    """A bound socket; any number of tasks may send.

    Args:
        sock: this object owns it from now on.
        offload: whether to use UDP_SEGMENT and UDP_GRO if the kernel has them.

    Attributes:
        unsent: how many datagrams the kernel refused, by errno's name.
    """

    def __init__(self, sock: socket.socket, *, offload: bool = True) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._largest = 65535 if offload else 0  # datagram in a run
        self._burst = False
        self._wakeups = 0
        self._loop = asyncio.get_running_loop()
        self._senders: list[asyncio.Future[None]] = []
        self.unsent: Counter[str] = Counter()
        if offload:
            with contextlib.suppress(OSError):  # Linux 5.0
                sock.setsockopt(socket.IPPROTO_UDP, _UDP_GRO, 1)

    @property
    def address(self) -> Address:
        """The address that it is bound to."""
        name: Address = self._sock.getsockname()
        return name

    @property
    def overflowed(self) -> int:
        """How many datagrams the kernel dropped from the full buffer; a run counts as one."""
        try:
            data = self._sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size)
        except OSError:  # Linux before 4.12
            return 0
        return int(_MEMINFO.unpack(data)[8])

    def close(self) -> None:
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()

    # Receiving

    def start(self, received: Callable[[list[Run]], None]) -> None:
        """Call a function with datagrams as they come, in runs.

        A function rather than a task: waking a task takes one more turn of the event loop, and a
        round trip passes four of these sockets.
        """
        self._received = received
        self._loop.add_reader(self._sock, self._readable)

    def _readable(self) -> None:
        # A read that finds no second datagram costs as much as one that returns a datagram. So try
        # a second read only if there was a second datagram the last time, and now and then.
        self._wakeups += 1
        most = _READS if self._burst or self._wakeups % 16 == 0 else 1
        runs: list[Run] = []
        reads = received = 0
        while reads < most and received < _RECEIVED:  # then other tasks get a turn
            try:
                datagrams, source = self._take()
            except BlockingIOError:
                break
            except OSError as error:
                self.unsent[f"receiving: {_name(error)}"] += 1
                break
            reads += 1
            received += len(datagrams)
            if runs and runs[-1][1] == source:  # the kernel did not merge these, so do it here
                runs[-1][0].extend(datagrams)
            else:
                runs.append((datagrams, source))
        self._burst = reads > 1
        if runs:
            self._received(runs)

    def _take(self) -> Run:
        data, ancillary, _, source = self._sock.recvmsg(65535, _CONTROL_BYTES)
        if not ancillary:  # a single datagram
            return [data], source
        size = len(data)
        for level, kind, value in ancillary:
            if (level, kind) == (socket.IPPROTO_UDP, _UDP_GRO):
                (size,) = struct.unpack("i", value)
        if size >= len(data):
            return [data], source
        return [data[start : start + size] for start in range(0, len(data), size)], source

    # Sending

    async def send(self, datagrams: Sequence[bytes], address: Address) -> None:
        """Send datagrams to one address, in order; waits while the socket's buffer is full.

        Counts datagrams that the kernel refuses and sends the others, as UDP does.
        """
        while datagrams := self.put(datagrams, address):
            await self._writable()

    def send_nowait(self, datagrams: Sequence[bytes], address: Address) -> None:
        """Like `send`, but drops and counts datagrams if the socket's buffer is full."""
        if left := self.put(datagrams, address):
            self.unsent["EAGAIN"] += len(left)

    def put(self, datagrams: Sequence[bytes], address: Address) -> Sequence[bytes]:
        """Send datagrams until the socket's buffer is full; return those that are left."""
        start, count = 0, len(datagrams)
        while start < count:
            end = start + 1 if start + 1 == count else self._end_of_run(datagrams, start)
            run = datagrams[start:end]
            try:
                if len(run) == 1:
                    self._sock.sendto(run[0], address)
                else:
                    control = [(socket.IPPROTO_UDP, _UDP_SEGMENT, struct.pack("H", len(run[0])))]
                    self._sock.sendmsg(run, control, 0, address)
            except BlockingIOError:
                return datagrams[start:]
            except OSError as error:
                if len(run) > 1 and error.errno in _NOT_AT_ONCE:
                    # From now on send single datagrams, or smaller runs. This holds for other
                    # addresses as well, although their paths may allow more.
                    self._largest = 0 if error.errno == errno.EIO else len(run[0]) - 1
                    continue
                self.unsent[_name(error)] += len(run)
            start = end
        return ()

    def _end_of_run(self, datagrams: Sequence[bytes], start: int) -> int:
        """The end of the run that one call may send: equal sizes, only the last may be smaller."""
        size = len(datagrams[start])
        if not 0 < size <= self._largest:
            return start + 1
        most = min(start + min(_LARGEST_RUN, max(1, _LARGEST_BYTES // size)), len(datagrams))
        for end in range(start + 1, most):
            length = len(datagrams[end])
            if length != size:
                return end + 1 if 0 < length < size else end
        return most

    async def _writable(self) -> None:
        future = self._loop.create_future()
        self._senders.append(future)
        self._loop.add_writer(self._sock, self._wake_senders)
        try:
            await future
        finally:
            if future in self._senders:
                self._senders.remove(future)

    def _wake_senders(self) -> None:
        self._loop.remove_writer(self._sock)
        senders, self._senders = self._senders, []
        for future in senders:
            _wake(future)


def _wake(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


def _name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, "?")
