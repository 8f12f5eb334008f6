"""Finds what a test left open."""

import gc
import os
import threading
import time
from collections import Counter


def _open_files() -> Counter[str]:
    """Count the open fds that a test could leak: devices, network namespaces and sockets."""
    found: Counter[str] = Counter()
    for fd in os.listdir("/proc/self/fd"):
        try:
            link = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:  # the fd that listed the folder
            continue
        if link == "/dev/net/tun" or link.startswith(("net:[", "socket:[")):
            found[link] += 1
    return found


def _our_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("aiotun")]


class LeakCheck:
    """Remembers what is open now, to compare with later."""

    def __init__(self) -> None:
        self._before = _open_files()

    def problem(self, timeout: float = 5.0) -> str | None:
        """Return what has been opened and not closed since, in words, or None.

        Devices close in short-lived threads, so this first waits for those threads, `timeout`
        seconds at most.
        """
        deadline = time.monotonic() + timeout
        for thread in _our_threads():
            thread.join(max(0.0, deadline - time.monotonic()))
        threads = _our_threads()
        leaked = _open_files() - self._before
        if leaked:
            gc.collect()  # also raises ResourceWarning in the test that caused it
            leaked = _open_files() - self._before
        if threads or leaked:
            return f"left behind: fds {sorted(leaked.elements())}, threads {threads}"
        return None
