"""Devices: an interface, the queues that this program holds on it, and its link."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Self, TypeVar, Unpack

from ._device import options as device_options
from ._device.opening import Opened, Opening
from ._device.options import TapOptions, TunOptions
from ._kernel import ioctl, threads
from ._kernel.interface import Interface
from ._kernel.limits import naming_limits
from ._kernel.namespaces import NetnsArg
from ._kernel.once import Once
from ._kernel.words import Mode, Offload, parse_mac
from ._queue.packetio import PacketIO, PacketStats
from ._queue.port import Offloads, PacketFormat
from ._queue.splitport import make_port
from ._queue.waiting import Line
from .errors import DeviceClosedError
from .link import Link
from .queue import Queue

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from ._kernel.words import DecodeErrors
    from ._packets.runs import Layout, Pool, Run
    from ._queue.group import QueueGroup
    from .capture import Capture, PcapWriter
    from .decode import IP, IP6, Ethernet

__all__ = ["Device", "Opener", "TapDevice", "TunDevice", "open_tap", "open_tun"]

T = TypeVar("T")
D = TypeVar("D", bound="Device")


class Device(PacketIO):
    """A TUN or TAP device; see `open_tun`, `open_tap` and `TunDevice.from_fd`.

    A device receives from its queues in turn, and sends a packet on the queue that the packet's
    flow belongs to. A queue and its device may be used at the same time.

    Attributes:
        queues: the queues, including those that were closed or detached.
        link: the interface's addresses, routes and state. It can be used after the device is
            closed, for as long as the interface exists.
    """

    __slots__ = ("__weakref__", "_interface", "_io", "link", "queues")

    _mode: ClassVar[Mode]  # of the subclass

    def __init__(self, opened: Opened, packets: PacketFormat) -> None:
        # Internal: use open_tun, open_tap or from_fd.
        line = Line()  # the tasks that wait for a packet of any queue
        queues = [Queue(fd, opened.interface, make_port(packets), shared=line) for fd in opened.fds]
        self._set_up(tuple(queues), line, opened.interface, Link._held(opened.interface))

    def _set_up(
        self, queues: tuple[Queue, ...], line: Line, interface: Interface, link: Link
    ) -> None:
        self._interface = interface
        self.queues: tuple[Queue, ...] = queues
        self.link: Link = link
        # All packets go through this: the only queue, or a group of all queues.
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
        """Make a device from queues that another program opened.

        The fds may have been inherited, or received with SCM_RIGHTS. The device takes ownership of
        them and makes them non-blocking and close-on-exec. If this raises, the caller still owns
        them. The kernel reports the kind, name, index, MTU, virtio-net header and its size, and
        packet information.

        The interface may be in a network namespace that this program can't enter, or that the
        kernel does not report. Packets pass anyway. In that case `index` and `mtu` are 0, every
        request of `link` raises `LinkError` or `NotPermittedError`, and `packet_info` is not
        checked.

        Args:
            fd, more: the queues, all of the same interface.
            netns: the interface's network namespace. With None the kernel reports it, if the
                program has CAP_NET_ADMIN there; otherwise None means the calling thread's, if that
                has such an interface.
            packet_info: whether packets have the 4-byte header.
            offload: None means ``"raw"`` if the device has a virtio-net header, otherwise
                ``"off"``. The header may have 10 or 12 bytes: see `vnet_header_size`.

        Raises:
            ValueError: an fd is not open, is not a TUN/TAP queue, or is given twice; or
                `packet_info` is given for a device with a virtio-net header.
            DeviceMismatchError: the queues are of another kind or of different interfaces, or their
                headers do not match `offload` and `packet_info`, or the virtio-net header has
                neither 10 nor 12 bytes.
            DeviceLostError: the interface was deleted.
            LinkError: the namespace that `netns` names does not exist, or has no such interface.
            ResourceLimitError: no thread can be started, or no file descriptor is left.
        """
        with naming_limits():  # even an import needs a file descriptor
            from ._device.adopting import adopt
        opened, packets = adopt(
            cls._mode, [fd, *more], netns=netns, packet_info=packet_info, offload=offload
        )
        return cls(opened, packets)

    # Properties

    @property
    def name(self) -> str:
        """The interface's name; follows a rename made with `link` or seen by its events."""
        return self._interface.name

    @property
    def index(self) -> int:
        """The interface's index. A rename does not change it, but a move may (see `Link`).

        0 if it is not known: see `from_fd`.
        """
        return self._interface.index or 0

    @property
    def mtu(self) -> int:
        """The link's IP MTU in bytes; follows a change made with `link` or seen by its events.

        0 if it is not known: see `from_fd`.
        """
        return self._interface.mtu or 0

    @property
    def mode(self) -> Mode:
        """``"tun"`` or ``"tap"``."""
        return self._mode

    @property
    def offload(self) -> Offload:
        """The offload mode that the device was opened with."""
        return self.queues[0].offload

    @property
    def vnet_header_size(self) -> int:
        """The size in bytes of the virtio-net header, 10 or 12; 0 with ``offload="off"``.

        With ``"raw"`` each packet begins with it, both ways; with ``"split"`` the program does not
        see it. 12 only where `from_fd` was given such a device.
        """
        return self.queues[0].vnet_header_size

    @property
    def offloads(self) -> Offloads:
        """The kinds of super-packets that the kernel accepts; empty with ``offload="off"``.

        Before Linux 6.2 there is no `USO`. Then ``offload.merge(packets, udp=False)`` makes only
        super-packets that a raw device passes to the kernel as they are. One of another kind is
        sent as the packets that it consists of, which is slower (`PacketStats.split_fallbacks`).

        On a device that this program opened alone, this is what the kernel took when aiotun asked
        for it (TUNSETOFFLOAD), so it also says which kinds may be received. If other programs hold
        the device, or `from_fd` was given it, aiotun does not change what they asked for, and the
        kernel tells nobody what that was. Then this says which kinds the kernel's driver knows
        (ETHTOOL_GFEATURES): it accepts these from any program, and may hand over fewer. TCP is
        certain even where the interface can't be reached; UDP is left out there.
        """
        return self.queues[0].offloads

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"queues={len(self.queues)}"
        return f"<{type(self).__name__} {self.name} {state}>"

    def __reduce__(self) -> NoReturn:
        """Refuse to be copied or pickled.

        Raises:
            TypeError: always. A queue can be sent to another process, but a device can't.
        """
        raise TypeError(
            f"{self!r} can't be copied or pickled; use the same object everywhere in this process, "
            "and send its queues (device.queues) to another process"
        )

    # Packets. These methods pass the call on to the queue or the group of queues. They return its
    # coroutine instead of awaiting it: a coroutine more would cost time for every packet.

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

    def recv_run(
        self, pool: Pool, *, before: int = 16, after: int = 16, align: int = 16, limit: int = 45
    ) -> Coroutine[Any, Any, Run]:
        return self._io.recv_run(pool, before=before, after=after, align=align, limit=limit)

    def send_run(
        self, run: Run, *, before: int = 0, sizes: Sequence[int] | None = None
    ) -> Coroutine[Any, Any, int]:
        return self._io.send_run(run, before=before, sizes=sizes)

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
    def _format(self) -> PacketFormat:
        return self._io._format

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

    async def _wait_for_buffer(self, pool: Pool) -> None:
        await self._io._wait_for_buffer(pool)

    def _take_run(self, pool: Pool, layout: Layout) -> Run:
        return self._io._take_run(pool, layout)

    def _count_undecodable(self) -> None:
        self._io._count_undecodable()

    # Capture

    def capture(self, writer: PcapWriter) -> Capture:
        """Record every packet that is received or sent from now on, as the program sees it.

        This records the packets of all methods, of the device and of its queues. Each packet is
        recorded once: when a method returns it, or when the kernel has accepted it. The direction
        ``"in"`` means that the program received the packet. The header that `packet_info` or
        ``offload="raw"`` puts in front of a packet is not recorded. With ``offload="raw"`` a record
        may be a super-packet whose checksum is not complete. A packet that `recv_into` truncates is
        recorded whole.

        Several captures may run at the same time. Without a capture, packets cost no extra time.

        Args:
            writer: the writer, which this leaves open. Close it after the capture has stopped:
                packets for a closed writer are counted as dropped.

        Returns:
            The capture, a context manager that stops the capture at the end of the block. Closing
            the device stops it, too.

        Raises:
            TypeError: `writer` is not a writer.
            ValueError: the writer is for the other mode, or closed.
        """
        from ._queue.recordingport import record

        if not hasattr(writer, "record"):
            raise TypeError(
                f"capture needs a PcapWriter, got {writer!r}; write "
                "'with PcapWriter(file, tun.mode) as writer:' first"
            )
        if writer.mode != self._mode:
            raise ValueError(
                f"{writer!r} is for a {writer.mode.upper()} device; "
                f"create a writer with mode={self._mode!r}"
            )
        if writer.closed:
            raise ValueError(f"{writer!r} is closed; create another writer")
        return record(self.queues, writer)

    # The rest of the kernel's TUN/TAP interface

    def set_carrier(self, on: bool) -> None:
        """Switch the carrier on or off, as if a cable were plugged in or pulled (TUNSETCARRIER).

        Without a carrier the kernel routes no packets to the interface. Receiving and sending still
        work.

        Raises:
            DeviceMismatchError: the kernel is older than 5.0.
            DeviceClosedError, DeviceLostError: as `recv`.
        """
        given: object = on
        if not isinstance(given, int):  # 0 and 1 are as good
            raise TypeError(f"on must be True or False, got {given!r}")
        ioctl.set_carrier(self._any_fd(), self.name, on)

    def set_steering_ebpf(self, program: int | None) -> None:
        """Let a BPF program choose the queue for each packet (TUNSETSTEERINGEBPF).

        Args:
            program: the fd of a program of the type BPF_PROG_TYPE_SOCKET_FILTER. The value that it
                returns, modulo the number of queues, is the queue. None restores the kernel's own
                choice.

        Raises:
            DeviceMismatchError: the fd is not such a program.
            TypeError, ValueError: `program` is not an open fd.
            DeviceClosedError, DeviceLostError: as `recv`.
        """
        number = _bpf_fd(program)
        ioctl.set_steering_ebpf(self._any_fd(), self.name, number)

    def set_filter_ebpf(self, program: int | None) -> None:
        """Let a BPF program drop or cut packets before they are queued (TUNSETFILTEREBPF).

        Args:
            program: the fd of a program of the type BPF_PROG_TYPE_SOCKET_FILTER. It returns how
                many bytes of the packet to keep; 0 drops the packet. None removes the program.

        Raises:
            DeviceMismatchError: the fd is not such a program.
            TypeError, ValueError: `program` is not an open fd.
            DeviceClosedError, DeviceLostError: as `recv`.
        """
        number = _bpf_fd(program)
        ioctl.set_filter_ebpf(self._any_fd(), self.name, number)

    def _any_fd(self) -> int:
        for queue in self.queues:
            if not queue.closed:
                queue.check_open()
                return queue.fileno()
        raise DeviceClosedError(f"this program closed {self.name}; open it again to continue")


