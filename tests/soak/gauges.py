"""What must not grow: fds, threads, memory."""

import ctypes
import gc
import os
import sys
from typing import NamedTuple

__all__ = ["Gauge", "growth", "measure"]

# Measured over hours without a leak: the allocator keeps pages in which long-lived and short-lived
# objects are mixed, and caches (of types, of lines, of regular expressions) fill up.
_RSS_TOLERANCE_KIB = 4096
_BLOCKS_TOLERANCE = 2000


class Gauge(NamedTuple):
    """The figures at one moment."""

    fds: int
    threads: int
    rss_kib: int
    blocks: int
    """Objects in Python's allocator: a leak shows here at once, and in RSS only later."""


def measure(*, tidy: bool = False) -> Gauge:
    """Measure; `tidy` first collects garbage and returns free pages to the kernel."""
    if tidy:
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    return Gauge(
        fds=len(os.listdir("/proc/self/fd")) - 1,  # the fd that lists the folder
        threads=len(os.listdir("/proc/self/task")),
        rss_kib=pages * os.sysconf("SC_PAGE_SIZE") // 1024,
        blocks=sys.getallocatedblocks(),
    )


def growth(history: list[Gauge]) -> list[str]:
    """Return what has grown over the rounds after the warm-up, in words.

    The number of fds and threads must be the same after every round. For memory this compares the
    maximum of the first half with the minimum of the second half: a leak lifts that minimum above
    the maximum, and noise does not.
    """
    if not history:  # the soak ended before
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
