"""Devices for code written against asyncio's transports and protocols.

`create_tun_endpoint` is to `open_tun` what `loop.create_datagram_endpoint` is to a socket. Rules
that are not said here are asyncio's own: callbacks run one after another in the loop's thread; what
a callback raises goes to the loop's exception handler, and the transport goes on.
"""

from __future__ import annotations

import asyncio
import errno
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar, Unpack

from ._device.options import TapOptions, TunOptions
from ._kernel import ioctl
from .device import Device, Opener, open_tap, open_tun
from .errors import AiotunError, DeviceClosedError, DeviceLostError

__all__ = ["DeviceTransport", "PacketProtocol", "create_tap_endpoint", "create_tun_endpoint"]

P = TypeVar("P", bound=asyncio.BaseProtocol)

_HIGH = 64 * 1024  # bytes, as asyncio's transports have it

# How often a transport whose reading is paused looks whether its device is still there.
_LOOK_SECONDS = 0.5


class PacketProtocol(asyncio.BaseProtocol):
    """What a `DeviceTransport` calls; derive from it, or from `asyncio.DatagramProtocol`.

    Besides these: `connection_made(transport)`, first; `connection_lost(exc)`, last and once, with
    None after `close` and `abort`; `pause_writing()` and `resume_writing()` as more or fewer bytes
    wait to be sent than the transport's limits say.
    """

    def packet_received(self, data: bytes) -> None:
        """One packet or frame came. Called for no more once reading is paused or it is closing."""

    def error_received(self, exc: OSError) -> None:
        """A packet given to `sendto` was not sent, and why: the link is down, or it is no packet.

        A `LinkDownError`, a `PacketError`, or a `DeviceMismatchError`; the transport goes on. Never
        called from within `sendto`, and so never within another callback: the loop calls it soon.
        """


