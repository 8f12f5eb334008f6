"""Asking the program whether something is let in."""

from __future__ import annotations

import asyncio
import enum
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

__all__ = ["Refusal", "ask", "report"]


class Refusal(enum.Enum):
    """Why something is not let in, as the client is told by ICMP; `admit` returns one."""

    NET = "net"
    """Its network is unreachable (ENETUNREACH)."""
    HOST = "host"
    """Its host is unreachable (EHOSTUNREACH)."""
    PROHIBITED = "prohibited"
    """It is forbidden (EHOSTUNREACH; IPv6: EACCES)."""


def ask(
    what: str, question: Callable[[], Any], decided: Callable[[bool | Refusal], None]
) -> asyncio.Task[None] | None:
    """Ask a function of the program, plain or async, and pass its answer on.

    An error, or another answer than a bool or `Refusal`, is reported to the loop's exception
    handler, and is the same as False. So is a cancellation.

    Args:
        what: the function's name.
        question: calls it.
        decided: gets the answer, exactly once.

    Returns:
        The task that waits for the answer, if there is none yet.
    """
    try:
        answer = question()
    except Exception as error:  # noqa: BLE001 - it is the program's, and reported
        report(what, error)
        answer = False
    if inspect.isawaitable(answer):
        return asyncio.get_running_loop().create_task(_wait(what, answer, decided))
    decided(_checked(what, answer))
    return None


async def _wait(
    what: str, asked: Awaitable[Any], decided: Callable[[bool | Refusal], None]
) -> None:
    answer: Any = False
    try:
        answer = await asked
    except Exception as error:  # noqa: BLE001 - as above
        report(what, error)
    finally:
        decided(_checked(what, answer))


def _checked(what: str, answer: Any) -> bool | Refusal:
    if isinstance(answer, bool | Refusal):
        return answer
    report(what, TypeError(f"{what} must return a bool or a Refusal, got {answer!r}"))
    return False


def report(what: str, error: Exception) -> None:
    """Give an error of the program's own function to the loop's exception handler."""
    asyncio.get_running_loop().call_exception_handler(
        {"message": f"aiotun: {what} has failed", "exception": error}
    )
