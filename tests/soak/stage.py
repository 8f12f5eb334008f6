"""What a scene of the soak is given, and how it ends."""

import asyncio
import contextlib
import dataclasses
import random
from collections.abc import Callable, Coroutine
from typing import Any

import aiotun

from .ledger import Flow, Ledger

__all__ = ["HANG", "Scene", "Stage", "pause", "settled", "stats_of"]

_QUIET, _LOOKS = 0.1, 5  # seconds without a packet, so many times
HANG = 10.0  # seconds that anything here may take at its end


@dataclasses.dataclass
class Stage:
    """What a scene is given."""

    ledger: Ledger
    chance: random.Random
    peer: int
    """Another network namespace, as an fd."""
    stop: asyncio.Event
    rate: float
    """Datagrams a second, of each flow."""
    number: int
    """Of the scene: its interfaces and addresses are made with it."""

    def flow(self, name: str) -> Flow:
        return Flow(self.ledger, name, self.chance)

    def count(self, what: str, number: int = 1) -> None:
        self.ledger.events[what] += number

    async def finish(self, *tasks: asyncio.Task[Any]) -> None:
        """Wait for tasks that end by themselves by now."""
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
    """Wait until nothing arrives any more.

    Several looks, each a turn of the loop at the least: on a busy machine a packet may lie ready
    for longer than any one of them, but each gives whoever has to take it a turn.
    """
    before, quiet = count(), 0
    while quiet < _LOOKS:
        await asyncio.sleep(_QUIET)
        now = count()
        quiet = quiet + 1 if now == before else 0
        before = now


async def stats_of(device: aiotun.Device, count: Callable[[], object]) -> aiotun.LinkStats:
    """Read the kernel's counters at a moment at which ours stand still.

    Even where we are quiet the kernels are not: ARP confirms its neighbours when it likes.
    """
    while True:
        before = count()
        stats = await device.link.stats()
        if count() == before:
            return stats


async def pause(stage: Stage, seconds: float) -> None:
    """Sleep, but not beyond the end."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stage.stop.wait(), seconds)


Scene = Callable[[Stage], Coroutine[Any, Any, None]]
"""Runs until the stage says stop, and then accounts for its packets."""
