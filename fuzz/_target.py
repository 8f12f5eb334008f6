"""What a target is, and where its files are."""

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
        name: of the target, and of its folders in corpus/ and build/fuzz/.
        check: is given an input and raises where the property does not hold, whatever it raises.
        property: what is promised, in words.
        missing: says why this can't be checked on this machine; None where it can.
    """

    name: str
    check: Callable[[bytes], object]
    property: str
    missing: Callable[[], str | None] = lambda: None

    def seeds(self) -> list[bytes]:
        """The inputs to begin with, in an order that does not change."""
        return [path.read_bytes() for path in sorted((CORPUS / self.name).iterdir())]


class Choices(random.Random):
    """Chance that an input decides: each choice takes some of its bytes; zeroes behind its end.

    So an engine that mutates bytes, or is guided by coverage, writes well-formed packets with
    right checksums, which it would never come upon.
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
        """Up to so many of the next bytes as they are."""
        part = self._data[self._at : self._at + most]
        self._at += most
        return part
