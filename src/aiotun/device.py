"""Devices: one interface, the queues that this program holds on it, and its link."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NoReturn, Self, TypeVar, Unpack

from ._device import options as device_options
from ._device.adopting import adopt
from ._device.opening import Opened, Opening
from ._device.options import TapOptions, TunOptions
from ._kernel import ioctl, threads
from ._kernel.interface import Interface
from ._kernel.namespaces import NetnsArg
from ._kernel.words import Mode, Offload, parse_mac
from ._queue.packetio import PacketIO, PacketStats
from ._queue.port import PacketFormat
from ._queue.splitport import make_port
from ._queue.waiting import Line
from .errors import DeviceClosedError
from .link import Link
from .queue import Queue

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Buffer

    from ._kernel.words import DecodeErrors
    from ._queue.group import QueueGroup
    from .capture import Capture, PcapWriter
    from .decode import IP, IP6, Ethernet

__all__ = ["Device", "Opener", "TapDevice", "TunDevice", "open_tap", "open_tun"]

T = TypeVar("T")
D = TypeVar("D", bound="Device")


class Device(PacketIO):
    """A TUN or TAP device; see `open_tun`, `open_tap` and `TunDevice.from_fd`.

    It receives from whichever of its queues is ready, in turn, and sends on the queue that the
    packet's flow belongs to. A queue and its device may be used at the same time.

    Attributes:
        queues: the queues, those that were closed or detached among them.
        link: the interface's addresses, routes and state; works on after the device is closed, for
            as long as the interface lives.
    """

    __slots__ = ("__weakref__", "_interface", "_io", "link", "queues")

    _kind: ClassVar[Mode]

    def __init__(self, opened: Opened, packets: PacketFormat) -> None:
        # Internal: use open_tun, open_tap or from_fd.
        line = Line()  # of those who wait for a packet of any queue
        queues = [Queue(fd, opened.interface, make_port(packets), shared=line) for fd in opened.fds]
        self._set_up(tuple(queues), line, opened.interface, Link._held(opened.interface))

    def _set_up(
        self, queues: tuple[Queue, ...], line: Line, interface: Interface, link: Link
    ) -> None:
        self._interface = interface
        self.queues: tuple[Queue, ...] = queues
        self.link: Link = link
        # What packets go through: the only queue, or all of them as one.
        self._io: Queue | QueueGroup = queues[0]
        if len(queues) > 1:
            from ._queue.group import QueueGroup

            self._io = QueueGroup(queues, line)

    @classmethod
    def from_fd(
        cls,
        fd: int,
        *more: int,
        netns: NetnsArg | None = None,
        packet_info: bool = False,
        offload: Offload | None = None,
    ) -> Self:
        """Make a device of queues that somebody else opened.

        They were inherited, say, or received by SCM_RIGHTS. The fds become the device's,
        non-blocking and close-on-exec; where this raises they are still the caller's. The kernel is
        asked for kind, name, index, MTU, virtio-net header and its size, and packet information.

        The interface may be in a network namespace that this program may not enter, or of which the
        kernel does not tell. Packets pass all the same; `index` and `mtu` are 0 then, every request
        of `link` raises `LinkError` or `NotPermittedError`, and `packet_info` is believed.

        Args:
            fd, more: the queues, all of the same interface.
            netns: the interface's network namespace. The kernel knows it, and tells those who have
                CAP_NET_ADMIN there; else None means this thread's, if it has such an interface.
            packet_info: whether packets come with the 4-byte header.
            offload: None means ``"raw"`` where the device has a virtio-net header, else ``"off"``.
                The header may have 10 or 12 bytes: see `vnet_header_size`.

        Raises:
            ValueError: an fd that is not open, or is no TUN/TAP queue, or is given twice; or
                `packet_info` with a virtio-net header.
            DeviceMismatchError: they are of another kind, of different interfaces, or their headers
                differ from what `offload` and `packet_info` say; or the virtio-net header has
                neither 10 nor 12 bytes.
            DeviceLostError: the interface is gone.
            LinkError: there is no such interface in the namespace that `netns` names, or no such
                namespace.
            ResourceLimitError: no thread can be started, or no file descriptor is left to ask with.
        """
        opened, packets = adopt(
            cls._kind, [fd, *more], netns=netns, packet_info=packet_info, offload=offload
        )
        return cls(opened, packets)

    # What is known of it

    @property
    def name(self) -> str:
        """The interface's name; follows a rename made through `link` or seen by its events."""
        return self._interface.name

    @property
    def index(self) -> int:
        """The interface's number, which a rename does not change (but a move may: `Link`).

        0 where it is not known: see `from_fd`.
        """
        return self._interface.index or 0

    @property
    def mtu(self) -> int:
        """The link's IP MTU in bytes; follows a change made by `link` or seen by its events.

        0 where it is not known: see `from_fd`.
        """
        return self._interface.mtu or 0

    @property
    def mode(self) -> Mode:
        """``"tun"`` or ``"tap"``."""
        return self._kind

    @property
    def offload(self) -> Offload:
        """What was asked for at opening."""
        return self.queues[0].offload

    @property
    def vnet_header_size(self) -> int:
        """The size in bytes of the virtio-net header, 10 or 12; 0 with ``offload="off"``.

        With ``"raw"`` each packet begins with it, both ways; with ``"split"`` the program does not
        see it. 12 only where `from_fd` was given such a device.
        """
        return self.queues[0].vnet_header_size

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"queues={len(self.queues)}"
        return f"<{type(self).__name__} {self.name} {state}>"

    def __reduce__(self) -> NoReturn:
        """Refuse to be copied or pickled.

        Raises:
            TypeError: always. A queue can go to another process; a device is this process's.
        """
        raise TypeError(
            f"{self!r} can't be copied or pickled: pass the device itself around in this process, "
            "and to another process send its queues (device.queues)"
        )

    # Packets: whatever has the queues does it

    # (Not coroutines of their own where that would cost every packet one more.)

    def recv(self) -> Coroutine[Any, Any, bytes]:
        return self._io.recv()

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._io

    async def __anext__(self) -> bytes:
        return await self._io.__anext__()

    def recv_nowait(self) -> bytes:
        return self._io.recv_nowait()

    def send(self, packet: Buffer) -> Coroutine[Any, Any, None]:
        return self._io.send(packet)

    def send_many(self, packets: Iterable[Buffer]) -> Coroutine[Any, Any, int]:
        return self._io.send_many(packets)

    def send_nowait(self, packet: Buffer) -> None:
        self._io.send_nowait(packet)

    def close(self) -> None:
        self._io.close()

    async def aclose(self) -> None:
        await self._io.aclose()

    @property
    def closed(self) -> bool:
        return self._io.closed

    def fileno(self) -> int:
        return self._io.fileno()

    @property
    def stats(self) -> PacketStats:
        return self._io.stats

    @property
    def _mode(self) -> Mode:
        return self._kind

    @property
    def _header_bytes(self) -> int:
        return self._io._header_bytes

    def _bind(self) -> object:
        return self._io._bind()

    def _receive(self, take: Callable[[PacketIO], T]) -> Coroutine[Any, Any, T]:
        return self._io._receive(take)

    def _take(self) -> bytes:
        return self._io._take()

    def _take_into(self, octets: memoryview) -> int:
        return self._io._take_into(octets)

    def _take_many(self, limit: int) -> list[bytes]:
        return self._io._take_many(limit)

    def _count_undecodable(self) -> None:
        self._io._count_undecodable()

    # Capture

    def capture(self, writer: PcapWriter) -> Capture:
        """Record every packet that is received or sent from now on, as the program sees it.

        That is by any method, of the device or of a queue: each packet once, when it is handed out
        or the kernel has taken it. ``"in"`` is what the program received. A packet is recorded
        without the header that `packet_info` or ``offload="raw"`` puts in front of it; with the
        latter it may be a super-packet, whose checksum is the receiver's to complete. What
        `recv_into` cuts off is recorded too.

        Several captures may be under way. While there is none, nothing costs more for it.

        Args:
            writer: stays open, and is closed after the capture has stopped: what comes in between
                would be counted as dropped.

        Returns:
            The capture: a context manager, which stops it at its end. It ends with the device, too.

        Raises:
            ValueError: the writer is of the other mode, or closed.
        """
        from ._queue.recordingport import record

        if writer.mode != self._kind:
            raise ValueError(
                f"{writer!r} is for a {writer.mode.upper()} device; make one with "
                f"mode={self._kind!r}"
            )
        if writer.closed:
            raise ValueError(f"{writer!r} is closed; make another to go on")
        return record(self.queues, writer)

    # The rest of the kernel's TUN/TAP interface

    def set_carrier(self, on: bool) -> None:
        """Plug the cable in, or pull it (TUNSETCARRIER).

        Without carrier the kernel routes nothing to the interface. Reading and writing go on.

        Raises:
            DeviceMismatchError: the kernel is older than 5.0.
            DeviceClosedError, DeviceLostError: as `recv`.
        """
        ioctl.set_carrier(self._any_fd(), self.name, on)

    def set_steering_ebpf(self, program: int | None) -> None:
        """Have a BPF program choose the queue for each packet (TUNSETSTEERINGEBPF).

        Args:
            program: the fd of a program of the type BPF_PROG_TYPE_SOCKET_FILTER; what it returns,
                modulo the number of queues, is the queue. None goes back to the kernel's own way.

        Raises:
            DeviceMismatchError: the kernel does not take that fd for such a program.
            DeviceClosedError, DeviceLostError: as `recv`.
        """
        number = -1 if program is None else program
        ioctl.set_steering_ebpf(self._any_fd(), self.name, number)

    def set_filter_ebpf(self, program: int | None) -> None:
        """Have a BPF program drop or cut packets before they are queued (TUNSETFILTEREBPF).

        Args:
            program: the fd of a program of the type BPF_PROG_TYPE_SOCKET_FILTER; 0 drops the
                packet, any other number is how many bytes to keep. None takes it off.

        Raises:
            DeviceMismatchError: the kernel does not take that fd for such a program.
            DeviceClosedError, DeviceLostError: as `recv`.
        """
        number = -1 if program is None else program
        ioctl.set_filter_ebpf(self._any_fd(), self.name, number)

    def _any_fd(self) -> int:
        for queue in self.queues:
            if not queue.closed:
                queue.check_open()
                return queue.fileno()
        raise DeviceClosedError(f"{self.name} was closed here; open it again to go on")