class TunDevice(Device):
    """A device whose packets are IP packets."""

    __slots__ = ()

    _mode: ClassVar[Mode] = "tun"

    if TYPE_CHECKING:
        # Only to narrow the type.
        def decoded(self, errors: DecodeErrors = "skip") -> AsyncIterator[IP | IP6]: ...


class TapDevice(Device):
    """A device whose packets are Ethernet frames."""

    __slots__ = ()

    _mode: ClassVar[Mode] = "tap"

    if TYPE_CHECKING:

        def decoded(self, errors: DecodeErrors = "skip") -> AsyncIterator[Ethernet]: ...

    def attach_filter(self, program: Sequence[tuple[int, int, int, int]] | None) -> None:
        """Let a classic BPF program drop or cut frames before they are queued (TUNATTACHFILTER).

        Args:
            program: the program's instructions as ``(code, jt, jf, k)`` (filter.h), as
                ``tcpdump -ddd`` prints them. The program returns how many bytes of the frame to
                keep; 0 drops the frame. None removes the filter (TUNDETACHFILTER).

        Raises:
            DeviceMismatchError: the kernel does not accept the program.
            TypeError: an instruction is not four integers that fit.
            DeviceClosedError, DeviceLostError: as `recv`.
        """
        ioctl.attach_filter(self._any_fd(), self.name, program)

    def set_tx_filter(self, macs: Iterable[str], *, all_multicast: bool = False) -> None:
        """Receive only frames for these addresses (TUNSETTXFILTER).

        Args:
            macs: addresses such as ``"02:00:00:00:00:01"``. Multicast and broadcast addresses are
                filtered like all others. An empty list removes the filter.
            all_multicast: whether to receive all multicast frames, too.

        Raises:
            ValueError: one of `macs` is not a valid MAC address, or there are more than 65,535.
            DeviceClosedError, DeviceLostError: as `recv`.
        """
        device_options.switch("all_multicast", all_multicast)
        packed = [bytes.fromhex(parse_mac(mac, multicast=True).replace(":", "")) for mac in macs]
        if len(packed) > 0xFFFF:
            raise ValueError(f"macs must be at most 65,535 addresses, got {len(packed):,}")
        ioctl.set_tx_filter(self._any_fd(), self.name, packed, all_multicast)


