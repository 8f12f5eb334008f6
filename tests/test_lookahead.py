"""When a queue polls for the next packet, and how often."""

import os
import select
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from aiotun._queue import lookahead
from aiotun._queue.lookahead import Lookahead


class CountedPoll:
    """A poll object that counts its calls."""

    calls = 0

    def __init__(self) -> None:
        self._poll = select.poll()
        self.register = self._poll.register

    def poll(self, timeout: int) -> list[tuple[int, int]]:
        CountedPoll.calls += 1
        return self._poll.poll(timeout)


@pytest.fixture(name="pipe")
def _pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    fake = SimpleNamespace(poll=CountedPoll, POLLIN=select.POLLIN)
    monkeypatch.setattr(lookahead, "select", fake)
    monkeypatch.setattr(CountedPoll, "calls", 0)
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def look_on(cores: set[int], fd: int) -> int:
    """Look in vain, on these cores; return how often this polled."""
    found: list[bool] = []

    def look() -> None:
        os.sched_setaffinity(0, cores)  # of this thread
        found.append(Lookahead().look(fd))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [False]
    return CountedPoll.calls


def test_on_a_single_core_polling_once_says_everything(pipe: tuple[int, int]) -> None:
    assert look_on({min(os.sched_getaffinity(0))}, pipe[0]) == 1


@pytest.mark.skipif(len(os.sched_getaffinity(0)) == 1, reason="there is a single core")
def test_where_the_sender_has_another_core_polling_goes_on(pipe: tuple[int, int]) -> None:
    assert look_on(os.sched_getaffinity(0), pipe[0]) > 1


def test_polling_that_stopped_paying_is_tried_soon_and_then_seldom(pipe: tuple[int, int]) -> None:
    ahead = Lookahead()
    os.write(pipe[1], b"x")
    assert ahead.look(pipe[0])
    os.read(pipe[0], 1)
    assert ahead.due()
    assert not ahead.look(pipe[0])
    tried = [wakeup for wakeup in range(3, 50) if ahead.due()]
    assert tried == [4, 8, 16, 32, 48]


def test_polling_that_pays_goes_on(pipe: tuple[int, int]) -> None:
    ahead = Lookahead()
    os.write(pipe[1], b"x")
    for _ in range(40):
        assert ahead.look(pipe[0])
        assert ahead.due()


def test_polling_that_pays_does_not_make_every_run_try_a_second_one(pipe: tuple[int, int]) -> None:
    ahead = Lookahead()
    os.write(pipe[1], b"x")
    ahead.due()
    assert ahead.look(pipe[0])
    assert not ahead.another()