class TunDevice(Device):
    """A device whose packets are IP packets."""

    __slots__ = ()

    _kind: ClassVar[Mode] = "tun"

    if TYPE_CHECKING:
        # Only its type is news.
        def decoded(self, errors: DecodeErrors = "skip") -> AsyncIterator[IP | IP6]: ...


class TapDevice(Device):
    """A device whose packets are Ethernet frames."""

    __slots__ = ()

    _kind: ClassVar[Mode] = "tap"

    if TYPE_CHECKING:

        def decoded(self, errors: DecodeErrors = "skip") -> AsyncIterator[Ethernet]: ...

    def attach_filter(self, program: Sequence[tuple[int, int, int, int]] | None) -> None:
        """Have a classic BPF program drop frames before they are queued (TUNATTACHFILTER).

        Args:
            program: its instructions as ``(code, jt, jf, k)`` (filter.h), such as
                ``tcpdump -ddd`` prints; what it returns is how many bytes to keep. None takes the
                filter off (TUNDETACHFILTER).

        Raises:
            DeviceMismatchError: the kernel finds the program wrong.
            DeviceClosedError, DeviceLostError: as `recv`.
        """
        ioctl.attach_filter(self._any_fd(), self.name, program)

    def set_tx_filter(self, macs: Iterable[str], *, all_multicast: bool = False) -> None:
        """Receive only frames for these addresses (TUNSETTXFILTER).

        Args:
            macs: addresses such as ``"02:00:00:00:00:01"``; multicast and broadcast ones are
                filtered like any other. None at all: every frame is received again.
            all_multicast: receive multicast frames as well.

        Raises:
            ValueError: one is no MAC.
            DeviceClosedError, DeviceLostError: as `recv`.
        """
        packed = [bytes.fromhex(parse_mac(mac, multicast=True).replace(":", "")) for mac in macs]
        ioctl.set_tx_filter(self._any_fd(), self.name, packed, all_multicast)


