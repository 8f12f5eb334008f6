"""Asking the program's functions (`admit`, `on_ping`) for a decision."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

from .answers import Refusal

__all__ = ["ask", "report", "result_of"]


def ask(
    what: str, question: Callable[[], Any], decided: Callable[[bool | Refusal], None]
) -> asyncio.Future[Any] | None:
    """Call a function of the program, plain or async, and pass its answer on.

    If the function raises, or returns anything but a bool or a `Refusal`, the error goes to the
    loop's exception handler, and the answer is False. A cancellation counts as False, too.

    Args:
        what: the function's name.
        question: calls the function.
        decided: called with the answer, exactly once.

    Returns:
        The future of the answer, if there is no answer yet. Cancel it if the answer is not needed
        any more.
    """
    try:
        answer = question()
    except Exception as error:  # noqa: BLE001 - it is the program's, and reported
        report(what, error)
        answer = False
    if not inspect.isawaitable(answer):
        decided(_checked(what, answer))
        return None
    # Make a task of the function's own coroutine, and use a callback. A coroutine of ours around it
    # would never run if its task were cancelled before the first step, and `decided` would not be
    # called, not even from a "finally" block.
    asked = asyncio.ensure_future(answer)
    asked.add_done_callback(lambda done: decided(_checked(what, result_of(what, done, False))))
    return asked


def result_of(what: str, done: asyncio.Future[Any], default: object) -> object:
    """Return a task's result; if it failed, report the error and return the default."""
    if done.cancelled():
        return default
    error = done.exception()
    if error is None:
        return done.result()
    report(what, error)
    return default


def _checked(what: str, answer: object) -> bool | Refusal:
    if isinstance(answer, bool | Refusal):
        return answer
    report(what, TypeError(f"{what} must return a bool or a Refusal, got {answer!r}"))
    return False


def report(what: str, error: BaseException) -> None:
    """Pass an error of the program's function to the loop's exception handler."""
    asyncio.get_running_loop().call_exception_handler(
        {"message": f"aiotun: {what} has failed", "exception": error}
    )
