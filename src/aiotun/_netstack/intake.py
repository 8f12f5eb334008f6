"""Decides which packets that the program sends to a stack's device are not for the kernel.

The intake takes everything that is intercepted without a socket: datagrams, pings, ICMP errors
about datagrams, and fragments of these, which are put together first. Connections are accepted by
sockets. But if `admit` has to be asked first, or if the socket has to be made first, the intake
takes the first packet of a connection, too.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from .._kernel.abi import VNET_HDR, VNET_HDR_SIZE
from .._packets import native
from .._packets.fragments import Reassembler, fragment_of
from .._packets.udp import ICMP, ICMPV6, UDP
from ..errors import DeviceClosedError
from .addresses import unicast
from .injector import Injector, make_injector
from .pings import is_foreign_ping

if TYPE_CHECKING:
    from ..device import TunDevice
    from ..namespaces import Namespace
    from .counts import Counts
    from .pings import PingInterceptor
    from .seen import TcpTaker
    from .udp import UdpInterceptor

__all__ = ["Intake", "is_checked"]

_OURS = frozenset({ICMP, ICMPV6, UDP})

# virtio_net.h: the checksum is partial, or has been verified; and the gso_type of a super-packet
# that consists of several UDP datagrams.
_NEEDS_CSUM, _DATA_VALID = 1, 2
_UDP_L4 = 5


def is_checked(packet: bytes) -> bool:
    """Whether a virtio-net header says that a checksum is known to be right, or is partial."""
    return bool(packet[0] & (_NEEDS_CSUM | _DATA_VALID))


class Intake:
    """Passes packets to the interceptors.

    Attributes:
        udp, pings: the interceptors; None, or a closed one, if there is none.
        tcp: decides about connections; None if nothing does.
    """

    def __init__(
        self,
        own: frozenset[bytes],
        counts: Counts,
        answer_pings: bool = True,
    ) -> None:
        self.udp: UdpInterceptor | None = None
        self.pings: PingInterceptor | None = None
        self.tcp: TcpTaker | None = None
        self._answer_pings = answer_pings
        self._injector: Injector | None = None
        self._own = own
        self._counts = counts
        self._loop = asyncio.get_running_loop()
        self._fragments = Reassembler()
        self._closed = False

    @property
    def active(self) -> bool:
        """Whether the intake may take any packet at all."""
        return (
            self.udp is not None
            or self.pings is not None
            or self.tcp is not None
            or not self._answer_pings
        )

    def take(self, packet: bytes, checked: bool = False) -> bool:
        """Take a packet; return False if it is for the kernel instead.

        Args:
            packet: an IP packet, or anything else.
            checked: whether to skip the check of its checksum, because it is known to be right or
                is only partial.
        """
        if len(packet) < 20:
            return False
        version = packet[0] >> 4
        if version == 4:
            proto = packet[9]
            whole = not (packet[6] & 0x3F or packet[7])
        elif version == 6:
            proto = packet[6]
            whole = proto != 44  # a fragment header
        else:
            return False
        return self._take_whole(packet, checked) if whole else self._take_fragment(packet)

    def _take_whole(self, packet: bytes, checked: bool) -> bool:
        proto = packet[9] if packet[0] >> 4 == 4 else packet[6]
        if proto not in (ICMP, ICMPV6):  # UDP, or UDP after extension headers
            return self.udp is not None and self.udp.take(packet, checked)
        if self.pings is not None and not self.pings.closed:
            if self.pings.take(packet):
                return True
        elif not self._answer_pings and is_foreign_ping(packet, self._own):
            self._counts.packets_refused += 1
            return True
        return self.udp is not None and self.udp.take_error(packet)

    def _take_fragment(self, packet: bytes) -> bool:
        proto = fragment_of(packet)
        if not proto:  # an atomic fragment is a whole packet
            return self._take_whole(packet, False)
        if proto not in _OURS or not self._wants(proto):
            return False
        local = packet[16:20] if packet[0] >> 4 == 4 else packet[24:40]
        if local in self._own or not unicast(local):
            return False
        before = self._fragments.dropped
        whole = self._fragments.add(packet, self._loop.time())
        self._counts.fragments_dropped += self._fragments.dropped - before
        if whole is not None and not self._take_whole(whole, False):
            # The checksum is wrong, or its interceptor was closed meanwhile.
            self._counts.packets_refused += 1
        return True

    def _wants(self, proto: int) -> bool:
        if proto == UDP:
            return self.udp is not None and not self.udp.closed
        pings = self.pings is not None and not self.pings.closed
        return pings or not self._answer_pings

    def take_super(self, packet: bytes, header: int) -> bool:
        """Take a packet that begins with a virtio-net header of `header` bytes; see `take`."""
        if len(packet) < header:
            return False
        _, kind, *_ = VNET_HDR.unpack_from(packet)
        if kind != _UDP_L4:
            # This includes UFO: one large datagram that the kernel would fragment.
            return self.take(packet[header:], is_checked(packet))
        if self.udp is None:
            return False
        try:
            datagrams = native.split(packet[:VNET_HDR_SIZE] + packet[header:], False)
        except ValueError:
            return False
        taken = [self.take(each, True) for each in datagrams]
        if not any(taken):
            return False
        self._counts.packets_refused += taken.count(False)
        return True

    async def injector(self, namespace: Namespace, tun: TunDevice) -> Injector:
        """Return the stack's injector; the first call makes it.

        Raises:
            DeviceClosedError: the stack was closed.
            OSError, LinkError: as `make_injector`.
        """
        if self._injector is not None:
            return self._injector
        made = await make_injector(namespace, tun)
        if self._closed:
            made.close()
            raise DeviceClosedError(f"the stack of {tun.name} was closed; open another")
        if self._made(made) is not made:
            made.close()  # another call has made one meanwhile
        return self._made(made)

    def _made(self, made: Injector) -> Injector:
        self._injector = self._injector or made
        return self._injector

    def close(self) -> None:
        """Close the injector, and drop the references to the interceptors. Idempotent.

        The device's port holds this object, and the interceptors and the injector hold the device.
        Without this, that reference cycle would keep them alive until the next garbage collection.
        """
        self._closed = True
        self._fragments.clear()
        self.udp = self.pings = self.tcp = None
        injector, self._injector = self._injector, None
        if injector is not None:
            injector.close()
