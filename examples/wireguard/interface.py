"""All peers of an interface: gives packets to the peer they are for, and messages to their sender.

`send` takes packets from the device. `receive` takes datagrams and returns packets for the device.
Afterwards the messages to send are in `outgoing`, and `due` is the time at which to call `tick`.
There is no clock here: `now` is an argument, in seconds, and must not go back.
"""

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from ipaddress import ip_address

from .allowedips import AllowedIPs, Network
from .config import PeerConfig
from .cookies import Checker, Endpoint
from .crypto import Forged, public_key
from .handshake import Identity, open_initiation
from .messages import COOKIE, DATA, INITIATION, SIZES, CookieReply, Initiation, Response
from .peer import Handshake, Peer, Timers
from .session import Session

__all__ = ["Interface"]


class Interface:
    """The protocol of a WireGuard interface, without a device.

    Args:
        epoch: returns the time of the wall clock, in seconds since 1970, at which `now` was 0.
            It changes when the wall clock is set.
        mtu: the device's MTU; the service updates it.
        handshakes: how many a second need no cookie.
        inside: networks that our own routes lead into the tunnel.
    """

    def __init__(
        self,
        private_key: bytes,
        peers: Iterable[PeerConfig],
        *,
        epoch: Callable[[], float],
        mtu: int = 1420,
        timers: Timers | None = None,
        handshakes: int = 100,
        inside: Iterable[Network] = (),
    ) -> None:
        self.identity = Identity(private_key, public_key(private_key))
        self.timers = timers or Timers()
        self.epoch = epoch
        self.mtu = mtu
        self.due = math.inf
        self.outgoing: list[tuple[Endpoint, list[bytes]]] = []
        self.unreached: set[Peer] = set()  # their endpoints should be looked up again
        self.indices: dict[bytes, Session | Handshake] = {}
        self.dropped: Counter[str] = Counter()
        self.peers = {each.public_key: Peer(self, each) for each in peers}
        allowed: AllowedIPs[Peer] = AllowedIPs(
            (network, peer) for peer in self.peers.values() for network in peer.config.allowed_ips
        )
        # The peer that an inner address of 4 or 16 bytes belongs to, or None.
        self.owner = allowed.owner
        self._inside = list(inside)
        self._checker = Checker(self.identity.public, handshakes)

    def start(self, now: float) -> None:
        """Start: send the first keepalive to each peer with a persistent keepalive."""
        for peer in self.peers.values():
            peer.start(now)
        self.tick(now)

    def tick(self, now: float) -> None:
        """Handle the timers that are due."""
        for peer in self.peers.values():
            if peer.deadline() <= now:
                peer.tick(now)
        self.due = self.deadline()

    def deadline(self) -> float:
        """The earliest time at which a timer is due; `due` is not later."""
        return min((peer.deadline() for peer in self.peers.values()), default=math.inf)

    def new_index(self) -> bytes:
        """Return an index of 4 bytes that is not in use."""
        while (index := os.urandom(4)) in self.indices:
            pass
        return index

    def loops(self, endpoint: Endpoint) -> bool:
        """Whether our datagrams to this endpoint would come back to us through the tunnel.

        A peer whose network has lost its address sends from its address inside.
        """
        address = ip_address(endpoint[0])
        return any(address in network for network in self._inside)

    # From the device

    def send(self, packets: Iterable[bytes], now: float) -> None:
        """Section 3, sending: seal each packet for the peer that owns its destination address."""
        owner = self.owner
        run: list[bytes] = []
        last: bytes | None = None
        peer: Peer | None = None
        for packet in packets:
            destination = packet[16:20] if packet[0] < 0x60 else packet[24:40]
            if destination != last:
                last = destination
                found = owner(destination)
                if found is not peer:
                    if run:
                        self._send_run(peer, run, now)
                    peer, run = found, []
            run.append(packet)
        self._send_run(peer, run, now)

    def _send_run(self, peer: Peer | None, run: list[bytes], now: float) -> None:
        if peer is not None:
            peer.send(run, now)
        else:
            self.dropped["to nobody's address"] += len(run)

    # From the socket

    def receive(self, datagrams: Sequence[bytes], source: Endpoint, now: float) -> list[bytes]:
        """Section 3, receiving: return the packets in these datagrams."""
        packets: list[bytes] = []
        start, count = 0, len(datagrams)
        while start < count:
            # The type and the receiver, which are usually the same in datagrams that come together.
            head = datagrams[start][:8]
            end = start + 1
            while end < count and datagrams[end][:8] == head:
                end += 1
            run = datagrams[start:end]
            start = end
            if head[:4] == DATA:
                packets += self._receive_run(run, source, now)
            else:
                for each in run:
                    self._receive_other(each, source, now)
        return packets

    def _receive_run(self, run: Sequence[bytes], source: Endpoint, now: float) -> list[bytes]:
        """Section 5.4.6: data messages with the same receiver."""
        session = self.indices.get(run[0][4:8])
        if not isinstance(session, Session):
            self.dropped["for no session"] += len(run)
            return []
        peer = session.peer
        owner = self.owner
        good: list[bytes] = []
        last: bytes | None = None
        allowed = False
        for packet in peer.receive(session, run, source, now):
            if not packet:
                continue  # a keepalive
            # The length and the source address of the IP packet.
            if packet[0] >> 4 == 4 and len(packet) >= 20:
                length, address = packet[2] << 8 | packet[3], packet[12:16]
            elif packet[0] >> 4 == 6 and len(packet) >= 40:
                length, address = 40 + (packet[4] << 8 | packet[5]), packet[8:24]
            else:
                length = 0
            if not 20 <= length <= len(packet):
                peer.dropped["not an IP packet"] += 1
                continue
            if address != last:
                last, allowed = address, owner(address) is peer
            if allowed:
                good.append(packet if length == len(packet) else packet[:length])
            else:
                peer.dropped["from an address that is not its own"] += 1
        return good

    def _receive_other(self, data: bytes, source: Endpoint, now: float) -> None:
        kind = data[:4]
        if kind not in SIZES:
            self.dropped["of no known type"] += 1
        elif len(data) != SIZES[kind]:
            self.dropped["truncated"] += 1
        elif kind == COOKIE:
            self._take_cookie(CookieReply.unpack(data), now)
        elif not self._checker.mac1_fits(data):
            self.dropped["forged"] += 1
        elif self._welcome(data, source, now):
            if kind == INITIATION:
                self._take_initiation(data, source, now)
            else:
                self._take_response(data, source, now)

    def _welcome(self, data: bytes, source: Endpoint, now: float) -> bool:
        """Section 5.3: under load, accept only senders with a valid cookie, a few times each."""
        if not self._checker.under_load(now):
            return True
        if not self._checker.mac2_fits(data, source, now):
            self.dropped["under load, answered with a cookie"] += 1
            reply = self._checker.reply(data[4:8], data, source, now)
            self.outgoing.append((source, [reply]))
            return False
        if not self._checker.grants(source, now):
            self.dropped["too many handshakes"] += 1
            return False
        return True

    def _take_initiation(self, data: bytes, source: Endpoint, now: float) -> None:
        message = Initiation.unpack(data)
        try:
            opened = open_initiation(self.identity, message)
        except Forged:
            self.dropped["forged"] += 1
            return
        peer = self.peers.get(opened.static)
        if peer is None:
            self.dropped["from a stranger"] += 1
            return
        peer.take_initiation(opened, message.sender, source, len(data), now)

    def _take_response(self, data: bytes, source: Endpoint, now: float) -> None:
        message = Response.unpack(data)
        handshake = self.indices.get(message.receiver)
        if isinstance(handshake, Handshake):
            handshake.peer.take_response(handshake, message, source, len(data), now)
        else:
            self.dropped["for no handshake"] += 1

    def _take_cookie(self, reply: CookieReply, now: float) -> None:
        entry = self.indices.get(reply.receiver)
        if entry is None:
            self.dropped["for no handshake"] += 1
            return
        try:
            entry.peer.stamper.take(reply, now)
        except Forged:
            self.dropped["forged"] += 1