def _bpf_fd(program: int | None) -> int:
    given: object = program
    if given is not None and not isinstance(given, int):
        raise TypeError(f"program must be the fd of a BPF program, or None, got {given!r}")
    if program is None:
        return -1
    try:
        os.fstat(program)
    except (OSError, OverflowError):
        text = f"program must be the fd of a BPF program, or None, but fd {program} is not open"
        raise ValueError(text) from None
    return program


class Opener(Once[D]):
    """The result of `open_tun` and `open_tap`; use it once.

    Await it, or use it with ``async with``, or call `open_blocking`.
    """

    __slots__ = ("_device_class", "_options")

    def __init__(self, device_class: type[D], options: device_options.Options) -> None:
        super().__init__()
        self._device_class = device_class
        self._options = options

    def __repr__(self) -> str:
        what = repr(self._options.name) if self._options.name else "a new name"
        return f"<Opener of a {self._options.mode.upper()} device, {what}: await it>"

    # These help a user who forgot the 'await'. Type checkers must not see them, because they report
    # the mistake only if an opener lacks these methods.
    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            # copy and pickle look up private names on an object that has no `_device_class` yet, so
            # test for these first.
            if name.startswith("_") or not hasattr(self._device_class, name):
                text = f"{type(self).__name__!r} object has no attribute {name!r}"
                raise AttributeError(text, name=name, obj=self)
            text = self._forgotten_await(f"it has no {name!r}")
            raise AttributeError(text, name=name, obj=self)

        def __aiter__(self) -> Any:
            raise TypeError(self._forgotten_await("it has no packets"))

        def __enter__(self) -> Any:
            raise TypeError(self._forgotten_await("it needs 'async with' instead of 'with'"))

        def __exit__(self, *error: object) -> None: ...

    def _forgotten_await(self, what: str) -> str:
        """Return the error message for an opener that is used as if it were the device."""
        mode = self._options.mode
        return (
            f"this is the opener of a device, not the device, and {what}; write "
            f"'{mode} = await open_{mode}(...)' or 'async with open_{mode}(...) as {mode}:', and "
            f"use '{mode}'"
        )

    def open_blocking(self) -> D:
        """Open the device without an event loop; for code that can't await where it opens.

        This blocks the calling thread, and the event loop if one runs in it, until the device is
        open: a few milliseconds, and about a tenth of a second the first time, when the module that
        talks to netlink is loaded. The device belongs to the event loop that first awaits it. Close
        it yourself: ``close()`` needs no loop.

        Raises:
            RuntimeError: the opener was used before.
            AiotunError: as awaiting the opener raises.

        *Cancellation*: if a signal's handler raises, as Ctrl-C does, every step is undone first.
        """
        self._use()
        opening = Opening(self._options)
        return self._device_of(
            threads.run_blocking(opening.run, on_cancel=opening.abort, undo=opening.undo)
        )

    async def _open(self) -> D:
        opening = Opening(self._options)
        return self._device_of(
            await threads.run(opening.run, on_cancel=opening.abort, undo=opening.undo)
        )

    def _device_of(self, opened: Opened) -> D:
        wanted = self._options
        packets = PacketFormat(
            wanted.mode, wanted.offload, wanted.packet_info, accepted=opened.offloads
        )
        return self._device_class(opened, packets)


