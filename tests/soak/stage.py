"""What a scene of the soak gets, and how it ends."""

import asyncio
import contextlib
import dataclasses
import random
from collections.abc import Callable, Coroutine
from typing import Any

import aiotun

from .ledger import Flow, Ledger

__all__ = ["HANG", "Scene", "Stage", "pause", "settled", "stats_of"]

_QUIET, _LOOKS = 0.1, 5  # seconds without a packet, and how many times in a row
HANG = 10.0  # seconds that anything may take to end


@dataclasses.dataclass
class Stage:
    """The argument of a scene."""

    ledger: Ledger
    chance: random.Random
    peer: int
    """Another network namespace, as an fd."""
    stop: asyncio.Event
    rate: float
    """Datagrams a second of each flow."""
    number: int
    """The scene's number, from which the names of its interfaces and its addresses are made."""

    def flow(self, name: str) -> Flow:
        return Flow(self.ledger, name, self.chance)

    def count(self, what: str, number: int = 1) -> None:
        self.ledger.events[what] += number

    async def finish(self, *tasks: asyncio.Task[Any]) -> None:
        """Wait for tasks that are about to end by themselves."""
        if not tasks:
            return
        done, late = await asyncio.wait(tasks, timeout=HANG)
        for task in late:
            self.ledger.problem(f"a task hangs: {task.get_name()}: {task.get_stack()}")
            task.cancel()
        for task in done:
            if not task.cancelled() and (error := task.exception()) is not None:
                raise error


async def settled(count: Callable[[], int]) -> None:
    """Wait until no more packets arrive.

    Checks several times, with at least one turn of the loop in between: on a busy machine a packet
    may wait longer than one interval, but its receiver gets a turn in each.
    """
    before, quiet = count(), 0
    while quiet < _LOOKS:
        await asyncio.sleep(_QUIET)
        now = count()
        quiet = quiet + 1 if now == before else 0
        before = now


async def stats_of(device: aiotun.Device, count: Callable[[], object]) -> aiotun.LinkStats:
    """Read the kernel's counters at a moment at which ours don't change.

    The kernel sends packets even when we don't: ARP confirms its neighbors at any time.
    """
    while True:
        before = count()
        stats = await device.link.stats()
        if count() == before:
            return stats


async def pause(stage: Stage, seconds: float) -> None:
    """Sleep, but not beyond the end of the round."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stage.stop.wait(), seconds)


Scene = Callable[[Stage], Coroutine[Any, Any, None]]
"""A scene runs until its stage's `stop` is set, and then accounts for its packets."""
