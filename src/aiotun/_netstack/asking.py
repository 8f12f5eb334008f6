"""Asking the program whether something is let in."""

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
    """Ask a function of the program, plain or async, and pass its answer on.

    An error, or another answer than a bool or `Refusal`, is reported to the loop's exception
    handler, and is the same as False. So is a cancellation.

    Args:
        what: the function's name.
        question: calls it.
        decided: gets the answer, exactly once.

    Returns:
        What is waited for, if there is no answer yet. Cancel it if nobody wants the answer any
        more.
    """
    try:
        answer = question()
    except Exception as error:  # noqa: BLE001 - it is the program's, and reported
        report(what, error)
        answer = False
    if not inspect.isawaitable(answer):
        decided(_checked(what, answer))
        return None
    # The function's own coroutine, and a callback: a coroutine around it would not be run at all,
    # nor would what it has under "finally", where its task is cancelled before it begins.
    asked = asyncio.ensure_future(answer)
    asked.add_done_callback(lambda done: decided(_checked(what, result_of(what, done, False))))
    return asked


def result_of(what: str, done: asyncio.Future[Any], default: object) -> object:
    """Give the result of what the program's function began; report an error, and give a default."""
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
    """Give an error of the program's own function to the loop's exception handler."""
    asyncio.get_running_loop().call_exception_handler(
        {"message": f"aiotun: {what} has failed", "exception": error}
    )
