"""Runs: many packets in one buffer, a fixed number of bytes apart."""

from __future__ import annotations

__all__ = ["segments_for"]

_MOST_DATAGRAMS = 64  # in one call with UDP_SEGMENT; UDP_MAX_SEGMENTS, 128 since Linux 6.9
# What fits an IPv6 packet, and an IPv4 packet with its header.
_LONGEST_RUN = 65_487  # bytes


def segments_for(mtu: int, overhead: int = 0) -> int:
    """Return how many packets of a tunnel fit one run of datagrams.

    A tunnel that opens its device with this as `gso_max_segs` gets super-packets that it can send
    with one system call each.

    Args:
        mtu: the device's MTU in bytes.
        overhead: what the tunnel adds to each packet, in bytes.

    Returns:
        45 for WireGuard with an MTU of 1420 (an overhead of 32); at least 1, and at most 64.

    Raises:
        ValueError: `mtu` is below 1, or `overhead` is negative.
    """
    if mtu < 1 or overhead < 0:
        raise ValueError(f"mtu must be positive, and overhead not negative: {mtu}, {overhead}")
    return max(1, min(_MOST_DATAGRAMS, _LONGEST_RUN // (mtu + overhead)))
