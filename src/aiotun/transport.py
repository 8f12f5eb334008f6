"""Devices for code written against asyncio's transports and protocols.

`create_tun_endpoint` does for a TUN device what `loop.create_datagram_endpoint` does for a socket.
asyncio's rules apply unless stated otherwise: callbacks run one after another in the loop's thread.
If a callback raises, the loop's exception handler gets the error, and the transport continues.
"""

from __future__ import annotations

import asyncio
import errno
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar, Unpack

from ._device.options import TapOptions, TunOptions, spell_out
from ._kernel import ioctl
from .device import Device, Opener, open_tap, open_tun
from .errors import AiotunError, DeviceClosedError, DeviceLostError

__all__ = [
    "DeviceTransport",
    "PacketProtocol",
    "create_tap_endpoint",
    "create_tun_endpoint",
    "endpoint",
]

P = TypeVar("P", bound=asyncio.BaseProtocol)

_HIGH_WATER = 64 * 1024  # bytes, like asyncio's transports

# How often a transport whose reading is paused checks that its device still exists.
_CHECK_SECONDS = 0.5


class PacketProtocol(asyncio.BaseProtocol):
    """The protocol of a `DeviceTransport`; derive from it, or from `asyncio.DatagramProtocol`.

    The transport also calls the methods of `asyncio.BaseProtocol`: first, `connection_made`, with
    the transport; last and once, `connection_lost`, with None after `close` and `abort`, otherwise
    with the error; and `pause_writing` and `resume_writing` when the number of bytes that wait to
    be sent passes the transport's limits.
    """

    def packet_received(self, data: bytes) -> None:
        """Called with each packet or frame, unless reading is paused or the transport closes."""

    def error_received(self, exc: OSError) -> None:
        """Called when a packet given to `sendto` could not be sent; the transport continues.

        `exc` is a `LinkDownError`, a `PacketError` or a `DeviceMismatchError`. `sendto` never calls
        this itself but has the loop call it soon, so it never runs inside another callback.
        """


