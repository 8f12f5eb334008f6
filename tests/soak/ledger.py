"""Records what became of every packet, and what else was done."""

import collections
import random
import socket
import struct
import zlib

__all__ = ["Flow", "Ledger"]

_HEAD = struct.Struct("!4sIII")  # magic, flow, length of the body, its CRC-32
_MAGIC = b"soak"
_SO_MEMINFO, _DROPS = 55, 8  # asm-generic/socket.h; sock_diag.h, SK_MEMINFO_DROPS


class Ledger:
    """Totals over all rounds, and the first 20 problems in words."""

    def __init__(self) -> None:
        self.packets: collections.Counter[str] = collections.Counter()
        self.events: collections.Counter[str] = collections.Counter()
        self.problems: list[str] = []

    def problem(self, text: str) -> None:
        if len(self.problems) < 20:
            self.problems.append(text)

    def equal(self, what: str, ours: int, kernels: int) -> None:
        """Compare the library's count with the kernel's."""
        if ours != kernels:
            self.problem(f"{what}: {ours} here, {kernels} by the kernel's count")

    def settle(self, what: str, *flows: "Flow", dropped: int, uncertain: int = 0) -> None:
        """Account for the packets of flows that took the same way.

        Args:
            what: the name of the way.
            flows: the packets that were sent and that arrived.
            dropped: how many packets the kernel and the program counted as dropped, at most.
            uncertain: how many more packets, apart from the flows' own, were on the way while a
            link was taken down or deleted: the kernel drops those without a count.
        """
        sent = sum(flow.sent for flow in flows)
        delivered = sum(flow.delivered for flow in flows)
        uncertain += sum(flow.sent_uncertain for flow in flows)
        missing = sent - delivered
        if missing < 0:
            self.problem(f"{what}: {sent} packets sent, and {delivered} delivered")
        elif missing > dropped + uncertain:
            self.problem(
                f"{what}: {missing - dropped - uncertain} of {sent} packets unaccounted for "
                f"({delivered} delivered, {dropped} counted as dropped, {uncertain} uncertain)"
            )
        self.packets["sent"] += sent
        self.packets["delivered"] += delivered
        counted = min(max(missing, 0), dropped)
        self.packets["dropped"] += counted
        self.packets["uncounted"] += min(max(missing - counted, 0), uncertain)


class Flow:
    """Numbered datagrams: each says which flow it belongs to, and whether it is whole.

    `uncertain` is set while a link is being taken down; datagrams sent then are counted separately.
    """

    def __init__(self, ledger: Ledger, name: str, chance: random.Random) -> None:
        self.ledger, self.name = ledger, name
        self._chance = chance
        self._identity = chance.randrange(1 << 32)
        self.made = 0  # the newest datagram's number
        self.newest = 0  # the highest number that has arrived
        self._seen: set[int] = set()
        self.uncertain = False
        self.sent = self.sent_uncertain = self.refused = 0
        self.foreign = 0

    def make(self, longest: int = 1200) -> bytes:
        """Return the next datagram's payload."""
        rest = self._chance.randbytes(self._chance.randrange(4, longest))
        self.made += 1
        body = struct.pack("!I", self.made) + rest
        return _HEAD.pack(_MAGIC, self._identity, len(body), zlib.crc32(body)) + body

    def send(self, sock: socket.socket) -> bool:
        """Send a datagram; count it as refused if the kernel refuses it."""
        uncertain = self.uncertain
        try:
            sock.send(self.make())
        except OSError:  # no route while the link is down, or no room
            self.refused += 1
            self.ledger.packets["refused"] += 1
            return False
        self.count_sent(uncertain)
        return True

    def count_sent(self, uncertain: bool = False) -> None:
        self.sent += 1
        self.sent_uncertain += uncertain

    def arrive(self, payload: bytes) -> None:
        """Record a datagram, and check that it is whole, of this flow, and no duplicate."""
        if len(payload) < _HEAD.size + 4 or payload[:4] != _MAGIC:
            self.foreign += 1
            return
        _, identity, length, crc = _HEAD.unpack_from(payload)
        body = payload[_HEAD.size :]
        if len(body) != length or zlib.crc32(body) != crc:
            self.ledger.problem(f"{self.name}: a packet was torn: {payload[:40].hex()}...")
            return
        (number,) = struct.unpack_from("!I", body)
        if identity != self._identity or number > self.made:
            self.foreign += 1
        elif number in self._seen:
            self.ledger.problem(f"{self.name}: packet {number} came twice")
        else:
            self._seen.add(number)
            self.newest = max(self.newest, number)

    @property
    def delivered(self) -> int:
        """How many different packets arrived."""
        return len(self._seen)


def drops(sock: socket.socket) -> int:
    """How many datagrams a socket dropped: no room in its buffer, or a wrong checksum."""
    values = struct.unpack("9I", sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, 36))
    return int(values[_DROPS])