class Opener(Generic[D]):
    """What `open_tun` and `open_tap` give: await it, or enter it with ``async with``; once."""

    __slots__ = ("_device", "_kind", "_options", "_used")

    def __init__(self, kind: type[D], options: device_options.Options) -> None:
        self._kind = kind
        self._options = options
        self._device: D | None = None
        self._used = False

    def __await__(self) -> Generator[Any, None, D]:
        return self._open().__await__()

    async def __aenter__(self) -> D:
        self._device = await self._open()
        return self._device

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        device, self._device = self._device, None
        if device is not None:
            await device.aclose()

    if not TYPE_CHECKING:  # a checker knows what an opener has, and finds the mistake by itself

        def __getattr__(self, name: str) -> Any:
            # Never a private name: copying and pickling ask an object that has no `_kind` yet.
            if name.startswith("_") or not hasattr(self._kind, name):
                text = f"{type(self).__name__!r} object has no attribute {name!r}"
                raise AttributeError(text, name=name, obj=self)
            raise AttributeError(self._forgotten(f"it has no {name!r}"), name=name, obj=self)

        def __aiter__(self) -> Any:
            raise TypeError(self._forgotten("it has no packets"))

        def __enter__(self) -> Any:
            raise TypeError(self._forgotten("it can't be entered by 'with' alone"))

        def __exit__(self, *error: object) -> None: ...

    def _forgotten(self, what: str) -> str:
        """Say what to write where the opener is used as if it were the device."""
        kind = self._kind._kind
        return (
            f"this is the opener of a device, not the device, and {what}; write "
            f"'{kind} = await open_{kind}(...)' or 'async with open_{kind}(...) as {kind}:', and "
            f"use '{kind}'"
        )

    async def _open(self) -> D:
        if self._used:
            raise RuntimeError("this opener was used before; call open_tun or open_tap again")
        self._used = True
        opening = Opening(self._options)
        opened = await threads.run(opening.run, on_cancel=opening.abort, undo=opening.undo)
        wanted = self._options
        packets = PacketFormat(wanted.mode, wanted.offload, wanted.packet_info)
        return self._kind(opened, packets)


