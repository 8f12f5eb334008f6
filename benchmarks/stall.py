"""The event loop's worst stall while devices are opened and closed.

A heartbeat sleeps for a millisecond again and again. How much longer it sleeps is a stall. Each
round gives one number, its worst stall. Every other round opens nothing, to show how much the
machine and the loop's own timers add. A program's first opening imports pyroute2, so it is
measured separately, in fresh interpreters.
"""

import asyncio
import contextlib
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence

import aiotun

from ._harness import Row, Table, expect, fresh, run_on, warm_environment

ROUNDS = 60
BEAT = 0.001
PAUSE = 0.025  # about as long as a round with an opening


class Heartbeat:
    """A task that records the worst stall."""

    def __init__(self) -> None:
        self.worst = 0.0
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while True:
            due = time.perf_counter() + BEAT
            await asyncio.sleep(BEAT)
            self.worst = max(self.worst, time.perf_counter() - due)

    async def worst_during(self, action: Callable[[], Awaitable[None]]) -> float:
        """Return the worst stall in milliseconds. Beats before and after cover the whole action."""
        await asyncio.sleep(5 * BEAT)
        self.worst = 0.0
        await action()
        await asyncio.sleep(5 * BEAT)
        return self.worst * 1000

    async def stop(self) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task


class Opener:
    """Opens and closes devices, and measures how long that takes."""

    def __init__(self) -> None:
        self.opening: list[float] = []
        self.closing: list[float] = []

    async def round(self) -> None:
        start = time.perf_counter()
        tun = await aiotun.open_tun("bench0", addresses=["10.77.0.1/24"], mtu=1400)
        middle = time.perf_counter()
        expect("MTU", tun.mtu, 1400)
        closing = time.perf_counter()
        await tun.aclose()
        self.closing.append((time.perf_counter() - closing) * 1000)
        self.opening.append((middle - start) * 1000)


async def pause() -> None:
    await asyncio.sleep(PAUSE)


async def first() -> tuple[float, float]:
    """Return the worst stall and the time of the first opening in this interpreter."""
    opener, heart = Opener(), Heartbeat()
    worst = await heart.worst_during(opener.round)
    await heart.stop()
    return worst, opener.opening[0]


async def measure(loop: str, firsts: Sequence[tuple[float, float]]) -> Table:
    await first()  # the first opening imports pyroute2
    opener, heart = Opener(), Heartbeat()
    stalls: list[float] = []
    quiet: list[float] = []
    for _ in range(ROUNDS):
        stalls.append(await heart.worst_during(opener.round))
        quiet.append(await heart.worst_during(pause))
    await heart.stop()
    rows = [
        Row("worst stall of a round", "ms", stalls, percentile=90, target=2.0),
        Row("the same without opening", "ms", quiet, percentile=90),
        Row("the same, first opening", "ms", [stall for stall, _ in firsts], percentile=90),
        Row("opening", "ms", opener.opening, target=8.0),
        Row("opening, the first", "ms", [opening for _, opening in firsts]),
        Row("closing", "ms", opener.closing),
    ]
    what = f"{ROUNDS} devices with an address and an MTU opened and closed"
    return Table("stall", loop, what, rows)


def first_fresh(loop: str, environment: dict[str, str]) -> tuple[float, float]:
    stall, opening = fresh("-m", "benchmarks.stall", loop, environment=environment)
    return float(stall), float(opening)


def run(runs: int, loops: Sequence[str]) -> Iterator[Table]:
    """Measure. `runs` is the number of fresh interpreters; the number of rounds is fixed."""
    with warm_environment() as environment:
        for loop in loops:
            first_fresh(loop, environment)
            firsts = [first_fresh(loop, environment) for _ in range(runs)]
            yield run_on(loop, measure(loop, firsts))


if __name__ == "__main__":
    print(*run_on(sys.argv[1], first()))
