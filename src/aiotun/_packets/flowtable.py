"""The flows of a batch whose super-packet may still grow; pure, no I/O.

A batch is sorted into runs: packets of one flow that continue each other. Each run takes the place
of its first packet. A packet that joins a run overtakes packets of other flows, but not of its own:
before a packet of the flow that can't join gets its place, the run is closed. So the packets of
each flow stay in order.
"""

from __future__ import annotations

from typing import Generic, TypeVar

__all__ = ["FlowTable"]

_MOST_OPEN = 128
_PORTS_AND_PROTOCOL = 5  # bytes

R = TypeVar("R")


class FlowTable(Generic[R]):
    """Open runs by flow, at most 128. Opening one more closes the run that was opened first.

    A flow is the packet's addresses, both ports and the protocol, as bytes. Frames of one flow may
    differ in their MAC addresses and VLAN tags.
    """

    __slots__ = ("_runs",)

    def __init__(self) -> None:
        self._runs: dict[bytes, R] = {}  # in the order in which they were opened

    def get(self, flow: bytes) -> R | None:
        return self._runs.get(flow)

    def open(self, flow: bytes, run: R) -> None:
        """Open a run of a flow that has none."""
        if len(self._runs) == _MOST_OPEN:
            del self._runs[next(iter(self._runs))]
        self._runs[flow] = run

    def close(self, flow: bytes) -> None:
        self._runs.pop(flow, None)

    def close_between(self, addresses: bytes) -> None:
        """Close all runs from one address to another.

        This is for a packet whose ports are unknown, such as a fragment. It may belong to any flow
        between these addresses.
        """
        length = len(addresses) + _PORTS_AND_PROTOCOL
        for flow in [each for each in self._runs if each.startswith(addresses)]:
            if len(flow) == length:
                del self._runs[flow]

    def close_all(self) -> None:
        self._runs.clear()