def open_tun(name: str | None = None, **options: Unpack[TunOptions]) -> Opener[TunDevice]:
    """Open a TUN device, creating it where it does not exist.

    Arguments are checked at once; nothing else happens before the result is awaited, or entered
    with ``async with``, which closes the device at the end. It can be used once.

    If a step fails, or the opening is cancelled, no fd stays open and an interface that was created
    is gone. On one that existed, addresses and routes that were added are removed, and MTU, queue
    length, state, MAC, master and IPv6 autoconfiguration put back. What was configured stays after
    an ordinary close, if the interface does.

    On a device that is already as asked for, no call is made that needs privilege, so an ordinary
    user can open what root prepared.

    Args:
        name: 1 to 15 bytes; None lets the kernel pick ``tunN``, ``"vpn%d"`` the lowest free number.
        queues (int): how many, 1 to 256; the kernel spreads flows over them. 1 unless given.
        multi_queue (bool): whether the device is one for several queues; unless given, if `queues`
            is above 1. True with one queue attaches to a device that others share.
        addresses: ``"10.0.0.1/24"``, ``"fd00::1/64"``, ``"10.0.0.1 peer 10.0.0.2/32"``, or objects
            of the ipaddress module.
        routes: ``"DST [via GATEWAY [onlink]] [metric N] [table N]"``, DST a network, an address or
            ``default``, or objects of the ipaddress module; always through this device. ``onlink``
            is for a gateway that is in none of the device's networks.
        mtu (int): the link's IP MTU in bytes, 68 to 65535; with IPv6 1280 at least.
        txqueuelen (int): how many packets each queue holds in the kernel, 0 to 524288.
        up (bool): whether to bring the link up, which is the default; False leaves it as it is.
        netns: the network namespace to open it in: a `Namespace`, a name under /run/netns, a path,
            or an open fd. The program itself does not move, and a missing one is not created.
        persist (bool): whether the interface outlives its last queue; unless given, that stays as
            it is.
        owner, group: who may attach later without privilege, by name or number.
        exclusive (bool): whether to fail if the interface exists.
        offload: ``"off"``, the default, for plain packets. With ``"split"`` the kernel hands over
            64 KiB at a time, which come out as packets no larger than the MTU, and `send_many`
            merges runs of one flow: the same, only faster. ``"raw"`` gives a 10-byte virtio-net
            header and then a packet of up to 64 KiB, and `send` takes the same.
        packet_info (bool): whether each packet has the kernel's 4-byte ``tun_pi`` header in front.
        napi (bool): whether the kernel receives by NAPI what is sent here (IFF_NAPI).
        ipv6_autoconf (bool): False: the kernel gives the interface no IPv6 link-local address and
            solicits no routers, which it otherwise does as the link comes up; one that it has
            already made is removed. True: the kernel does so when the link comes up next. Unless
            given, that stays as it is. Addresses of your own are not affected.
        carrier (bool): the carrier to begin with.
        sndbuf (int): how many bytes may be under way in the kernel before `send` waits
            (TUNSETSNDBUF); without a limit it never does.

    Returns:
        An opener of a `TunDevice`.

    Raises:
        TypeError, ValueError: an argument is wrong.

    Awaiting or entering it raises:
        TunUnavailableError: this machine has no TUN/TAP driver.
        NotPermittedError: a step needs a privilege that this user lacks, or IPv6 is switched off
            for the interface (``disable_ipv6``).
        DeviceBusyError: somebody else has the device, or it exists and `exclusive` was given.
        DeviceMismatchError: it exists, and is of another kind or has other flags.
        LinkError: the kernel refused an address, a route or the like; or no such namespace.
        ResourceLimitError: no thread can be started, or no file descriptor or memory is left.

    *Cancellation*: waits for the step under way (milliseconds), then undoes all. Where no thread
    can be started for that, it is done in the event loop's thread, which it blocks meanwhile.

    *Concurrency*: any number of openings may be under way at once; of several for one single-queue
    device one succeeds.

    Source: ``include/uapi/linux/if_tun.h``, ``Documentation/networking/tuntap.rst``.
    """
    # TapOptions: what only a TAP has is refused below, with the reason.
    device_options.check_words("open_tun", options, TapOptions)
    return Opener(TunDevice, device_options.check("tun", name, **options))


def open_tap(name: str | None = None, **options: Unpack[TapOptions]) -> Opener[TapDevice]:
    """Open a TAP device, creating it where it does not exist.

    Takes what `open_tun` takes, behaves and raises as it does; `mtu` goes to 65521, the kernel
    picks ``tapN``, and there are two more:

    Args:
        name: as `open_tun`.
        mac (str): the interface's own address, such as ``"02:00:00:00:00:01"``; unless given, one
            that the kernel made up.
        bridge (str): attach the interface to this bridge, which must exist.

    Returns:
        An opener of a `TapDevice`.

    *Cancellation*, *Concurrency*: as `open_tun`.

    Source: as `open_tun`.
    """
    device_options.check_words("open_tap", options, TapOptions)
    return Opener(TapDevice, device_options.check("tap", name, **options))
