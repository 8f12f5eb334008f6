"""Listens on an interface with a packet socket, which takes no packet from other programs.

Source: packet(7), ``include/uapi/linux/if_packet.h``.
"""

import asyncio
import contextlib
import errno
import shlex
import socket
import struct
import time
from collections.abc import Callable, Sequence
from typing import Literal

import aiotun

from .arguments import as_root

__all__ = ["ListenError", "Listener", "Packet", "what_is_missing"]

_ETH_P_ALL = 3
_ARPHRD_ETHER, _ARPHRD_LOOPBACK, _ARPHRD_NONE = 1, 772, 0xFFFE
# Other links that carry IP (if_arp.h): InfiniBand, SLIP in its four forms, PPP, raw IP, the tunnels
# IPIP, IP6TNL, SIT, GRE and GRE over IPv6, and 6LoWPAN.
_ARPHRD_IP = frozenset({32, 256, 257, 258, 259, 512, 519, 768, 769, 776, 778, 823, 825})
_ETHERTYPES_IP = (0x0800, 0x86DD)
_SOL_PACKET, _PACKET_STATISTICS, _PACKET_AUXDATA = 263, 6, 8
# struct tpacket_auxdata: status, length, captured length, mac, net, VLAN tag, VLAN protocol.
_AUXDATA = struct.Struct("@IIIHHHH")
_VLAN_VALID, _VLAN_PROTOCOL_VALID = 0x10, 0x40
_TIMESTAMP = 35  # SO_TIMESTAMPNS, and the type of the control message with the time
_TIMESPEC = struct.Struct("@ll")
_RCVBUFFORCE = 33
_RING_BYTES = 4 * 1024 * 1024  # packets wait here while the terminal is slow
_LONGEST = 262_144
_LIMIT = 64

Packet = tuple[bytes, int, Literal["in", "out"]]
"""The bytes, the kernel's time in nanoseconds since 1970, and the interface's direction."""


class ListenError(aiotun.AiotunError):
    """Listening on the interface failed. The text is the one line that the user sees."""