@device_options.spell_out(TunOptions)
def open_tun(name: str | None = None, **options: Unpack[TunOptions]) -> Opener[TunDevice]:
    """Open a TUN device, and create it if it does not exist.

    This checks the arguments and returns an opener. Await the opener to open the device, or use it
    with ``async with``, which also closes the device at the end. Code that can't await calls
    ``open_blocking()`` of the opener. An opener can be used once.

    If a step fails, or the opening is cancelled, every step is undone: all fds are closed, and an
    interface that was created is deleted. On an interface that existed, the addresses and routes
    that were added are removed, and MTU, queue length, state, MAC, master and IPv6
    autoconfiguration get their old values again. After an ordinary close, the configuration stays
    on an interface that still exists.

    Opening a device that is already configured as requested makes no privileged call, so an
    ordinary user can open a device that root prepared.

    Args:
        name: 1 to 15 bytes; None lets the kernel pick ``tunN``, and ``"vpn%d"`` takes the lowest
            free number.
        queues (int): how many queues to open, 1 to 256; the default is 1. The kernel spreads flows
            over them.
        multi_queue (bool): whether the device can have several queues; the default is True if
            `queues` is above 1. True with one queue attaches to a device that several programs use.
        addresses: ``"10.0.0.1/24"``, ``"fd00::1/64"``, ``"10.0.0.1 peer 10.0.0.2/32"``, or objects
            of the ipaddress module.
        routes: ``"DST [via GATEWAY [onlink]] [metric N] [table N]"``, or objects of the ipaddress
            module. DST is a network, an address or ``default``. All routes go through this device.
            ``onlink`` allows a gateway that is in none of the device's networks.
        mtu (int): the link's IP MTU in bytes, 68 to 65535; IPv6 needs at least 1280.
        txqueuelen (int): how many packets each queue holds in the kernel, 0 to 524288; newer
            kernels allow at most 32767.
        gso_max_segs (int): how many segments a super-packet that is received has at most, 1 to
            65535: see `Link.set_gso_max`.
        gso_max_size (int): how many bytes it has at most, 1 to 65536.
        up (bool): whether to bring the link up, which is the default; False leaves it as it is.
        netns: the network namespace to open the device in: a `Namespace`, a name under /run/netns,
            a path, or an open fd. The program itself stays in its own namespace. A missing one is
            not created.
        persist (bool): whether the interface stays after its last queue is closed. By default this
            is not changed.
        owner, group: who may attach later without privilege, by name or number.
        exclusive (bool): whether to fail if the interface exists.
        offload: ``"off"``, the default, for plain packets. With ``"split"`` the kernel hands over
            up to 64 KiB at a time, which aiotun splits into packets no larger than the MTU, and
            `send_many` merges the packets of each flow: they are the same, but this is faster. With
            ``"raw"`` each packet has a 10-byte virtio-net header and up to 64 KiB, both when it is
            received and when it is sent.
        packet_info (bool): whether each packet has the kernel's 4-byte ``tun_pi`` header in front.
        napi (bool or ``"threaded"``): whether the kernel uses NAPI for the packets that are sent
            here (IFF_NAPI). ``"threaded"`` also makes it receive them in a kernel thread for each
            queue, until the interface is deleted. That takes CAP_SYS_ADMIN and CAP_NET_ADMIN in the
            interface's namespace, or a private namespace of this program, and Linux 5.12.
            The page *Performance* says when it pays.
        ipv6_autoconf (bool): whether the kernel gives the interface an IPv6 link-local address and
            solicits routers when the link comes up. False also removes a link-local address that
            the kernel has already made. By default this is not changed. Addresses that you add are
            not affected.
        carrier (bool): the initial carrier.
        sndbuf (int): how many bytes may wait in the kernel before `send` waits (TUNSETSNDBUF).
            Without this limit `send` never waits.

    Returns:
        An opener of a `TunDevice`.

    Raises:
        TypeError, ValueError: an argument is invalid.

    Awaiting or entering it raises:
        TunUnavailableError: this machine has no TUN/TAP driver.
        NotPermittedError: a step needs a privilege that this user lacks, or IPv6 is switched off
            for the interface (``disable_ipv6``).
        DeviceBusyError: another program holds the device, or the device exists and `exclusive` was
            given.
        DeviceMismatchError: the device exists, and is of another kind or has other flags.
        DeviceLostError: the interface was deleted meanwhile.
        LinkError: the kernel rejected an address, a route or another setting, or the namespace does
            not exist.
        ResourceLimitError: no thread can be started, or no file descriptor or memory is left.

    *Cancellation*: waits until the current step ends (milliseconds), then undoes all steps. If no
    thread can be started for that, they are undone in the event loop's thread, which this blocks.

    *Concurrency*: openings may overlap. If several open the same single-queue device, one succeeds.

    Source: ``include/uapi/linux/if_tun.h``, ``Documentation/networking/tuntap.rst``.
    """
    # TapOptions: `check` rejects the options that only a TAP has, and says why.
    device_options.check_words("open_tun", options, TapOptions)
    return Opener(TunDevice, device_options.check("tun", name, **options))


@device_options.spell_out(TapOptions)
def open_tap(name: str | None = None, **options: Unpack[TapOptions]) -> Opener[TapDevice]:
    """Open a TAP device, and create it if it does not exist.

    This behaves and raises as `open_tun`, and has the same arguments. The highest `mtu` is 65521,
    and the kernel picks ``tapN``. Two arguments are only for a TAP:

    Args:
        name: as `open_tun`.
        mac (str): the interface's own address, such as ``"02:00:00:00:00:01"``; by default the
            kernel picks a random one.
        bridge (str): the bridge to attach the interface to, which must exist.

    Returns:
        An opener of a `TapDevice`.

    *Cancellation*, *Concurrency*: as `open_tun`.

    Source: as `open_tun`.
    """
    device_options.check_words("open_tap", options, TapOptions)
    return Opener(TapDevice, device_options.check("tap", name, **options))
