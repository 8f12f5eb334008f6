"""The loop's worst stall during each request of a link, and what a thousand requests leave behind.

Stalls are measured as in `stall`: a heartbeat runs during the request and gives one number for each
round. Every round makes each request once, so that disturbances affect all of them equally. The
time of a request includes its thread, its netlink socket and its event loop.
"""

import gc
import os
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence

from aiotun import Link

from ._harness import BenchError, Row, Table, expect, run_on
from .stall import Heartbeat, pause

ROUNDS = 40
INFOS = 1000
NAME = "bench0"

Step = tuple[str, Callable[[], Awaitable[object]]]


def ip(words: str) -> None:
    done = subprocess.run(["ip", *words.split()], stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise BenchError(f"ip {words}: {done.stderr.strip()}")


def steps(link: Link, home: int, away: int) -> list[Step]:
    """Return every request once, in an order that restores the initial state."""

    async def watch() -> None:
        async with link.events():
            pass

    return [
        ("info", link.info),
        ("stats", link.stats),
        ("set_mtu", lambda: link.set_mtu(1400)),
        ("set_mac", lambda: link.set_mac("02:00:00:00:00:01")),
        ("set_txqueuelen", lambda: link.set_txqueuelen(100)),
        ("set_alias", lambda: link.set_alias("text")),
        ("set_master", lambda: link.set_master("bench1")),
        ("set_master, none", lambda: link.set_master(None)),
        ("up", link.up),
        ("add_address", lambda: link.add_address("10.77.0.1/24")),
        ("addresses", link.addresses),
        ("add_route", lambda: link.add_route("10.78.0.0/16 via 10.77.0.2")),
        ("routes", link.routes),
        ("remove_route", lambda: link.remove_route("10.78.0.0/16")),
        ("remove_address", lambda: link.remove_address("10.77.0.1/24")),
        ("events, begun and ended", watch),
        ("down", link.down),
        ("rename", lambda: link.rename("bench2")),
        ("rename back", lambda: link.rename(NAME)),
        ("move_to_netns", lambda: link.move_to_netns(away)),
        ("move_to_netns, back", lambda: link.move_to_netns(home)),
    ]


async def measure(loop: str, home: int, away: int) -> Table:
    link, heart = Link(NAME), Heartbeat()
    await link.info()  # the first request imports pyroute2, which `stall` measures
    stalls: dict[str, list[float]] = {}
    times: dict[str, list[float]] = {}
    quiet: list[float] = []
    for _ in range(ROUNDS + 1):
        for name, step in steps(link, home, away):

            async def timed(name: str = name, step: Callable[[], Awaitable[object]] = step) -> None:
                start = time.perf_counter()
                await step()
                times.setdefault(name, []).append((time.perf_counter() - start) * 1000)

            stalls.setdefault(name, []).append(await heart.worst_during(timed))
        quiet.append(await heart.worst_during(pause))
    await heart.stop()
    rows = [
        Row(name, "ms", samples[1:], percentile=90, target=2.0) for name, samples in stalls.items()
    ]
    rows.append(Row("the same, no request", "ms", quiet, percentile=90))
    rows.append(Row("time of info", "ms", times["info"][1:]))
    rows.append(
        Row(
            "time of the slowest",
            "ms",
            [max(each) for each in zip(*times.values(), strict=True)][1:],
        )
    )
    return Table("link", loop, f"worst stall during a request, {ROUNDS} of each", rows)


def kept() -> tuple[int, int, float]:
    """Return the number of open fds and threads, and MiB of memory."""
    gc.collect()
    with open("/proc/self/statm") as file:
        resident_bytes = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return len(os.listdir("/proc/self/fd")), threading.active_count(), resident_bytes / 2**20


def settled() -> None:
    """Wait for the threads of requests, which may still be ending after they have answered."""
    for thread in threading.enumerate():
        if thread.name == "aiotun":
            thread.join()


async def leaks(loop: str) -> Table:
    link = Link(NAME)
    more: list[tuple[int, int, float]] = []
    for _ in range(4):
        before = kept()
        for _ in range(INFOS):
            expect("name", (await link.info()).name, NAME)
        settled()
        fds, threads, mebibytes = (now - then for now, then in zip(kept(), before, strict=True))
        more.append((int(fds), int(threads), mebibytes))
    # Leave out the first time, when the allocator creates its arenas.
    fd_rows, thread_rows, memory = zip(*more[1:], strict=True)
    rows = [
        Row("file descriptors", "more", fd_rows, percentile=100, target=0),
        Row("threads", "more", thread_rows, percentile=100, target=0),
        Row("resident memory", "MiB more", memory, target=1.0),
    ]
    return Table("link", loop, f"what {INFOS} calls of info() leave behind, three times", rows)


def run(runs: int, loops: Sequence[str]) -> Iterator[Table]:
    """Measure. The number of rounds is fixed and does not depend on `runs`."""
    ip(f"tuntap add {NAME} mode tap")
    ip("link add bench1 type bridge")
    other = subprocess.Popen(
        ["unshare", "-n", "sh", "-c", "echo; exec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with other:
        assert other.stdout is not None
        other.stdout.readline()
        home = os.open("/proc/self/ns/net", os.O_RDONLY)
        away = os.open(f"/proc/{other.pid}/ns/net", os.O_RDONLY)
        try:
            for loop in loops:
                yield run_on(loop, measure(loop, home, away))
                yield run_on(loop, leaks(loop))
        finally:
            os.close(home)
            os.close(away)
            ip(f"link del {NAME}")
            ip("link del bench1")
