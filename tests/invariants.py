"""The invariants of a queue, asserted around everything that the event loop calls, in every test.

They are the sentences of `aiotun.queue`'s docstring. The library has no check of its own, so it
costs nothing there.
"""

from collections.abc import Callable
from typing import Any

import pytest

from aiotun._queue.packetio import BUDGET
from aiotun.queue import Queue

__all__ = ["check", "install"]

_CHECKED = ("_readable", "_rest_ready", "_writable", "_link_down", "release")


def check(queue: Queue) -> None:
    """Assert what holds of a queue whenever none of its tasks is being resumed."""
    watch, group = queue._watch, queue._peers()
    assert queue._free == 0, "tasks may read unasked, and none is being resumed"
    assert not queue._resuming
    assert 0 <= queue._budget <= BUDGET
    for line in (queue._receivers, queue._senders):
        assert not line or not (line[0].done() or line[-1].done()), "a line ends in who has left it"
    if queue.closed or queue._lost is not None:
        assert not watch.alive or not (watch.reading or watch.writing or watch.nudging)
        assert not watch.alive or not (queue._receivers or queue._senders)
        return
    if queue._receivers:
        assert watch.reading, "a task waits for a packet that nobody will tell of"
    if queue._senders:
        assert watch.writing, "a task waits for room that nobody will tell of"
    if group is not None and group.line:
        assert watch.reading, "a task of the device waits, and this queue is not watched"
    if watch.reading and queue.port.pending:
        assert watch.nudging, "the port keeps packets that nobody will tell of"
    if watch.nudging:
        assert watch.reading


def _checking(method: Callable[..., Any]) -> Callable[..., Any]:
    def checked(queue: Queue, *args: Any) -> Any:
        # Within a resumed task (which closes the queue, say) it holds only once that is over.
        inside = queue._resuming
        result = method(queue, *args)
        if not inside:
            check(queue)
        return result

    return checked


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in _CHECKED:
        monkeypatch.setattr(Queue, name, _checking(getattr(Queue, name)))
