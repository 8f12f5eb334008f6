"""The entry point to rtnetlink; imports pyroute2 only when the first session begins."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from .session import Session

__all__ = ["in_session"]

T = TypeVar("T")


def in_session(work: Callable[[Session], Awaitable[T]]) -> T:
    """Run `work` in an rtnetlink session; see `session.in_session`."""
    # Imported here, in the session's thread: importing pyroute2 takes about a hundred milliseconds.
    from . import session

    return session.in_session(work)
