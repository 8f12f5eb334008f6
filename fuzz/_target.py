"""Defines what a fuzz target is, and where its files are."""

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

__all__ = ["CORPUS", "FINDINGS", "ROOT", "Choices", "Target"]

ROOT = Path(__file__).parent.parent
CORPUS = ROOT / "fuzz" / "corpus"
FINDINGS = ROOT / "build" / "fuzz"


@dataclasses.dataclass(frozen=True)
class Target:
    """One parser, or several that read the same kind of bytes.

    Attributes:
        name: the name of the target, and of its folders in corpus/ and build/fuzz/.
        check: takes an input, and raises any exception if the promise is broken.
        property: the promise, in words.
        missing: returns why this machine can't check the target, or None if it can.
    """

    name: str
    check: Callable[[bytes], object]
    property: str
    missing: Callable[[], str | None] = lambda: None

    def seeds(self) -> list[bytes]:
        """Return the initial inputs, always in the same order."""
        return [path.read_bytes() for path in sorted((CORPUS / self.name).iterdir())]


class Choices(random.Random):
    """A random generator that takes its numbers from an input's bytes, and zeros after its end.

    A target can use it to build well-formed packets with correct checksums. An engine that only
    mutates bytes would practically never produce one.
    """

    def __new__(cls, data: bytes) -> "Choices":
        return super().__new__(cls)

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def getrandbits(self, count: int, /) -> int:
        size = (count + 7) // 8
        part = self._data[self._at : self._at + size]
        self._at += size
        return int.from_bytes(part.ljust(size, b"\0"), "big") >> (size * 8 - count)

    def random(self) -> float:
        return self.getrandbits(53) / (1 << 53)

    @property
    def over(self) -> bool:
        """Whether all of the input has been used."""
        return self._at >= len(self._data)

    def rest(self, most: int) -> bytes:
        """Return up to `most` of the next bytes unchanged."""
        part = self._data[self._at : self._at + most]
        self._at += most
        return part
