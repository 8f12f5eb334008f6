"""The programs that are compared."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ._building import Installed
from ._harness import has_uvloop


@dataclass(frozen=True)
class Contender:
    """One program that does the work. `peer` is the library or program that it needs."""

    name: str
    peer: str
    command: tuple[str, ...]
    napi_threads: bool = False
    """Whether the kernel receives from its devices in threads, which other figures leave out."""


def named(*contenders: Contender) -> dict[str, Contender]:
    return {each.name: each for each in contenders}


def present(
    contenders: Mapping[str, Contender], names: Iterable[str], installed: Mapping[str, Installed]
) -> list[Contender]:
    """Return those of these contenders whose peer is installed, and uvloop if they need it."""
    return [
        each
        for each in map(contenders.__getitem__, names)
        if each.peer in installed
        and not installed[each.peer].missing
        and (has_uvloop() or "uvloop" not in each.name)
    ]
