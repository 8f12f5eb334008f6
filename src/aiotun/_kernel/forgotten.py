"""A hint for users who forget to await an opener."""

from typing import TYPE_CHECKING, Any

__all__ = ["Forgettable"]


class Forgettable:
    """The base of an opener that is often used as if it were what it opens.

    Attributes:
        _opens: the class of what it opens.
        _example: a call that makes the opener.
        _result: a name for what it opens.
    """

    __slots__ = ()
    _opens: type
    _example: str
    _result: str

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
