"""The door to rtnetlink: loads what a conversation needs when the first one is held."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from .session import Session

__all__ = ["in_session"]

T = TypeVar("T")


def in_session(work: Callable[[Session], Awaitable[T]]) -> T:
    """Hold a conversation with rtnetlink: `session.in_session`, loaded only now."""
    # Imported here, in a thread: pyroute2 takes a hundred milliseconds the first time.
    from . import session

    return session.in_session(work)
