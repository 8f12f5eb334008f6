"""What a stack counts."""

import dataclasses

__all__ = ["Counts"]


@dataclasses.dataclass(slots=True)
class Counts:
    """The counters behind `NetstackStats`, by the same names."""

    connections_open: int = 0
    connections_accepted: int = 0
    connections_refused: int = 0
    connections_expired: int = 0
    flows_open: int = 0
    flows_accepted: int = 0
    flows_refused: int = 0
    flows_expired: int = 0
    flows_displaced: int = 0
    flows_unreachable: int = 0
    datagrams_dropped: int = 0
    fragments_dropped: int = 0
    packets_refused: int = 0
