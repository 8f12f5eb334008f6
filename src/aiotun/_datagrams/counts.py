"""What a datagram socket counts."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping

__all__ = ["Counts", "DatagramStats"]


@dataclasses.dataclass(frozen=True, slots=True)
class DatagramStats:
    """What a `DatagramSocket` has sent, received, refused and dropped."""

    runs_sent: int = 0
    """System calls that sent several datagrams at once."""
    datagrams_sent: int = 0
    """Datagrams that the kernel took."""
    runs_received: int = 0
    """System calls that received several datagrams at once."""
    datagrams_received: int = 0
    """Datagrams received, including those that no task has taken yet."""
    fallbacks: int = 0
    """Runs that the kernel or a path did not take, so that their datagrams were sent one by one."""
    refused: Mapping[int, int] = dataclasses.field(default_factory=dict)
    """By errno: datagrams that were not sent or not delivered.

    This counts datagrams that a call could not send, datagrams for which an ICMP error came, and
    datagrams that the outgoing interface dropped because its queue was full (ENOBUFS).
    """
    overflowed: int = 0
    """Datagrams that the kernel dropped from a full receive buffer; a run counts as one."""
    truncated: int = 0
    """Runs and datagrams dropped because the kernel could not hand them over whole."""
    dropped: int = 0
    """Datagrams received, but not taken by any task before the socket was closed."""


@dataclasses.dataclass(slots=True)
class Counts:
    """The counters behind `DatagramStats`."""

    runs_sent: int = 0
    datagrams_sent: int = 0
    runs_received: int = 0
    datagrams_received: int = 0
    fallbacks: int = 0
    refused: Counter[int] = dataclasses.field(default_factory=Counter)
    overflowed: int = 0
    truncated: int = 0
    dropped: int = 0