class DeviceTransport(asyncio.DatagramTransport):
    """Packets between a device and a protocol.

    Attributes:
        dropped: packets given to `sendto` that were not sent and not reported either: those that
            waited when the transport was aborted or the interface went away, all that came when it
            was closing, and those refused where the protocol has no `error_received`.

    *Closing*: the device is closed right after `connection_lost`, in a thread of its own. Who wants
    to open the interface again awaits ``transport.get_extra_info("device").aclose()`` first.

    *Cancellation*: cancelling the tasks that belong to it, as `asyncio.run` does at its end with
    all that are left, aborts the transport.
    """

    __slots__ = (
        "__weakref__",
        "_buffer",
        "_closing",
        "_device",
        "_end_watch",
        "_high",
        "_loop",
        "_low",
        "_over",
        "_paused",
        "_protocol",
        "_protocol_paused",
        "_reader",
        "_received",
        "_size",
        "_writer",
        "dropped",
    )

    def __init__(
        self, loop: asyncio.AbstractEventLoop, device: Device, protocol: asyncio.BaseProtocol
    ) -> None:
        # Internal: use create_tun_endpoint or create_tap_endpoint. Raises TypeError for what is no
        # protocol for packets.
        super().__init__()
        self._loop = loop
        self._device = device
        self._protocol = protocol
        self._received: Callable[[bytes], object] = _receiver(protocol)
        self.dropped: int = 0
        self._reader: asyncio.Task[None] | None = None
        self._paused = False
        self._end_watch: asyncio.TimerHandle | None = None  # while paused
        # Packets that wait to be sent, the one that the writer is at among them.
        self._buffer: deque[bytes] = deque()
        self._size = 0
        self._writer: asyncio.Task[None] | None = None
        self._high, self._low = _HIGH, _HIGH // 4
        self._protocol_paused = False
        self._closing = False
        self._over = False  # connection_lost was called, or will be in this turn of the loop

    def _begin(self) -> None:
        """Tell the protocol, then read. Nothing is read before `connection_made` was called."""
        self._call(self._protocol.connection_made, self)
        self._resume()

    def __repr__(self) -> str:
        state = "closing" if self._closing else "paused" if self._paused else "reading"
        return f"<{type(self).__name__} {self._device.name} {state} waiting={self._size}>"

    # State

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Give what lies under the transport.

        Args:
            name: ``"name"``, the interface's present name (str); ``"device"``, the `TunDevice` or
                `TapDevice`; ``"fd"``, its file descriptor (int), where it has a single queue and is
                open.
            default: given for anything else.
        """
        if name == "name":
            return self._device.name
        if name == "device":
            return self._device
        if name == "fd" and len(self._device.queues) == 1 and not self._device.closed:
            return self._device.fileno()
        return default

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Have another protocol called from now on; not its `connection_made`.

        Raises:
            TypeError: it has neither `packet_received` nor `datagram_received`.
        """
        self._received = _receiver(protocol)
        self._protocol = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        """The protocol that is called."""
        return self._protocol

    def is_closing(self) -> bool:
        """Whether `close` or `abort` was called, or the interface is gone."""
        return self._closing

    # Receiving

    def is_reading(self) -> bool:
        """Whether packets are received: neither paused nor closing."""
        return not self._paused and not self._closing

    def pause_reading(self) -> None:
        """Call `packet_received` no more, until `resume_reading`.

        Packets wait in the kernel meanwhile, and are dropped and counted there (`tx_dropped`) when
        its queue is full. That the device is closed or lost is noticed within half a second. May
        be called again.
        """
        self._paused = True
        self._stop_reading()
        self._watch_end()

    def resume_reading(self) -> None:
        """Undo `pause_reading`. May be called again."""
        self._paused = False
        if self._reader is None:
            self._loop.call_soon(self._resume)

    def _resume(self) -> None:
        if self._reader is None and self.is_reading():
            self._unwatch_end()
            # Not by the loop's factory: an eager task would call the protocol from within a call.
            self._reader = asyncio.Task(self._read(), loop=self._loop)

    def _stop_reading(self) -> None:
        # From within a callback the reader cancels itself so, and finds that it is no more.
        if self._reader is not None:
            self._reader.cancel()
            self._reader = None

    async def _read(self) -> None:
        me = self._reader
        try:
            # A cancelled recv has taken no packet, so pausing loses none.
            while self._reader is me and self.is_reading():
                packet = await self._device.recv()
                self._call(self._received, packet)
        except asyncio.CancelledError:
            if self._reader is me:  # not by us
                self.abort()
            raise
        except DeviceClosedError:
            self.abort()  # the device itself was closed, by somebody who has it, too
        except OSError as error:
            self._fail(error)
        finally:
            if self._reader is me:
                self._reader = None

    # Whoever waits for a packet is woken when the device is closed or lost. While reading is paused
    # nobody does. To wait all the same, for nothing but the end, is no way out: packets that nobody
    # wants would wake us again and again.

    def _watch_end(self) -> None:
        if self._end_watch is None and not self._closing:
            # Held weakly: a transport that its user dropped can be collected, and warn.
            self._end_watch = self._loop.call_later(_LOOK_SECONDS, _look, weakref.ref(self))

    def _unwatch_end(self) -> None:
        if self._end_watch is not None:
            self._end_watch.cancel()
            self._end_watch = None

    def _look_for_end(self) -> None:
        self._end_watch = None
        if self._device.closed:
            self.abort()
            return
        try:
            for queue in self._device.queues:
                if not queue.closed:
                    ioctl.get_flags(queue.fileno(), self._device.name)
        except OSError as error:
            if error.errno != errno.ENOTTY:  # a device in memory, which has no interface to lose
                self._fail(error)
                return
        self._watch_end()

    # Sending

    def sendto(self, data: bytes | bytearray | memoryview, addr: None = None) -> None:  # type: ignore[override]  # there are no addresses
        """Send one packet, or keep it until the kernel's send buffer has room.

        What the kernel does not take goes to `error_received`. Of what is called after the
        transport was closed nothing is sent; it is counted in `dropped`.

        Args:
            data: a whole packet or frame. It may be changed when this has returned.
            addr: None, which `datagram_received` gives. A packet has its addresses in itself.

        Raises:
            TypeError: `data` is not bytes-like.
            ValueError: `addr` is not None.
        """
        if not isinstance(data, bytes | bytearray | memoryview):
            raise TypeError(f"data is a bytes-like object, not {type(data).__name__}")
        if addr is not None:
            raise ValueError(f"addr is None, not {addr!r}: a packet has its addresses in itself")
        if self._closing:
            self.dropped += 1
            return
        if isinstance(data, memoryview) and not (
            data.ndim == data.itemsize == 1 and data.c_contiguous
        ):
            data = data.tobytes()  # len() would count items, and they may lie apart
        if not self._buffer:
            try:
                self._device.send_nowait(data)
            except BlockingIOError:
                pass
            except (AiotunError, OSError) as error:
                self._not_sent(error, soon=True)
                return
            else:
                return
        self._buffer.append(bytes(data))
        self._size += len(data)
        if self._writer is None:
            self._writer = asyncio.Task(self._write(), loop=self._loop)
        self._check_high()

    async def _write(self) -> None:
        """Send what waits, in order; ends when nothing does."""
        buffer = self._buffer
        try:
            while buffer:
                try:
                    await self._device.send(buffer[0])
                except (AiotunError, OSError) as error:
                    self._not_sent(error)
                    if self._over:
                        return
                self._size -= len(buffer.popleft())
                self._check_low()
        except asyncio.CancelledError:
            self.abort()
            raise
        finally:
            self._writer = None
        if self._closing and not self._over:
            self._end(None)

    def _not_sent(self, error: AiotunError | OSError, *, soon: bool = False) -> None:
        if isinstance(error, DeviceClosedError):
            self.dropped += not self._buffer
            self.abort()
        elif isinstance(error, DeviceLostError):
            self.dropped += not self._buffer
            self._fail(error)
        else:
            told = getattr(self._protocol, "error_received", None)
            if told is None:
                self.dropped += 1
            elif soon:
                # The caller of `sendto` may be in the middle of a callback.
                self._loop.call_soon(self._call, told, error)
            else:
                self._call(told, error)

    # Flow control

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Set at how many waiting bytes the protocol is told to pause and to resume writing.

        Args:
            high: `pause_writing` is called when more than this wait; 64 KiB, or four times `low`,
                unless given.
            low: `resume_writing` is called when this or less do; a quarter of `high` unless given.

        Raises:
            ValueError: not ``high >= low >= 0``.
        """
        if high is None:
            high = _HIGH if low is None else 4 * low
        if low is None:
            low = high // 4
        if not high >= low >= 0:
            raise ValueError(f"high ({high}) must be at least low ({low}), and low at least 0")
        self._high, self._low = high, low
        self._check_high()

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """The limits, as ``(low, high)``, in bytes."""
        return self._low, self._high

    def get_write_buffer_size(self) -> int:
        """How many bytes wait to be sent."""
        return self._size

    def _check_high(self) -> None:
        if self._size > self._high and not self._protocol_paused:
            self._protocol_paused = True
            self._call(self._protocol.pause_writing)

    def _check_low(self) -> None:
        if self._size <= self._low and self._protocol_paused:
            self._protocol_paused = False
            self._call(self._protocol.resume_writing)

    # The end

    def close(self) -> None:
        """Receive no more, send what waits, then call `connection_lost(None)`. May be repeated.

        While the kernel's send buffer is full, or the far end of it stuck, this takes its time;
        `abort` doesn't.
        """
        if not self._closing:
            self._closing = True
            self._stop_reading()
            if self._writer is None:
                self._end(None)

    def abort(self) -> None:
        """Close at once. What waits to be sent is dropped, and counted in `dropped`."""
        self._fail(None)

    def _fail(self, error: BaseException | None) -> None:
        if not self._over:
            self._closing = True
            self._stop_reading()
            self._end(error)

    def _end(self, error: BaseException | None) -> None:
        self._over = True
        self._unwatch_end()
        self.dropped += len(self._buffer)
        self._buffer.clear()
        self._size = 0
        writer, self._writer = self._writer, None
        if writer is not None:  # which may be who calls this
            writer.cancel()
        self._loop.call_soon(self._lose, error)

    def _lose(self, error: BaseException | None) -> None:
        try:
            self._call(self._protocol.connection_lost, error)
        finally:
            self._device.close()

    def _call(self, callback: Callable[..., object], *args: object) -> None:
        """Call the protocol, as the loop calls a callback."""
        try:
            callback(*args)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001 - it goes where asyncio's own would go
            name = getattr(callback, "__name__", repr(callback))
            self._loop.call_exception_handler(
                {
                    "message": f"{type(self._protocol).__name__}.{name} raised",
                    "exception": error,
                    "transport": self,
                    "protocol": self._protocol,
                }
            )


def _look(reference: weakref.ref[DeviceTransport]) -> None:
    transport = reference()
    if transport is not None:
        transport._look_for_end()


def _receiver(protocol: asyncio.BaseProtocol) -> Callable[[bytes], object]:
    """What of a protocol takes packets."""
    received: Callable[[bytes], object] | None = getattr(protocol, "packet_received", None)
    if received is not None:
        return received
    datagram_received = getattr(protocol, "datagram_received", None)
    if datagram_received is None:
        raise TypeError(
            f"{protocol!r} has no packet_received and no datagram_received; derive it from "
            "aiotun.PacketProtocol or asyncio.DatagramProtocol"
        )
    return lambda data: datagram_received(data, None)


async def create_tun_endpoint(
    factory: Callable[[], P], name: str | None = None, **options: Unpack[TunOptions]
) -> tuple[DeviceTransport, P]:
    """Open a TUN device and give its packets to a protocol; see `PacketProtocol`.

    Args:
        factory: called once the device is open; gives the protocol, which has `packet_received` or
            at least `datagram_received`, called with the address None.
        name, options: as for `open_tun`.

    Returns:
        The transport and the protocol, whose `connection_made` has been called.

    Raises:
        TypeError: that is no protocol for packets; or an argument is wrong, as is `ValueError`.
        AiotunError: as awaiting `open_tun` raises. What `factory` raises comes out, too. In each
            case nothing stays open.

    *Cancellation*: as `open_tun`; `factory` is called when nothing can be cancelled any more.

    *Concurrency*: as `open_tun`. Callbacks of one transport never overlap.
    """
    return await _connect(open_tun(name, **options), factory)


async def create_tap_endpoint(
    factory: Callable[[], P], name: str | None = None, **options: Unpack[TapOptions]
) -> tuple[DeviceTransport, P]:
    """Open a TAP device and give its frames to a protocol; see `create_tun_endpoint`.

    Args:
        factory: as for `create_tun_endpoint`.
        name, options: as for `open_tap`.

    Returns and raises what that does.

    *Cancellation*, *Concurrency*: as `create_tun_endpoint`.
    """
    return await _connect(open_tap(name, **options), factory)


async def _connect(opener: Opener[Any], factory: Callable[[], P]) -> tuple[DeviceTransport, P]:
    device = await opener
    try:
        protocol = factory()
        transport = DeviceTransport(asyncio.get_running_loop(), device, protocol)
    except BaseException:
        await device.aclose()
        raise
    transport._begin()
    return transport, protocol
