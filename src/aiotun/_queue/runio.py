"""Receiving runs. A task takes a buffer only when there is a packet to read.

So a task that waits for a packet holds no buffer, and other queues can use the pool meanwhile.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from .._kernel.abi import READ_SIZE
from .._packets.runs import LIMIT, Layout, Pool

__all__ = ["NoBufferError", "checked_layout", "padded_to", "receive_run"]

T = TypeVar("T")
Source = TypeVar("Source")


class NoBufferError(Exception):
    """No buffer of a pool is free. Users never see this error: receiving waits for one."""


async def receive_run(
    pool: Pool,
    wait_for_buffer: Callable[[Pool], Awaitable[None]],
    receive: Callable[[Callable[[Source], T]], Coroutine[Any, Any, T]],
    take: Callable[[Source], T],
) -> T:
    """Receive with `take`, which raises `NoBufferError` while the pool has no free buffer."""
    while True:
        if not pool.free:
            await wait_for_buffer(pool)
        try:
            return await receive(take)
        except NoBufferError:
            continue  # another task took the buffer while this one waited for a packet


def checked_layout(pool: Pool, before: int, after: int, align: int, limit: int) -> Layout:
    """Check the arguments of `recv_run`. The layout's `most` is set later, with `padded_to`."""
    if not isinstance(pool, Pool):
        raise TypeError(f"recv_run needs an aiotun.runs.Pool, not {type(pool).__name__}")
    return _checked_layout(pool.size, before, after, align, limit)


# Cached, because a program asks for the same layout thousands of times a second. `typed`, so that
# True is not taken for 1.
@functools.lru_cache(maxsize=64, typed=True)
def _checked_layout(size: int, before: int, after: int, align: int, limit: int) -> Layout:
    for what, number, least, most in (
        ("before", before, 0, READ_SIZE),
        ("after", after, 0, READ_SIZE),
        ("align", align, 1, 4096),
        ("limit", limit, 1, LIMIT),
    ):
        if type(number) is not int:
            raise TypeError(f"{what} must be an int, not {type(number).__name__}")
        if not least <= number <= most:
            raise ValueError(f"{what} must be {least} to {most}, got {number}")
    needed = before + READ_SIZE + align + after
    if size < needed:
        raise ValueError(
            f"the pool's buffers have {size} bytes, and the longest packet with its room "
            f"needs {needed}; make it with Pool(..., size={needed})"
        )
    return Layout(before, after, align, 0, limit)


@functools.lru_cache(maxsize=64)
def padded_to(layout: Layout, most: int) -> Layout:
    """Return the same layout, with padding up to a packet of `most` bytes."""
    return layout._replace(most=most)
