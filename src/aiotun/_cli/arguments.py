"""The words of ``aiotun add`` and its like: without dashes and in any order, as ip(8) has them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

__all__ = ["Said", "UsageError", "number_or_name", "on_or_off", "read"]

# What must follow a word, for an error's text; of other words it is "a value".
_NEEDS = {
    "dev": "a name",
    "name": "a name",
    "mode": "'tun' or 'tap'",
    "user": "a user",
    "group": "a group",
    "ipv6_autoconf": "'on' or 'off'",
    "netns": "a name or path",
}
# Not even the first of these is a device's name where a command doesn't know it.
_FLAGS = ("multi_queue", "pi", "vnet_hdr", "one_queue")
_SAME = {"name": "dev", "addr": "address", "master": "bridge"}


class UsageError(Exception):
    """The words make no sense; the text is the one line that the user sees."""


@dataclasses.dataclass(slots=True)
class Said:
    """What the words say."""

    values: dict[str, str] = dataclasses.field(default_factory=dict)
    """The values of words that have one; the device's name is that of ``"dev"``."""
    flags: set[str] = dataclasses.field(default_factory=set)
    """The words that have none."""
    lists: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """The values of words that may be repeated."""


def read(
    command: str,
    words: Sequence[str],
    valued: Collection[str],
    flags: Collection[str] = (),
    lists: Mapping[str, Mapping[str, bool]] | None = None,
) -> Said:
    """Read the words of a command, in any order, as ip(8) does, but without its abbreviations.

    Args:
        command: the command, for an error's text.
        words: what was typed.
        valued: the words that have a value. A word that nobody knows is the device's name.
        flags: the words that have none.
        lists: the words that may be repeated, and the words that may follow the value of each:
            whether they have a value of their own.

    Raises:
        UsageError: a word is unknown, is repeated, or lacks its value.
    """
    said = Said()
    lists = lists or {}
    rest = list(words)

    def value(word: str) -> str:
        if not rest:
            raise UsageError(f"{word!r} needs {_NEEDS.get(word, 'a value')} after it")
        return rest.pop(0)

    while rest:
        word = rest.pop(0)
        key = _SAME.get(word, word)
        if word in flags:
            said.flags.add(word)
            continue
        if word in lists:
            text = value(word)
            while rest and rest[0] in lists[word]:
                more = rest.pop(0)
                text += f" {more} {value(more)}" if lists[word][more] else f" {more}"
            said.lists.setdefault(key, []).append(text)
            continue
        if word in valued:
            text = value(word)
        elif "dev" not in said.values and word not in _NEEDS and word not in _FLAGS:
            key, text = "dev", word
        else:
            raise UsageError(f"{word!r} is no word of 'aiotun {command}'; see its --help")
        if key in said.values and key == "dev":
            raise UsageError(f"two names are given, {said.values[key]!r} and {text!r}; see --help")
        if key in said.values:
            raise UsageError(f"{key!r} is said twice: {said.values[key]!r} and {text!r}")
        said.values[key] = text
    return said


def number_or_name(word: str) -> int | str:
    """Give a number as one: as with ip(8), no user is looked up by a name of digits."""
    return int(word) if word.isascii() and word.isdigit() else word


def on_or_off(what: str, word: str | None) -> bool | None:
    """Read 'on' or 'off'; None where nothing was said.

    Raises:
        UsageError: it is another word.
    """
    if word not in ("on", "off", None):
        raise UsageError(f"{what} is 'on' or 'off', not {word!r}")
    return None if word is None else word == "on"
