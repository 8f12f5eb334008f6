"""The invariants of a served fd: a queue's, or a datagram socket's.

Every test asserts them after each call of the event loop to one. They are the sentences of
`aiotun._queue.serving`'s docstring. The library itself doesn't check them, so they cost its users
nothing.
"""

import weakref
from collections.abc import Callable
from typing import Any

import pytest

from aiotun._packets.runs import Pool
from aiotun._queue.packetio import BUDGET
from aiotun._queue.serving import ServedFd
from aiotun.queue import Queue

__all__ = ["check", "install"]

# Every pool of the tests: a queue does not know whose buffers its tasks wait for.
_pools: weakref.WeakSet[Pool] = weakref.WeakSet()

_CHECKED = ("_readable", "_rest_ready", "_writable", "_link_down", "release")


def check(queue: ServedFd) -> None:
    """Assert the invariants that hold while none of the queue's tasks is being resumed."""
    watch, group = queue._watch, queue._peers()
    assert queue._free == 0, "tasks may read first, but no task is being resumed"
    assert not queue._resuming
    assert 0 <= queue._budget <= BUDGET
    for line in (queue._receivers, queue._senders, queue._parked):
        assert not line or not (line[0].done() or line[-1].done()), (
            "a line has a done task at an end"
        )
    if queue.ready:
        assert watch.loop is not None, "calls that need no loop, before there is one"
        assert not queue.closed
        assert queue._lost is None
    if queue.closed or queue._lost is not None:
        assert not watch.alive or not (watch.reading or watch.writing or watch.nudging)
        assert not watch.alive or not (queue._receivers or queue._senders or queue._parked)
        return
    if queue._receivers:
        assert watch.reading, "a task waits for a packet, and the queue is not watched"
    if queue._senders:
        assert watch.writing, "a task waits for room, and the queue is not watched"
    if group is not None and group.line:
        assert watch.reading, "a task waits on the device, and this queue is not watched"
    if watch.reading and queue.port.pending:
        assert watch.nudging, "the port keeps packets, and the loop will not call the queue"
    if watch.nudging:
        assert watch.reading
    if queue._parked:
        assert any(
            line is queue._parked for pool in _pools for line in pool._lines if not pool.free
        ), "a task waits for a buffer, and no pool will wake it"


def _checking(method: Callable[..., Any]) -> Callable[..., Any]:
    def checked(queue: ServedFd, *args: Any) -> Any:
        # A call from within a resumed task (which closes the queue, for example) is checked later:
        # the invariants hold again when that task has returned to the loop.
        inside = queue._resuming
        result = method(queue, *args)
        if not inside:
            check(queue)
        return result

    return checked


def _checking_left(method: Callable[..., Any]) -> Callable[..., Any]:
    """Check which packets a queue did not send: where they were in the batch, in order."""

    def checked(queue: Queue, packets: list[Any]) -> Any:
        left = method(queue, packets)
        assert list(left) == sorted(set(left) & set(range(len(packets))))
        return left

    return checked


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Queue, "_send_at_once", _checking_left(Queue._send_at_once))
    honest = Pool.__init__

    def noted(pool: Pool, *args: Any, **options: Any) -> None:
        honest(pool, *args, **options)
        _pools.add(pool)

    monkeypatch.setattr(Pool, "__init__", noted)
    for name in _CHECKED:
        monkeypatch.setattr(ServedFd, name, _checking(getattr(ServedFd, name)))