class DeviceTransport(asyncio.DatagramTransport):
    """Passes packets between a device and a protocol.

    Attributes:
        dropped: how many packets given to `sendto` were neither sent nor reported to the protocol:
            packets that waited when the transport was aborted or the interface was deleted, packets
            given to a closing transport, and packets that could not be sent while the protocol has
            no `error_received`.

    *Closing*: the device is closed right after `connection_lost`, in a short-lived thread. To open
    the interface again, first await ``transport.get_extra_info("device").aclose()``.

    *Cancellation*: if a task of the transport is cancelled, the transport is aborted. `asyncio.run`
    does that at its end, when it cancels all remaining tasks.
    """

    __slots__ = (
        "__weakref__",
        "_buffer",
        "_closing",
        "_device",
        "_device_check",
        "_ended",
        "_high_water",
        "_loop",
        "_low_water",
        "_paused",
        "_protocol",
        "_protocol_paused",
        "_reader",
        "_receive_packet",
        "_size",
        "_writer",
        "dropped",
    )

    def __init__(
        self, loop: asyncio.AbstractEventLoop, device: Device, protocol: asyncio.BaseProtocol
    ) -> None:
        # Internal: use create_tun_endpoint, create_tap_endpoint or endpoint. This calls
        # `connection_made`.
        # Raises TypeError if the protocol can't receive packets.
        super().__init__()
        self._loop = loop
        self._device = device
        self._protocol = protocol
        self._receive_packet: Callable[[bytes], object] = _packet_callback(protocol)
        self.dropped: int = 0
        self._reader: asyncio.Task[None] | None = None
        self._paused = False
        self._device_check: asyncio.TimerHandle | None = None  # only while paused
        # Packets that wait to be sent, including the one that the writer is sending.
        self._buffer: deque[bytes] = deque()
        self._size = 0
        self._writer: asyncio.Task[None] | None = None
        self._high_water, self._low_water = _HIGH_WATER, _HIGH_WATER // 4
        self._protocol_paused = False
        self._closing = False
        self._ended = False  # connection_lost was called, or is scheduled
        # Read only after `connection_made`, which may pause reading.
        self._call(protocol.connection_made, self)
        self._start_reading()

    def __repr__(self) -> str:
        state = "closing" if self._closing else "paused" if self._paused else "reading"
        return f"<{type(self).__name__} {self._device.name} {state} waiting={self._size}>"

    # State

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return information about the device.

        Args:
            name: ``"name"`` for the interface's current name (str), ``"device"`` for the
                `TunDevice` or `TapDevice`, or ``"fd"`` for its file descriptor (int), if the device
                has a single queue and is open.
            default: returned for any other name.
        """
        if name == "name":
            return self._device.name
        if name == "device":
            return self._device
        if name == "fd" and len(self._device.queues) == 1 and not self._device.closed:
            return self._device.fileno()
        return default

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Switch to another protocol. Its `connection_made` is not called.

        Raises:
            TypeError: the protocol has neither `packet_received` nor `datagram_received`.
        """
        self._receive_packet = _packet_callback(protocol)
        self._protocol = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        """Return the current protocol."""
        return self._protocol

    def is_closing(self) -> bool:
        """Return whether `close` or `abort` was called, or the interface was deleted."""
        return self._closing

    # Receiving

    def is_reading(self) -> bool:
        """Return whether packets are received: the transport is neither paused nor closing."""
        return not self._paused and not self._closing

    def pause_reading(self) -> None:
        """Stop calling `packet_received` until `resume_reading` is called.

        Meanwhile packets wait in the kernel, which drops and counts them (`tx_dropped`) when its
        queue is full. If the device is closed or lost, the transport notices it within half a
        second. Calling this again has no effect.
        """
        self._paused = True
        self._stop_reading()
        self._schedule_device_check()

    def resume_reading(self) -> None:
        """Undo `pause_reading`. Calling this again has no effect."""
        self._paused = False
        if self._reader is None:
            self._loop.call_soon(self._start_reading)

    def _start_reading(self) -> None:
        if self._reader is None and self.is_reading():
            self._cancel_device_check()
            # Not with the loop's task factory: an eager task would run at once, and call the
            # protocol inside another callback.
            self._reader = asyncio.Task(self._read(), loop=self._loop)

    def _stop_reading(self) -> None:
        # If a callback calls this, the reader cancels itself. It then sees that it is no longer
        # the transport's reader, and stops.
        if self._reader is not None:
            self._reader.cancel()
            self._reader = None

    async def _read(self) -> None:
        me = self._reader
        try:
            # A cancelled recv takes no packet, so pausing loses none.
            while self._reader is me and self.is_reading():
                packet = await self._device.recv()
                self._call(self._receive_packet, packet)
        except asyncio.CancelledError:
            if self._reader is me:  # something else than _stop_reading cancelled this task
                self.abort()
            raise
        except DeviceClosedError:
            self.abort()  # the program closed the device instead of the transport
        except OSError as error:
            self._close_now(error)
        finally:
            if self._reader is me:
                self._reader = None

    # A task that waits in `recv` learns when the device is closed or lost, but no task waits while
    # reading is paused. So a timer checks the device then. We can't wait for readiness instead: the
    # packets that stay unread would wake us up again and again.

    def _schedule_device_check(self) -> None:
        if self._device_check is None and not self._closing:
            # The timer holds only a weak reference, so that a transport that the program no longer
            # references can be collected, and emit its ResourceWarning.
            check = weakref.WeakMethod(self._check_device)
            self._device_check = self._loop.call_later(_CHECK_SECONDS, _call_if_alive, check)

    def _cancel_device_check(self) -> None:
        if self._device_check is not None:
            self._device_check.cancel()
            self._device_check = None

    def _check_device(self) -> None:
        self._device_check = None
        if self._device.closed:
            self.abort()
            return
        try:
            for queue in self._device.queues:
                if not queue.closed:
                    ioctl.get_flags(queue.fileno(), self._device.name)
        except OSError as error:
            # ENOTTY: a device from `aiotun.testing`, which has no interface in the kernel.
            if error.errno != errno.ENOTTY:
                self._close_now(error)
                return
        self._schedule_device_check()

    # Sending

    def sendto(self, data: bytes | bytearray | memoryview, addr: None = None) -> None:  # type: ignore[override]  # there are no addresses
        """Send one packet, or keep it until the kernel's send buffer has room.

        If the packet can't be sent, the protocol's `error_received` is called. Once the transport
        is closing, this drops the packet and counts it in `dropped`.

        Args:
            data: a whole packet or frame. The caller may change it after this returns.
            addr: None, like the address that `datagram_received` gets. The packet itself contains
                its addresses.

        Raises:
            TypeError: `data` is not a bytes-like object.
            ValueError: `addr` is not None.
        """
        if not isinstance(data, bytes | bytearray | memoryview):
            raise TypeError(f"data must be a bytes-like object, got {type(data).__name__}")
        if addr is not None:
            raise ValueError(
                f"addr must be None, got {addr!r}: the packet itself contains its addresses"
            )
        if self._closing:
            self.dropped += 1
            return
        if isinstance(data, memoryview) and not (
            data.ndim == data.itemsize == 1 and data.c_contiguous
        ):
            data = data.tobytes()  # len() counts items, not bytes, and they may be apart in memory
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
        self._pause_protocol_if_full()

    async def _write(self) -> None:
        """Send the waiting packets in order. Returns when there are none left."""
        buffer = self._buffer
        try:
            while buffer:
                try:
                    await self._device.send(buffer[0])
                except (AiotunError, OSError) as error:
                    self._not_sent(error)
                    if self._ended:
                        return
                self._size -= len(buffer.popleft())
                self._resume_protocol_if_drained()
        except asyncio.CancelledError:
            self.abort()
            raise
        finally:
            self._writer = None
        if self._closing and not self._ended:
            self._schedule_connection_lost(None)

    def _not_sent(self, error: AiotunError | OSError, *, soon: bool = False) -> None:
        if isinstance(error, DeviceClosedError):
            self.dropped += not self._buffer
            self.abort()
        elif isinstance(error, DeviceLostError):
            self.dropped += not self._buffer
            self._close_now(error)
        else:
            error_received = getattr(self._protocol, "error_received", None)
            if error_received is None:
                self.dropped += 1
            elif soon:
                # The caller of `sendto` may be a callback, and callbacks must not overlap.
                self._loop.call_soon(self._call, error_received, error)
            else:
                self._call(error_received, error)

    # Flow control

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Set the limits, in bytes that wait to be sent, at which the protocol pauses and resumes.

        Args:
            high: `pause_writing` is called when more bytes than this wait. The default is four
                times `low` if that is given, otherwise 64 KiB.
            low: `resume_writing` is called when this many bytes or fewer wait. The default is a
                quarter of `high`.

        Raises:
            ValueError: not ``high >= low >= 0``.
        """
        if high is None:
            high = _HIGH_WATER if low is None else 4 * low
        if low is None:
            low = high // 4
        if not high >= low >= 0:
            raise ValueError(
                f"high must be at least low, and low at least 0; got high={high}, low={low}"
            )
        self._high_water, self._low_water = high, low
        self._pause_protocol_if_full()

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """Return the limits, as ``(low, high)``, in bytes."""
        return self._low_water, self._high_water

    def get_write_buffer_size(self) -> int:
        """Return how many bytes wait to be sent."""
        return self._size

    def _pause_protocol_if_full(self) -> None:
        if self._size > self._high_water and not self._protocol_paused:
            self._protocol_paused = True
            self._call(self._protocol.pause_writing)

    def _resume_protocol_if_drained(self) -> None:
        if self._size <= self._low_water and self._protocol_paused:
            self._protocol_paused = False
            self._call(self._protocol.resume_writing)

    # The end

    def close(self) -> None:
        """Stop receiving, send the waiting packets, then call `connection_lost(None)`.

        The transport waits for as long as the kernel's send buffer is full, which may be forever;
        use `abort` to close without waiting. Calling this again has no effect.
        """
        if not self._closing:
            self._closing = True
            self._stop_reading()
            if self._writer is None:
                self._schedule_connection_lost(None)

    def abort(self) -> None:
        """Close at once. Packets that wait to be sent are dropped, and counted in `dropped`."""
        self._close_now(None)

    def _close_now(self, error: BaseException | None) -> None:
        if not self._ended:
            self._closing = True
            self._stop_reading()
            self._schedule_connection_lost(error)

    def _schedule_connection_lost(self, error: BaseException | None) -> None:
        # Packets that still wait are dropped.
        self._ended = True
        self._cancel_device_check()
        self.dropped += len(self._buffer)
        self._buffer.clear()
        self._size = 0
        writer, self._writer = self._writer, None
        if writer is not None:  # the writer task itself may be the caller
            writer.cancel()
        self._loop.call_soon(self._connection_lost, error)

    def _connection_lost(self, error: BaseException | None) -> None:
        try:
            self._call(self._protocol.connection_lost, error)
        finally:
            self._device.close()

    def _call(self, callback: Callable[..., object], *args: object) -> None:
        """Call the protocol, and give what it raises to the loop's exception handler."""
        try:
            callback(*args)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001 - asyncio's transports do the same
            name = getattr(callback, "__name__", repr(callback))
            self._loop.call_exception_handler(
                {
                    "message": f"{type(self._protocol).__name__}.{name} raised",
                    "exception": error,
                    "transport": self,
                    "protocol": self._protocol,
                }
            )


