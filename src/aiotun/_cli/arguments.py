"""Parses the words of ``aiotun add`` and similar: without dashes, in any order, as in ip(8)."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence

__all__ = ["Said", "UsageError", "as_root", "number_or_name", "on_or_off", "read"]

# Where sudo looks for a command by its name: the `secure_path` of Debian and Fedora.
_SUDO_PATH = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")

# What must follow each word, for the error text. Words that are not listed need "a value".
_NEEDS = {
    "dev": "a name",
    "name": "a name",
    "mode": "'tun' or 'tap'",
    "user": "a user",
    "group": "a group",
    "ipv6_autoconf": "'on' or 'off'",
    "netns": "a name or path",
}
# A command that does not accept these words must not take them for the device's name.
_FLAGS = ("multi_queue", "pi", "vnet_hdr", "one_queue")
_SAME = {"name": "dev", "addr": "address", "master": "bridge"}


class UsageError(Exception):
    """The command line is wrong. The text is the one line that the user sees."""


@dataclasses.dataclass(slots=True)
class Said:
    """The parsed words."""

    values: dict[str, str] = dataclasses.field(default_factory=dict)
    """The values of words that take one. The device's name is the value of ``"dev"``."""
    flags: set[str] = dataclasses.field(default_factory=set)
    """The words that take no value."""
    lists: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """The values of words that may be repeated."""


def read(
    command: str,
    words: Sequence[str],
    valued: Collection[str],
    flags: Collection[str] = (),
    lists: Mapping[str, Mapping[str, bool]] | None = None,
) -> Said:
    """Parse the words of a command, in any order, as ip(8) does, but without its abbreviations.

    Args:
        command: the command's name, for error texts.
        words: the words on the command line.
        valued: the words that take a value. The first unknown word is the device's name.
        flags: the words that take no value.
        lists: the words that may be repeated. Each has a mapping of the words that may follow its
            value: whether they take a value themselves.

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
            raise UsageError(
                f"unknown argument {word!r} for 'aiotun {command}'; see 'aiotun {command} --help'"
            )
        if key in said.values and key == "dev":
            raise UsageError(f"expected one device name, got {said.values[key]!r} and {text!r}")
        if key in said.values:
            raise UsageError(f"{key!r} is given twice: {said.values[key]!r} and {text!r}")
        said.values[key] = text
    return said


def as_root(words: str) -> str:
    """Return the command line with which this user runs `aiotun` with these words as root.

    sudo does not find a command that is in a virtual environment, so this has the whole path then.
    """
    import shutil  # which takes 3 ms, and only errors need it

    started = shutil.which(sys.argv[0]) if os.path.basename(sys.argv[0]) == "aiotun" else None
    if started is None:
        command = f"{shlex.quote(sys.executable)} -m aiotun"
    elif os.path.dirname(os.path.abspath(started)) in _SUDO_PATH:
        command = "aiotun"
    else:
        command = shlex.quote(os.path.abspath(started))
    sudo = "" if os.geteuid() == 0 else "sudo "
    return f"{sudo}{command} {words}"


def number_or_name(word: str) -> int | str:
    """Return digits as a number. Like ip(8), we never look up a user whose name is all digits."""
    return int(word) if word.isascii() and word.isdigit() else word


def on_or_off(what: str, word: str | None) -> bool | None:
    """Parse 'on' or 'off'. Returns None if there is no word.

    Raises:
        UsageError: it is another word.
    """
    if word not in ("on", "off", None):
        raise UsageError(f"{what!r} must be 'on' or 'off', got {word!r}")
    return None if word is None else word == "on"
