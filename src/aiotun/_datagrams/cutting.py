"""Which datagrams go together: runs that one system call can send."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from .._kernel.udp import LARGEST_RUN_BYTES, LARGEST_RUN_DATAGRAMS

__all__ = ["cut", "segments_for"]


def segments_for(mtu: int, overhead: int = 0) -> int:
    """Say how many packets of a tunnel fit one run of datagrams.

    Set a device's ``gso_max_segs`` to this number. Then a tunnel can send the packets of each
    super-packet in one call.

    Args:
        mtu: the tunnel's MTU in bytes.
        overhead: what the tunnel adds to each packet in bytes, such as 32 for WireGuard.

    Returns:
        1 to 64.

    Raises:
        ValueError: `mtu` is below 1, or `overhead` below 0.
    """
    if mtu < 1 or overhead < 0:
        raise ValueError(f"mtu must be at least 1 and overhead at least 0, got {mtu}, {overhead}")
    return max(1, min(LARGEST_RUN_DATAGRAMS, LARGEST_RUN_BYTES // (mtu + overhead)))


def cut(sizes: Sequence[int], largest: int, full_tails: bool = True) -> list[tuple[int, int]]:
    """Cut consecutive datagrams into runs.

    The datagrams of a run have the same size; only the last may be shorter. If there are too many
    for one run, they are spread evenly over several. The kernel's work is per run.

    Args:
        sizes: of the datagrams, in bytes.
        largest: the size of the largest datagram that may go in a run.
        full_tails: whether the last datagram of a run may be as long as the others.

    Returns:
        The first index of each run, and the one after its last. Single datagrams are runs of one.
    """
    count = len(sizes)
    if full_tails and count and 0 < sizes[0] <= largest and count <= segments_for(sizes[0]):
        # Nearly always all datagrams go in one run. This check is faster than the general case.
        same = sizes.count(sizes[0])
        if same == count or (same == count - 1 and 0 < sizes[-1] < sizes[0]):
            return [(0, count)]
    runs: list[tuple[int, int]] = []
    stretches = [[size, len(list(group))] for size, group in itertools.groupby(sizes)]
    at = 0
    for (size, count), following in itertools.zip_longest(stretches, stretches[1:]):
        most = segments_for(size) if 0 < size <= largest else 1
        tail = bool(count and most > 1 and following and 0 < following[0] < size)
        if tail:
            following[1] -= 1
            count += 1
        pieces = -(-count // most)
        for piece in range(pieces):
            start, end = at + count * piece // pieces, at + count * (piece + 1) // pieces
            if full_tails or (tail and piece == pieces - 1):
                runs.append((start, end))
            else:
                runs += [(each, each + 1) for each in range(start, end)]
        at += count
    return runs