def _call_if_alive(reference: weakref.WeakMethod[Callable[[], None]]) -> None:
    method = reference()
    if method is not None:
        method()


def _packet_callback(protocol: asyncio.BaseProtocol) -> Callable[[bytes], object]:
    """Return the method of a protocol that receives packets."""
    if isinstance(protocol, type):
        raise TypeError(
            f"{protocol!r} is a class, and the protocol must be an object; "
            f"write {protocol.__name__}()"
        )
    packet_received: Callable[[bytes], object] | None = getattr(protocol, "packet_received", None)
    if packet_received is not None:
        return packet_received
    datagram_received = getattr(protocol, "datagram_received", None)
    if datagram_received is None:
        raise TypeError(
            f"{protocol!r} has neither packet_received nor datagram_received; derive it from "
            "aiotun.PacketProtocol or asyncio.DatagramProtocol"
        )
    return lambda data: datagram_received(data, None)


def endpoint(device: Device, protocol: asyncio.BaseProtocol) -> DeviceTransport:
    """Give the packets of an open device to a protocol, in the running event loop.

    This is not async: use it where the device is open already, for example in code that opened it
    with ``open_blocking()``. From here on the transport owns the device and closes it.

    Args:
        device: an open device. Don't receive from it any more: a packet goes to either.
        protocol: has `packet_received` or `datagram_received`; see `create_tun_endpoint`.

    Returns:
        The transport. `connection_made` of the protocol has been called with it.

    Raises:
        TypeError: `device` is not a device, or the protocol can't receive packets.
        DeviceClosedError: the device is closed.
        DeviceLostError: the interface was deleted.
        RuntimeError: no event loop is running, or another loop uses the device.

    If this raises, the caller still owns the device.

    *Concurrency*: callbacks of one transport never overlap.
    """
    given: object = device
    if not isinstance(given, Device):
        text = f"device must be an open TunDevice or TapDevice, got {type(given).__name__}"
        if isinstance(given, Opener):
            text += "; await it, or call its open_blocking(), and pass the result"
        raise TypeError(text)
    device._bind()
    return DeviceTransport(asyncio.get_running_loop(), device, protocol)


