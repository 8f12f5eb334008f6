"""lwIP's TCP/IP on asyncio. All of lwIP runs in the event loop's thread, so it needs no locks.

This build of lwIP is made for an operating system and would start its own thread (`tcpip_init`),
which receives packets and runs lwIP's timers. The event loop does both instead: it makes every call
to lwIP, and lwIP's callbacks run within these calls.

`Stack` is the driver of one interface, like lwIP's `tapif.c`. `Stream` is TCP for coroutines.
"""

import asyncio
from collections.abc import Awaitable, Callable
from ipaddress import IPv4Address, IPv4Interface
from typing import Any

from _lwip import ffi, lib  # type: ignore[import-not-found]

import aiotun

__all__ = ["Handler", "Stack", "Stream"]

MTU = 1500
MAX_WRITE = 0xFFFF  # the most bytes in one call
NEVER = 0xFFFF_FFFF  # SYS_TIMEOUTS_SLEEPTIME_INFINITE

Handler = Callable[["Stream"], Awaitable[None]]


class Stack:
    """An lwIP network interface on a TAP device. A process may have one.

    Attributes:
        received, sent: counts of frames.
        dropped: frames that the TAP did not accept: it was full or down. lwIP's TCP sends them
            again.
    """

    def __init__(
        self, tap: aiotun.TapDevice, mac: bytes, address: IPv4Interface, gateway: IPv4Address
    ) -> None:
        self.received = self.sent = self.dropped = 0
        self.mac = mac
        self._tap = tap
        self._handle = ffi.new_handle(self)  # for lwIP's callbacks
        self._handlers: dict[int, Any] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        lib.lwip_init()
        self._netif = ffi.new("struct netif *")
        wanted = (address.ip, address.netmask, gateway)
        numbers = [ffi.new("ip4_addr_t *", [_number(each)]) for each in wanted]
        made = lib.netif_add(
            self._netif,
            *numbers,
            self._handle,
            lib.on_init,
            ffi.addressof(lib, "ethernet_input"),  # directly, not through a thread of lwIP
        )
        if made == ffi.NULL:
            raise OSError("lwIP can't add the interface")
        lib.netif_set_default(self._netif)
        lib.netif_set_up(self._netif)

    async def run(self) -> None:
        """Pass received frames to lwIP, until `stop` or the end of the device."""
        try:
            self._rearm()
            async for batch in self._tap.batches():
                for frame in batch:
                    self._take(frame)
                self._rearm()  # the frame may have started a timer
        finally:
            if self._timer is not None:
                self._timer.cancel()
            lib.netif_remove(self._netif)

    async def stop(self) -> None:
        """Close the connections so that the peers are told, and then the device."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tap.close()

    def listen(self, port: int, handler: Handler) -> None:
        """Run `handler` in a new task for each connection to a port.

        Raises:
            OSError: the port is taken.
        """
        pcb = lib.tcp_new()
        if lib.tcp_bind(pcb, ffi.NULL, port) != lib.ERR_OK:
            lib.tcp_abort(pcb)
            raise OSError(f"port {port} is taken")
        pcb = lib.tcp_listen(pcb)
        self._handlers[port] = handle = ffi.new_handle((self, handler))
        lib.tcp_arg(pcb, handle)
        lib.tcp_accept(pcb, lib.on_accept)

    # Frames from the kernel to lwIP and back

    def _take(self, frame: bytes) -> None:
        self.received += 1
        # Not PBUF_POOL, which tapif.c uses: in Debian's library such a buffer has 616 bytes, and
        # up to 1,536 are written to it (2.1.3+dfsg1-2, seen with valgrind).
        pbuf = lib.pbuf_alloc(lib.PBUF_RAW, len(frame), lib.PBUF_RAM)
        if pbuf == ffi.NULL:
            self.dropped += 1
            return
        lib.pbuf_take(pbuf, frame, len(frame))
        if lib.ethernet_input(pbuf, self._netif) != lib.ERR_OK:
            lib.pbuf_free(pbuf)

    def _give(self, frame: bytes) -> bool:
        try:
            self._tap.send_nowait(frame)
        except (BlockingIOError, aiotun.AiotunError):
            self.dropped += 1
            return False
        self.sent += 1
        return True

    # lwIP's clock

    def _rearm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        wait = lib.sys_timeouts_sleeptime()
        if wait != NEVER:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(wait / 1000, self._tick)

    def _tick(self) -> None:
        lib.sys_check_timeouts()
        self._rearm()

    def _accept(self, pcb: Any, handler: Handler) -> None:
        task = asyncio.create_task(self._handle_one(Stream(pcb), handler))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _handle_one(self, stream: "Stream", handler: Handler) -> None:
        try:
            await handler(stream)
        except (ConnectionError, TimeoutError):
            stream.abort()  # the peer has gone or does not read
        finally:
            stream.close()


class Stream:
    """A TCP connection. While nobody reads, its window fills up and slows the sender down."""

    def __init__(self, pcb: Any) -> None:
        self._pcb = pcb  # None once it is closed, or lost
        self._received: list[bytes] = []
        self._eof = False
        self._news = asyncio.Event()
        self._handle = ffi.new_handle(self)
        lib.tcp_arg(pcb, self._handle)
        lib.tcp_recv(pcb, lib.on_received)
        lib.tcp_sent(pcb, lib.on_sent)
        lib.tcp_err(pcb, lib.on_error)

    async def read(self) -> bytes:
        """Return received bytes, at least one; b"" after the peer has closed its side.

        Raises:
            ConnectionResetError: the connection is lost.
        """
        while not self._received and not self._eof:
            await self._wait()
        data = b"".join(self._received)
        self._received.clear()
        if self._pcb is not None:
            for start in range(0, len(data), MAX_WRITE):
                lib.tcp_recved(self._pcb, min(MAX_WRITE, len(data) - start))
        return data

    async def write(self, data: bytes) -> None:
        """Pass bytes to lwIP; waits while its send buffer is full.

        Raises:
            ConnectionResetError: the connection is lost.
        """
        while data:
            self._check()
            room = min(lib.tcp_sndbuf(self._pcb), len(data), MAX_WRITE)
            # It may have room for the bytes, but not for another segment.
            said = lib.ERR_MEM
            if room:
                said = lib.tcp_write(self._pcb, data[:room], room, lib.TCP_WRITE_FLAG_COPY)
            if said == lib.ERR_OK:
                data = data[room:]
                lib.tcp_output(self._pcb)
            elif said == lib.ERR_MEM:
                await self._wait()
            else:
                raise ConnectionResetError(f"lwIP's error {said}")

    def close(self) -> None:
        """Close the connection; data that was written is still sent."""
        if self._pcb is not None:
            pcb = self._forget()
            if lib.tcp_close(pcb) != lib.ERR_OK:
                lib.tcp_abort(pcb)

    def abort(self) -> None:
        """Reset the connection."""
        if self._pcb is not None:
            lib.tcp_abort(self._forget())

    def _forget(self) -> Any:
        pcb, self._pcb = self._pcb, None
        lib.tcp_arg(pcb, ffi.NULL)
        lib.tcp_recv(pcb, ffi.NULL)
        lib.tcp_sent(pcb, ffi.NULL)
        lib.tcp_err(pcb, ffi.NULL)
        return pcb

    def _check(self) -> None:
        if self._pcb is None:
            raise ConnectionResetError("the connection is lost")

    async def _wait(self) -> None:
        self._check()
        self._news.clear()
        await self._news.wait()
        # Don't check for an error here: the data that came before it must be read first.

    # What lwIP calls

    def _on_received(self, data: bytes) -> None:
        if data:
            self._received.append(data)
        else:
            self._eof = True
        self._news.set()

    def _on_error(self) -> None:
        self._pcb = None  # lwIP has freed it
        self._news.set()


def _number(address: IPv4Address) -> int:
    """An address as lwIP stores it: in network byte order."""
    return int(ffi.cast("uint32_t *", ffi.from_buffer(address.packed))[0])


def _bytes(pbuf: Any) -> bytes:
    """The bytes of a chain of buffers."""
    data = bytearray(pbuf.tot_len)
    lib.pbuf_copy_partial(pbuf, ffi.from_buffer(data), len(data), 0)
    return bytes(data)


# --- Called by lwIP, in the loop's thread --------------------------------------------------------


@ffi.def_extern(error=-1)  # type: ignore[untyped-decorator]
def on_init(netif: Any) -> int:
    """Set the interface's properties and output functions, as tapif.c does."""
    stack: Stack = ffi.from_handle(netif.state)
    netif.name = b"tp"
    netif.hwaddr_len = 6
    netif.hwaddr[0:6] = stack.mac
    netif.mtu = MTU
    netif.flags = lib.NETIF_FLAG_BROADCAST | lib.NETIF_FLAG_ETHARP | lib.NETIF_FLAG_LINK_UP
    netif.output = ffi.addressof(lib, "etharp_output")
    netif.linkoutput = lib.on_output
    return int(lib.ERR_OK)


