"""Closing a stack, so that no task waits forever: not here, nor at a connection's other end."""

from __future__ import annotations

import asyncio
import contextlib
import select
from typing import TYPE_CHECKING

from .._kernel import threads
from .._kernel.namespaces import setns
from ..errors import AiotunError
from . import diag
from .opening import undo

if TYPE_CHECKING:
    from .diag import Connection
    from .opening import Prepared

__all__ = ["close_now", "reset", "reset_now"]

# How many connections are reset before the tasks that read the device get a turn. Each reset is a
# packet, and the device holds 500.
_AT_ONCE = 100

# How many turns of the loop these tasks get.
_TURNS = 20


def _find(prepared: Prepared) -> list[Connection]:
    """List the connections; an empty list if the kernel can't list them."""
    core = prepared.core
    try:
        if prepared.owns_namespace:
            return diag.connections(prepared.diag)
        return diag.connections(prepared.diag, core.tun.index, core.own)
    except OSError:
        return []


def _destroy(prepared: Prepared, some: list[Connection]) -> None:
    # A kernel without SOCK_DESTROY can't reset them.
    with contextlib.suppress(OSError):
        diag.destroy(prepared.diag, some)


def reset_now(prepared: Prepared) -> None:
    """Reset every connection. Blocks, about 10 us for each."""
    _destroy(prepared, _find(prepared))


async def reset(prepared: Prepared) -> None:
    """Reset every connection, and let the tasks that read the device carry the resets to peers."""
    found = await threads.run(lambda: _find(prepared), or_here=True)
    while True:
        some, found = found[:_AT_ONCE], found[_AT_ONCE:]
        _destroy(prepared, some)
        for _ in range(_TURNS):  # at least one turn, for the resets that `Admission.close` sent
            await asyncio.sleep(0)
            if not _holds_packets(prepared):
                break
        if not found:
            break


def _holds_packets(prepared: Prepared) -> bool:
    queue = prepared.core.tun.queues[0]
    if queue.closed:
        return False
    if queue.port.pending:
        return True
    poll = select.poll()
    poll.register(queue.fileno(), select.POLLIN)
    try:
        return poll.poll(0) == [(queue.fileno(), select.POLLIN)]
    except OSError:  # RLIMIT_NOFILE is 0: poll(2) fails with EINVAL
        return True


def close_now(prepared: Prepared) -> None:
    """Close the rest, without waiting."""
    core = prepared.core
    prepared.diag.close()
    core.tun.close()
    if prepared.owns_namespace:
        core.namespace.close()
    elif prepared.place is not None:
        place, name = prepared.place, core.tun.name

        def leave() -> None:
            with contextlib.suppress(AiotunError):
                setns(place.fd)
                undo(name)

        threads.start(leave, lambda: None)