@spell_out(TunOptions)
async def create_tun_endpoint(
    factory: Callable[[], P], name: str | None = None, **options: Unpack[TunOptions]
) -> tuple[DeviceTransport, P]:
    """Open a TUN device and give its packets to a protocol; see `PacketProtocol`.

    Args:
        factory: called without arguments once the device is open; returns the protocol. The
            protocol must have `packet_received` or `datagram_received`; the latter is called with
            the address None.
        name, options: as for `open_tun`.

    Returns:
        The transport and the protocol, whose `connection_made` has been called.

    Raises:
        TypeError: the protocol can't receive packets, or an argument is invalid.
        ValueError: an argument is invalid.
        AiotunError: as awaiting `open_tun` raises.
        Exception: whatever `factory` raises.

    If this raises, it leaves nothing open.

    *Cancellation*: as `open_tun`. `factory` is called last, when the opening can't be cancelled any
    more.

    *Concurrency*: as `open_tun`. Callbacks of one transport never overlap.
    """
    return await _connect(open_tun(name, **options), factory)


@spell_out(TapOptions)
async def create_tap_endpoint(
    factory: Callable[[], P], name: str | None = None, **options: Unpack[TapOptions]
) -> tuple[DeviceTransport, P]:
    """Open a TAP device and give its frames to a protocol; see `create_tun_endpoint`.

    Args:
        factory: as for `create_tun_endpoint`.
        name, options: as for `open_tap`.

    Returns and raises as `create_tun_endpoint`.

    *Cancellation*, *Concurrency*: as `create_tun_endpoint`.
    """
    return await _connect(open_tap(name, **options), factory)


async def _connect(opener: Opener[Any], factory: Callable[[], P]) -> tuple[DeviceTransport, P]:
    device = await opener
    try:
        protocol = factory()
        return DeviceTransport(asyncio.get_running_loop(), device, protocol), protocol
    except BaseException:
        await device.aclose()
        raise
