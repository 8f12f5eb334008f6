"""What a learning Ethernet switch decides, without any I/O; see virtual_switch.py."""

import dataclasses
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable

__all__ = ["HEADER", "MAX_FRAME", "MAX_STATIONS", "Counters", "Port", "Switch"]

HEADER = 14  # two addresses and a type, in bytes
MAX_FRAME = 65_536 + HEADER + 4  # what the largest datagram, or a TAP, may hold; with a VLAN tag
MAX_STATIONS = 8192
# IEEE 802.1D-2004, table 7-10: from one bridge to the next, and relayed by none.
RESERVED = bytes.fromhex("0180c20000")


@dataclasses.dataclass
class Counters:
    """What a port has seen, in frames. Whatever comes in or should go out is in one of them."""

    received: int = 0
    sent: int = 0
    dropped: int = 0  # for this port, which was not ready for it
    malformed: int = 0  # from it: too short or too long, or the source is a group
    filtered: int = 0  # from it, and rightly sent nowhere

    def __str__(self) -> str:
        return " ".join(f"{name} {value}" for name, value in dataclasses.asdict(self).items())


class Port(ABC):
    """One way in and out of the switch."""

    def __init__(self, counters: Counters) -> None:
        self.counters = counters

    @abstractmethod
    def put(self, frame: bytes) -> bool:
        """Send a frame if that can be done at once; give whether it was. Never raises."""

    def send(self, frame: bytes) -> None:
        if self.put(frame):
            self.counters.sent += 1
        else:
            self.counters.dropped += 1


class Switch:
    """Which port a frame goes to (IEEE 802.1D, sections 7.7 to 7.9). No I/O of its own."""

    def __init__(self, ageing: float = 300.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.ports: list[Port] = []
        self.unlearned = 0  # stations that the table had no room for
        self._ageing = ageing
        self._clock = clock
        # The one that was heard longest ago comes first, so that a full table costs no search.
        self._stations: OrderedDict[bytes, tuple[Port, float]] = OrderedDict()

    def add(self, port: Port) -> None:
        self.ports.append(port)

    def remove(self, port: Port) -> None:
        """Take a port out, and forget who was behind it."""
        if port in self.ports:
            self.ports.remove(port)
            for station in [each for each, (where, _) in self._stations.items() if where is port]:
                del self._stations[station]

    def forward(self, source: Port, frame: bytes) -> None:
        """Take a frame that came from a port, and send it on."""
        source.counters.received += 1
        # The lowest bit of the first byte marks a group; nobody sends as one.
        if not HEADER <= len(frame) <= MAX_FRAME or frame[6] & 1:
            source.counters.malformed += 1
            return
        now = self._clock()
        self._learn(frame[6:12], source, now)
        target = frame[:6]
        if target[:5] == RESERVED and target[5] < 16:
            source.counters.filtered += 1
            return
        known = None if target[0] & 1 else self._find(target, now)
        if known is source:
            source.counters.filtered += 1  # they hear each other without us
        elif known is not None:
            known.send(frame)
        else:
            for port in self.ports:
                if port is not source:
                    port.send(frame)

    def _find(self, station: bytes, now: float) -> Port | None:
        entry = self._stations.get(station)
        if entry is None or now - entry[1] >= self._ageing:
            return None
        return entry[0]

    def _learn(self, station: bytes, port: Port, now: float) -> None:
        if station not in self._stations and len(self._stations) >= MAX_STATIONS:
            oldest = next(iter(self._stations))
            if self._find(oldest, now) is not None:
                self.unlearned += 1  # frames to it are flooded, which reaches it all the same
                return
            del self._stations[oldest]
        self._stations[station] = (port, now)
        self._stations.move_to_end(station)
