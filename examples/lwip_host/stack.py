"""lwIP's TCP/IP on asyncio: one thread, the loop's, in which all of lwIP runs, and no locks.

lwIP is built for an operating system here, and would start a thread of its own (`tcpip_init`). It
is not started: what that thread does is to take packets in and to look at lwIP's timers, and both
the loop can do. So everything of lwIP's is called from the loop, and calls back into it at once.

`Stack` is what lwIP's `tapif.c` is: the driver of one interface. `Stream` is TCP for coroutines.
"""

import asyncio
from collections.abc import Awaitable, Callable
from ipaddress import IPv4Address, IPv4Interface
from typing import Any

from _lwip import ffi, lib  # type: ignore[import-not-found]

import aiotun

__all__ = ["Handler", "Stack", "Stream"]

MTU = 1500
MAX_WRITE = 0xFFFF  # what one call takes
NEVER = 0xFFFF_FFFF  # SYS_TIMEOUTS_SLEEPTIME_INFINITE

Handler = Callable[["Stream"], Awaitable[None]]


class Stack:
    """One network interface of lwIP's whose wire is a TAP device. There may be one a process.

    Attributes:
        received, sent: frames.
        dropped: frames that the TAP had no room for, or was down for; lwIP's TCP sends them again.
    """

    def __init__(
        self, tap: aiotun.TapDevice, mac: bytes, address: IPv4Interface, gateway: IPv4Address
    ) -> None:
        self.received = self.sent = self.dropped = 0
        self.mac = mac
        self._tap = tap
        self._handle = ffi.new_handle(self)  # lwIP's way back to us
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
            ffi.addressof(lib, "ethernet_input"),  # without a thread of lwIP's between
        )
        if made == ffi.NULL:
            raise OSError("lwIP takes no such interface")
        lib.netif_set_default(self._netif)
        lib.netif_set_up(self._netif)

    async def run(self) -> None:
        """Take in what comes, until `stop` or the end of the device."""
        try:
            self._rearm()
            async for batch in self._tap.batches():
                for frame in batch:
                    self._take(frame)
                self._rearm()  # what came may have started a timer
        finally:
            if self._timer is not None:
                self._timer.cancel()
            lib.netif_remove(self._netif)

    async def stop(self) -> None:
        """End the connections, and then the device, so that their peers hear of it."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tap.close()

    def listen(self, port: int, handler: Handler) -> None:
        """Have each connection to a port handled by a task of its own.

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

    # What the kernel's side gives to lwIP, and back

    def _take(self, frame: bytes) -> None:
        self.received += 1
        # tapif.c takes PBUF_POOL, which Debian's library makes 616 bytes of and fills with up to
        # 1,536 (2.1.3+dfsg1-2, seen with valgrind).
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
            stream.abort()  # the peer has gone, or has fallen asleep
        finally:
            stream.close()


class Stream:
    """One TCP connection. A reader that waits is what slows the sender down: that is its window."""

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
        """What has come, at least one byte; b"" when the peer has sent all.

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
        """Give bytes to lwIP, waiting while it has no room.

        Raises:
            ConnectionResetError: the connection is lost.
        """
        while data:
            self._check()
            room = min(lib.tcp_sndbuf(self._pcb), len(data), MAX_WRITE)
            # It may have room for the bytes, and none for one segment more.
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
        """End it: what was written is still sent."""
        if self._pcb is not None:
            pcb = self._forget()
            if lib.tcp_close(pcb) != lib.ERR_OK:
                lib.tcp_abort(pcb)

    def abort(self) -> None:
        """Reset it."""
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
        # No check here: what came before the end is to be read first.

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
    """An address as lwIP has it: in the network's order, whatever the machine's is."""
    return int(ffi.cast("uint32_t *", ffi.from_buffer(address.packed))[0])


def _bytes(pbuf: Any) -> bytes:
    """All of a chain of buffers."""
    data = bytearray(pbuf.tot_len)
    lib.pbuf_copy_partial(pbuf, ffi.from_buffer(data), len(data), 0)
    return bytes(data)


# --- Called by lwIP, in the loop's thread --------------------------------------------------------


@ffi.def_extern(error=-1)  # type: ignore[untyped-decorator]
def on_init(netif: Any) -> int:
    """As tapif.c's: say what the interface is, and how it sends."""
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
