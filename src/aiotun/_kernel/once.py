"""What the `open_...` functions return: an object that is awaited or entered, once."""

from __future__ import annotations

import abc
from collections.abc import Coroutine, Generator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

__all__ = ["Once"]


class _Closable(Protocol):
    async def aclose(self) -> None: ...


T = TypeVar("T", bound=_Closable)


class Once(abc.ABC, Generic[T]):
    """Opens something when it is awaited, or for a block of ``async with``.

    Attributes:
        _opens, _example, _result: the class of what it opens, a call that returns the opener, and a
            name for the result: for the error that tells a user of a forgotten await.
        _level: how many frames `_open` is away from the user's code; the `stacklevel` of a warning.
    """

    __slots__ = ("_entered", "_level", "_used")
    _opens: type = object
    _example = _result = ""

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

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._example}: await it>"

    # Type checkers must not see this, because they report the mistake only if an opener lacks the
    # attributes.
    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            text = f"{type(self).__name__!r} object has no attribute {name!r}"
            if not name.startswith("_") and hasattr(self._opens, name):
                call, result = self._example, self._result
                text += (
                    f", because it was not awaited; write '{result} = await {call}' or "
                    f"'async with {call} as {result}:', and use '{result}'"
                )
            raise AttributeError(text, name=name, obj=self)
