"""The decisions of a learning Ethernet switch, without any I/O; see virtual_switch.py."""

import dataclasses
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable

__all__ = ["HEADER", "MAX_FRAME", "MAX_STATIONS", "Counters", "Port", "Switch"]

HEADER = 14  # two addresses and a type, in bytes
MAX_FRAME = 65_536 + HEADER + 4  # the largest that a datagram or a TAP can hold, with a VLAN tag
MAX_STATIONS = 8192
# IEEE 802.1D-2004, table 7-10: frames between neighboring bridges, which bridges don't relay.
RESERVED = bytes.fromhex("0180c20000")


@dataclasses.dataclass
class Counters:
    """A port's counters, in frames. Each frame that comes in or should go out is counted in one."""

    received: int = 0
    sent: int = 0
    dropped: int = 0  # to this port, which was not ready
    malformed: int = 0  # from this port: too short, too long, or the source is a group address
    filtered: int = 0  # from this port, and correctly forwarded to none

    def __str__(self) -> str:
        return " ".join(f"{name} {value}" for name, value in dataclasses.asdict(self).items())


class Port(ABC):
    """One way in and out of the switch."""

    def __init__(self, counters: Counters) -> None:
        self.counters = counters

    @abstractmethod
    def put(self, frame: bytes) -> bool:
        """Send a frame if that is possible now; return whether it was sent. Never raises."""

    def send(self, frame: bytes) -> None:
        if self.put(frame):
            self.counters.sent += 1
        else:
            self.counters.dropped += 1


class Switch:
    """Decides which port a frame goes to (IEEE 802.1D, sections 7.7 to 7.9). Does no I/O itself."""

    def __init__(self, ageing: float = 300.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.ports: list[Port] = []
        self.unlearned = 0  # stations that did not fit into the full table
        self._ageing = ageing
        self._clock = clock
        # The station that was heard longest ago comes first, so a full table needs no search.
        self._stations: OrderedDict[bytes, tuple[Port, float]] = OrderedDict()

    def add(self, port: Port) -> None:
        self.ports.append(port)

    def remove(self, port: Port) -> None:
        """Remove a port, and forget the stations behind it."""
        if port in self.ports:
            self.ports.remove(port)
            for station in [each for each, (where, _) in self._stations.items() if where is port]:
                del self._stations[station]

    def forward(self, source: Port, frame: bytes) -> None:
        """Forward a frame that came from a port."""
        source.counters.received += 1
        # The lowest bit of an address's first byte marks a group, which can't be a source.
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
            source.counters.filtered += 1  # both are on the same port
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
                self.unlearned += 1  # frames to it are flooded, so it still gets them
                return
            del self._stations[oldest]
        self._stations[station] = (port, now)
        self._stations.move_to_end(station)
