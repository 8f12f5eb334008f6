"""Colours, where a person looks."""

import os
from collections.abc import Mapping
from typing import IO

__all__ = ["BLUE", "BOLD", "CYAN", "DIM", "GREEN", "MAGENTA", "RED", "YELLOW", "paint", "wanted"]

BOLD, DIM, RED, GREEN, YELLOW, BLUE, MAGENTA, CYAN = 1, 2, 31, 32, 33, 34, 35, 36


def wanted(stream: IO[str], environ: Mapping[str, str] = os.environ) -> bool:
    """Whether text for this stream is to have colours (https://no-color.org)."""
    if environ.get("NO_COLOR") or environ.get("TERM") == "dumb":
        return False
    return stream.isatty()


def paint(text: str, colour: int | None, on: bool) -> str:
    """Give the text in that colour, unless colours are off or it has none."""
    return f"\x1b[{colour}m{text}\x1b[0m" if on and colour is not None else text
