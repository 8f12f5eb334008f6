"""Faults that the soak must find; its tests plant one at a time."""

import asyncio
import os
import threading
from typing import Any

from aiotun.queue import Queue

from .stage import Stage

__all__ = ["PLANTS", "after_round", "hanging", "prepare"]

PLANTS = ("fd", "thread", "memory", "lose", "duplicate", "hang")

_kept: list[Any] = []


def prepare(plant: str | None) -> None:
    """Break receiving in the library if `plant` asks for it."""
    if plant not in ("lose", "duplicate"):
        return
    honest = Queue._take_many
    calls = 0

    def take_many(self: Queue, limit: int) -> list[bytes]:
        nonlocal calls
        calls += 1
        packets = honest(self, limit)
        if calls % 20 == 0:
            return packets[:-1] if plant == "lose" else packets + packets[-1:]
        return packets

    Queue._take_many = take_many  # type: ignore[method-assign]  # on purpose


def after_round(plant: str | None) -> None:
    """Leak."""
    if plant == "fd":
        _kept.append(os.open("/dev/null", os.O_RDONLY))
    elif plant == "thread":
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    elif plant == "memory":
        _kept.append([object() for _ in range(5000)])


async def hanging(stage: Stage) -> None:
    """A scene that does not end."""
    await asyncio.get_running_loop().create_future()
