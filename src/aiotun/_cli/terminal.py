"""What a terminal gets: text that can't control it, and colours where a person looks."""

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


def wanted(stream: IO[str], environ: Mapping[str, str] = os.environ) -> bool:
    """Whether text for this stream is to have colours (https://no-color.org)."""
    if environ.get("NO_COLOR") or environ.get("TERM") == "dumb":
        return False
    return stream.isatty()


def printable(text: str) -> str:
    """Give text in which nothing but newlines controls a terminal; the rest as in Python's strings.

    An interface's name may hold any bytes but blanks, `/` and `:`, and others choose it.
    """
    if text.isprintable():
        return text
    return "".join(each if each == "\n" or each.isprintable() else _escaped(each) for each in text)


def _escaped(character: str) -> str:
    # What is not UTF-8 comes as one of these from the system (surrogateescape).
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def paint(text: str, colour: int | None, on: bool) -> str:
    """Give the text, made `printable`, in that colour, unless colours are off or it has none."""
    text = printable(text)
    return f"\x1b[{colour}m{text}\x1b[0m" if on and colour is not None else text