class Listener:
    """A packet socket that is bound to one interface, in this thread's network namespace.

    Attributes:
        mode: ``"tap"`` if packets begin with an Ethernet header, ``"tun"`` if with an IP header.

    Raises:
        ListenError: there is no such interface, or this process may not listen on it.
    """

    def __init__(self, name: str, note: Callable[[str], None]) -> None:
        self._name = name
        self._note = note
        self._down = False
        self._drops = 0
        self._buffer = bytearray(_LONGEST)
        self._socket = self._open(socket.SOCK_RAW)
        self._type: int = self._socket.getsockname()[3]
        self._cooked = self._type in _ARPHRD_IP
        self._others = 0
        if self._cooked:
            # We can't parse this link-layer header. On a SOCK_DGRAM socket the kernel removes it.
            self._socket.close()
            self._socket = self._open(socket.SOCK_DGRAM)
        elif self._type not in (_ARPHRD_ETHER, _ARPHRD_LOOPBACK, _ARPHRD_NONE):
            self._socket.close()
            raise ListenError(
                f"{name} carries neither Ethernet frames nor IP packets (its link type is "
                f"{self._type}, see if_arp.h); try 'tshark -i {name}'"
            )
        ether = self._type in (_ARPHRD_ETHER, _ARPHRD_LOOPBACK)
        self.mode: Literal["tun", "tap"] = "tap" if ether else "tun"

    def _open(self, kind: socket.SocketKind) -> socket.socket:
        try:
            # With protocol 0 the socket receives nothing before bind(). With another protocol it
            # would receive packets of all interfaces until then.
            opened = socket.socket(socket.AF_PACKET, kind, 0)
        except PermissionError:
            raise ListenError(
                f"listening on {self._name} needs CAP_NET_RAW; run "
                f"'{as_root(f'dump {shlex.quote(self._name)}')}', or open a new device with "
                "'aiotun dump --new NAME'"
            ) from None
        except OSError as error:
            raise ListenError(f"can't listen on {self._name}: {error.strerror}") from error
        try:
            opened.setblocking(False)
            for level, option, value in (
                (socket.SOL_SOCKET, _RCVBUFFORCE, _RING_BYTES),  # needs CAP_NET_ADMIN
                (socket.SOL_SOCKET, _TIMESTAMP, 1),
                (_SOL_PACKET, _PACKET_AUXDATA, 1),
            ):
                with contextlib.suppress(OSError):  # each is optional
                    opened.setsockopt(level, option, value)
            opened.bind((self._name, _ETH_P_ALL))
        except OSError as error:
            opened.close()
            if error.errno == errno.ENODEV:
                text = f"there is no interface {self._name} in this network namespace"
                raise ListenError(f"{text}; 'aiotun list' shows TUN and TAP devices") from None
            raise ListenError(f"can't listen on {self._name}: {error.strerror}") from error
        return opened

    async def receive(self) -> list[Packet]:
        """Wait for packets, and return up to 64 of those that are queued.

        Raises:
            ListenError: the interface was deleted.
        """
        while True:
            batch: list[Packet] = []
            try:
                while len(batch) < _LIMIT:
                    packet = self._read()
                    if packet is not None:
                        batch.append(packet)
            except BlockingIOError:
                pass
            except OSError as error:
                if error.errno != errno.ENETDOWN:
                    raise
                self._down = True
                self._check_there()
                self._note(
                    f"{self._name} is down and carries no packets; bring it up with "
                    f"'ip link set {self._name} up'"
                )
            if batch:
                self._down = False
                return batch
            await self._wait()

    async def _wait(self) -> None:
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        loop.add_reader(self._socket, readable.set)
        try:
            # The kernel reports once that the interface went down, and reports nothing if it is
            # deleted after that. So we check each second.
            async with asyncio.timeout(1.0 if self._down else None):
                await readable.wait()
        except TimeoutError:
            self._check_there()
        finally:
            loop.remove_reader(self._socket)

    def _check_there(self) -> None:
        if not self._socket.getsockname()[0]:
            raise ListenError(f"{self._name} was deleted")

    def _read(self) -> Packet | None:
        length, messages, _, address = self._socket.recvmsg_into([self._buffer], 256)
        outgoing = address[2] == socket.PACKET_OUTGOING
        if outgoing and self._type == _ARPHRD_LOOPBACK:
            return None  # lo delivers the same packet again, as incoming
        if self._cooked and address[1] not in _ETHERTYPES_IP:
            self._others += 1  # ARP on InfiniBand, PPP's own protocols
            return None
        packet, time_ns = bytes(memoryview(self._buffer)[:length]), 0
        for level, kind, data in messages:
            if (level, kind) == (socket.SOL_SOCKET, _TIMESTAMP):
                seconds, nanoseconds = _TIMESPEC.unpack_from(data)
                time_ns = seconds * 1_000_000_000 + nanoseconds
            elif (level, kind) == (_SOL_PACKET, _PACKET_AUXDATA) and self.mode == "tap":
                packet = _with_vlan(packet, data)
        return packet, time_ns or time.time_ns(), "out" if outgoing else "in"

    @property
    def drops(self) -> int:
        """How many packets the kernel dropped because we read too slowly."""
        found = self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8)
        self._drops += struct.unpack("@II", found)[1]  # reading resets the kernel's counter
        return self._drops

    @property
    def others(self) -> str:
        """The summary's part about packets that were not IP and not shown; empty without any."""
        return f", {self._others} not shown (not IP)" if self._others else ""

    def close(self) -> None:
        self._socket.close()


def _with_vlan(frame: bytes, auxdata: bytes) -> bytes:
    """Put the VLAN tag back into the frame: the kernel passes it separately, in `auxdata`."""
    status, _, _, _, _, tag, protocol = _AUXDATA.unpack_from(auxdata)
    if not status & _VLAN_VALID:
        return frame
    if not status & _VLAN_PROTOCOL_VALID:
        protocol = 0x8100
    return frame[:12] + struct.pack("!HH", protocol, tag) + frame[12:]


async def what_is_missing(name: str) -> Sequence[str]:
    """Return the reasons, one a line, why no packet can go through the interface."""
    try:
        info = await aiotun.Link(name).info()
    except aiotun.LinkError:
        return []
    if not info.up:
        return []  # `Listener.receive` reports that
    if info.tuntap is not None and not info.tuntap.attached:
        return [
            f"{name} has no carrier, because no program has it open; it carries no packets until "
            "a program opens it"
        ]
    if not info.carrier:
        return [f"{name} has no carrier; it carries no packets until it has one"]
    return []
