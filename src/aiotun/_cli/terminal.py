"""Text for a terminal: escaped so that it can't control the terminal, and colored for people."""

import os
from collections.abc import Mapping
from typing import IO

__all__ = [
    "BLUE",
    "BOLD",
    "CYAN",
    "DIM",
    "GREEN",
    "MAGENTA",
    "RED",
    "YELLOW",
    "paint",
    "printable",
    "wanted",
]

BOLD, DIM, RED, GREEN, YELLOW, BLUE, MAGENTA, CYAN = 1, 2, 31, 32, 33, 34, 35, 36


def wanted(stream: IO[str] | None, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether to color the text for this stream (https://no-color.org); it may be closed."""
    if environ.get("NO_COLOR") or environ.get("TERM") == "dumb":
        return False
    return stream is not None and stream.isatty()


def printable(text: str) -> str:
    """Escape what could control a terminal, except newlines, as in Python's string literals.

    An interface's name may contain any bytes except blanks, `/` and `:`, and strangers choose it.
    """
    if text.isprintable():
        return text
    return "".join(each if each == "\n" or each.isprintable() else _escaped(each) for each in text)


def _escaped(character: str) -> str:
    # Python decodes a byte that is not UTF-8 to one of these (surrogateescape).
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def paint(text: str, colour: int | None, on: bool) -> str:
    """Return the text, made `printable`, in this color; uncolored if `on` is false."""
    text = printable(text)
    return f"\x1b[{colour}m{text}\x1b[0m" if on and colour is not None else text
