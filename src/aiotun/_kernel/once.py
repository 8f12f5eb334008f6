"""What the `open_...` functions return: an object that is awaited or entered, once."""

from __future__ import annotations

import abc
from collections.abc import Coroutine, Generator
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

__all__ = ["Once"]


class _Closable(Protocol):
    async def aclose(self) -> None: ...


T = TypeVar("T", bound=_Closable)


class Once(abc.ABC, Generic[T]):
    """Opens something when it is awaited, or for a block of ``async with``.

    Attributes:
        _level: how many frames `_open` is away from the user's code; the `stacklevel` of a warning.
    """

    __slots__ = ("_entered", "_level", "_used")

    def __init__(self) -> None:
        self._entered: T | None = None
        self._level = 2
        self._used = False

    @abc.abstractmethod
    async def _open(self) -> T: ...

    def _use(self) -> None:
        """Note that the opener is used.

        Raises:
            RuntimeError: it was used before.
        """
        if self._used:
            raise RuntimeError(
                "this opener was used before, and an opener can be used once; call the function "
                "that made it again"
            )
        self._used = True

    def _start(self) -> Coroutine[Any, Any, T]:
        self._use()
        return self._open()

    def __await__(self) -> Generator[Any, None, T]:
        return self._start().__await__()

    async def __aenter__(self) -> T:
        self._level = 3
        self._entered = await self._start()
        return self._entered

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        entered, self._entered = self._entered, None
        if entered is not None:
            await entered.aclose()
