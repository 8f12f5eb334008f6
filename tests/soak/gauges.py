"""What must not grow: fds, threads, memory."""

import ctypes
import gc
import os
import sys
from typing import NamedTuple

__all__ = ["Gauge", "growth", "measure"]

# Measured over hours with nothing leaking: the allocator keeps pages where objects of long and
# short lives are mixed, and caches (of types, of lines, of regular expressions) fill up.
_RSS_TOLERANCE_KIB = 4096
_BLOCKS_TOLERANCE = 2000


class Gauge(NamedTuple):
    """At one moment."""

    fds: int
    threads: int
    rss_kib: int
    blocks: int
    """Objects that Python's allocator holds: what RSS shows late, this shows at once."""


def measure(*, tidy: bool = False) -> Gauge:
    """Look; `tidy` collects garbage first, and gives free pages back to the kernel."""
    if tidy:
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    return Gauge(
        fds=len(os.listdir("/proc/self/fd")) - 1,  # the one that lists
        threads=len(os.listdir("/proc/self/task")),
        rss_kib=pages * os.sysconf("SC_PAGE_SIZE") // 1024,
        blocks=sys.getallocatedblocks(),
    )


def growth(history: list[Gauge]) -> list[str]:
    """Say what has grown over rounds that all began after the warm-up.

    Fds and threads are the same number after every round, or one has leaked. Memory is compared
    between the first half's most and the second half's least: a leak raises both, and noise
    neither.
    """
    if not history:  # ended before
        return []
    found = []
    first, last = history[0], history[-1]
    for what in ("fds", "threads"):
        before, after = getattr(first, what), getattr(last, what)
        if after > before:
            found.append(f"{what} grew from {before} to {after}")
    half = (len(history) + 1) // 2
    for what, tolerance in (("rss_kib", _RSS_TOLERANCE_KIB), ("blocks", _BLOCKS_TOLERANCE)):
        before = max(getattr(each, what) for each in history[:half])
        after = min(getattr(each, what) for each in history[half:] or history[-1:])
        if after - before > tolerance:
            found.append(f"{what} grew from {before} to {after}; {tolerance} more is tolerated")
    return found
