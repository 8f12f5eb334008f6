"""Listening on an interface, beside whoever holds it: a packet socket takes no packet away.

Source: packet(7), ``include/uapi/linux/if_packet.h``.
"""

import asyncio
import contextlib
import errno
import socket
import struct
import time
from collections.abc import Callable, Sequence
from typing import Literal

import aiotun

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
_TIMESTAMP = 35  # SO_TIMESTAMPNS, and the type of the message that comes of it
_TIMESPEC = struct.Struct("@ll")
_RCVBUFFORCE = 33
_RING_BYTES = 4 * 1024 * 1024  # packets wait here while the terminal is slow
_LONGEST = 262_144
_LIMIT = 64

Packet = tuple[bytes, int, Literal["in", "out"]]
"""The bytes, the kernel's time in nanoseconds since 1970, and which way the interface saw it go."""


class ListenError(aiotun.AiotunError):
    """The interface can't be listened on; the text is the one line that the user sees."""


class Listener:
    """A packet socket that is bound to one interface, in this thread's network namespace.

    Attributes:
        mode: ``"tap"`` where packets begin with an Ethernet header, ``"tun"`` where with IP's.

    Raises:
        ListenError: no such interface, or it may not be listened on.
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
            # A link layer of which we know nothing: have the kernel take it off.
            self._socket.close()
            self._socket = self._open(socket.SOCK_DGRAM)
        elif self._type not in (_ARPHRD_ETHER, _ARPHRD_LOOPBACK, _ARPHRD_NONE):
            self._socket.close()
            raise ListenError(
                f"{name} carries neither Ethernet frames nor IP packets (its link type is "
                f"{self._type}, see if_arp.h); 'tshark -i {name}' may know it"
            )
        ether = self._type in (_ARPHRD_ETHER, _ARPHRD_LOOPBACK)
        self.mode: Literal["tun", "tap"] = "tap" if ether else "tun"

    def _open(self, kind: socket.SocketKind) -> socket.socket:
        try:
            # Protocol 0 hears nothing yet: else packets of all interfaces came before the binding.
            opened = socket.socket(socket.AF_PACKET, kind, 0)
        except PermissionError:
            raise ListenError(
                f"listening on {self._name} needs CAP_NET_RAW; run as root, or open a device of "
                "your own: 'aiotun dump --new NAME'"
            ) from None
        except OSError as error:
            raise ListenError(f"{self._name} can't be listened on: {error.strerror}") from error
        try:
            opened.setblocking(False)
            for level, option, value in (
                (socket.SOL_SOCKET, _RCVBUFFORCE, _RING_BYTES),  # needs CAP_NET_ADMIN
                (socket.SOL_SOCKET, _TIMESTAMP, 1),
                (_SOL_PACKET, _PACKET_AUXDATA, 1),
            ):
                with contextlib.suppress(OSError):  # we can do without each
                    opened.setsockopt(level, option, value)
            opened.bind((self._name, _ETH_P_ALL))
        except OSError as error:
            opened.close()
            if error.errno == errno.ENODEV:
                text = f"there is no interface {self._name} in this network namespace"
                raise ListenError(f"{text}; 'aiotun list' shows TUN and TAP devices") from None
            raise ListenError(f"{self._name} can't be listened on: {error.strerror}") from error
        return opened

    async def receive(self) -> list[Packet]:
        """Wait for packets, and take those that are there.

        Raises:
            ListenError: the interface is gone.
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
                    f"{self._name} is down: no packet goes through it until it is up; "
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
            # The kernel says once that an interface went down, and no more when it is deleted.
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
            return None  # it comes in again
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
        """How many packets the kernel had no room for, because we were slow."""
        found = self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8)
        self._drops += struct.unpack("@II", found)[1]  # asking sets the kernel's own back to 0
        return self._drops

    @property
    def others(self) -> str:
        """What to say of packets that were no IP packets, and were left out; empty if all were."""
        return f", {self._others} left out, which were no IP packets" if self._others else ""

    def close(self) -> None:
        self._socket.close()


def _with_vlan(frame: bytes, auxdata: bytes) -> bytes:
    """Put the VLAN tag back, which the kernel hands over beside the frame."""
    status, _, _, _, _, tag, protocol = _AUXDATA.unpack_from(auxdata)
    if not status & _VLAN_VALID:
        return frame
    if not status & _VLAN_PROTOCOL_VALID:
        protocol = 0x8100
    return frame[:12] + struct.pack("!HH", protocol, tag) + frame[12:]


async def what_is_missing(name: str) -> Sequence[str]:
    """Say why nothing may come through an interface."""
    try:
        info = await aiotun.Link(name).info()
    except aiotun.LinkError:
        return []
    if not info.up:
        return []  # which the socket says by itself
    if info.tuntap is not None and not info.tuntap.attached:
        return [
            f"{name} has no carrier, because no program holds it open: no packet goes through it "
            "until one does"
        ]
    if not info.carrier:
        return [f"{name} has no carrier: no packet goes through it until it has"]
    return []
