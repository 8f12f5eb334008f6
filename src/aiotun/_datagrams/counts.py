"""What a datagram socket counts."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping

__all__ = ["Counts", "DatagramStats"]


@dataclasses.dataclass(frozen=True, slots=True)
class DatagramStats:
    """What a `DatagramSocket` has sent and received, and what became of the rest."""

    runs_sent: int = 0
    """System calls that sent several datagrams at once."""
    datagrams_sent: int = 0
    """Datagrams that the kernel took."""
    runs_received: int = 0
    """System calls that received several datagrams at once."""
    datagrams_received: int = 0
    """Datagrams received, those that nobody has taken yet included."""
    fallbacks: int = 0
    """Runs that the kernel or the path to one destination did not take; they went one by one."""
    refused: Mapping[int, int] = dataclasses.field(default_factory=dict)
    """By errno: datagrams that were not sent or not delivered.

    Those that a call could not send, those that an ICMP error was reported for, and those that the
    outgoing interface's full queue dropped (ENOBUFS).
    """
    overflowed: int = 0
    """Datagrams that the kernel dropped from a full receive buffer; a run counts as one."""
    truncated: int = 0
    """Runs and datagrams dropped because the kernel could not hand them over whole."""
    dropped: int = 0
    """Datagrams received, but not taken by any task before the socket was closed."""


@dataclasses.dataclass(slots=True)
class Counts:
    """`DatagramStats` while it is counted."""

    runs_sent: int = 0
    datagrams_sent: int = 0
    runs_received: int = 0
    datagrams_received: int = 0
    fallbacks: int = 0
    refused: Counter[int] = dataclasses.field(default_factory=Counter)
    overflowed: int = 0
    truncated: int = 0
    dropped: int = 0