@ffi.def_extern(error=-1)  # type: ignore[untyped-decorator]
def on_output(netif: Any, pbuf: Any) -> int:
    stack: Stack = ffi.from_handle(netif.state)
    return int(lib.ERR_OK if stack._give(_bytes(pbuf)) else lib.ERR_IF)


@ffi.def_extern(error=-1)  # type: ignore[untyped-decorator]
def on_accept(arg: Any, pcb: Any, err: int) -> int:
    if err != lib.ERR_OK or pcb == ffi.NULL:
        return int(lib.ERR_OK)  # lwIP had no memory for it
    stack, handler = ffi.from_handle(arg)
    stack._accept(pcb, handler)
    return int(lib.ERR_OK)


@ffi.def_extern(error=-1)  # type: ignore[untyped-decorator]
def on_received(arg: Any, pcb: Any, pbuf: Any, err: int) -> int:
    stream: Stream = ffi.from_handle(arg)
    if pbuf == ffi.NULL:
        stream._on_received(b"")
    else:
        stream._on_received(_bytes(pbuf))
        lib.pbuf_free(pbuf)
    return int(lib.ERR_OK)


@ffi.def_extern(error=-1)  # type: ignore[untyped-decorator]
def on_sent(arg: Any, pcb: Any, length: int) -> int:
    stream: Stream = ffi.from_handle(arg)
    stream._news.set()
    return int(lib.ERR_OK)


@ffi.def_extern()  # type: ignore[untyped-decorator]
def on_error(arg: Any, err: int) -> None:
    stream: Stream = ffi.from_handle(arg)
    stream._on_error()
