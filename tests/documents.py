"""The pages of the documentation, cut into blocks that can be run.

The blocks of a page run in their order, in one folder, one network namespace, one Python namespace
and one shell.

- A python block may use `await` at the top level. If its first line is a comment with a file name
  (`# responder.py`), the block is not run but written to that file, for a later block to use.
- A console block has commands after `$ `, each with its output. In the output a line of `...`
  stands for any number of lines, and `...` within a line for any text; times and other decimal
  fractions may differ.
- ini and text blocks are not run. An ini block, too, becomes a file if its first line names one.

Two comments in a page's source, right before a block, control how it is run. Readers don't see
them:

    <!-- not run: the reason -->
    <!-- run first:
    Python code that the block needs and the reader does not
    -->
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from .helpers import PACKAGES, ROOT

__all__ = ["Block", "Command", "blocks_of", "matches", "pages", "programs"]

# Languages of blocks that are not run.
SILENT = ("text", "ini")

_FENCE = re.compile(r"( *)(`{3,}|:{3,})(.*)")
_NOT_RUN = re.compile(r"<!-- not run: (\S.*) -->")
_FILE = re.compile(r"# ([\w.-]+\.\w+)$")


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@dataclass
class Command:
    """One command of a shell session, and what it prints."""

    text: str
    output: list[str]


@dataclass
class Block:
    """A code block.

    Attributes:
        line: where in the page its first line is.
        language: ``"python"`` and so on; ``"indented"`` if it has no fence.
        text: its content.
        not_run: why it is not run, or None.
        before: hidden Python code that runs before the block.
    """

    line: int
    language: str
    text: str
    not_run: str | None = None
    before: str = ""

    @property
    def file(self) -> str | None:
        """The name of the file that this block becomes, or None."""
        found = _FILE.match(self.text.partition("\n")[0])
        return found[1] if found else None

    @property
    def code(self) -> str:
        """The part of this block that is run: Python code, or the commands without their output."""
        if self.language == "console":
            return self.before + "\n".join(command.text for command in self.commands)
        return self.before + self.text

    @property
    def commands(self) -> list[Command]:
        found: list[Command] = []
        for line in self.text.splitlines():
            if line.startswith("$ "):
                found.append(Command(line[2:], []))
            elif found and line.startswith("> "):
                found[-1].text += "\n" + line[2:]
            elif found and found[-1].text.endswith("\\"):
                found[-1].text += "\n" + line
            elif found:
                found[-1].output.append(line)
            else:
                raise ValueError(f"line {self.line}: a console block begins with '$ '")
        return found


def blocks_of(page: Path) -> list[Block]:
    """Return the code blocks of a page, in order."""
    lines = page.read_text().splitlines()
    found: list[Block] = []
    reason: str | None = None
    before = ""
    number = 0
    while number < len(lines):
        line = lines[number]
        number += 1
        if mark := _NOT_RUN.fullmatch(line.strip()):
            reason = mark[1]
        elif line.strip() == "<!-- run first:":
            end = lines.index("-->", number)
            before += "\n".join([*lines[number:end], ""])
            number = end + 1
        elif fence := _FENCE.match(line):
            indent, ticks, language = len(fence[1]), fence[2], fence[3].strip()
            end = next(n for n in range(number, len(lines)) if lines[n].strip() == ticks)
            text = "\n".join([*(each[indent:] for each in lines[number:end]), ""])
            found.append(Block(number + 1, language, text, reason, before))
            reason, before, number = None, "", end + 1
        elif line.startswith("    ") and not lines[number - 2].strip():
            end = number
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            text = "\n".join([*(each[4:] for each in lines[number - 1 : end]), ""])
            found.append(Block(number, "indented", text, reason, before))
            reason, before, number = None, "", end
        elif line.strip() and (reason or before):
            raise ValueError(f"{page}:{number}: a comment about running, and no block follows")
    return found


# The name of a program at the beginning of a command, or of a string in Python code. Not a
# variable.
_PROGRAM = re.compile(
    r"""(?:^|[|;&("']|\b(?:sudo|exec)\s)\s*"""
    rf"({'|'.join(map(re.escape, PACKAGES))})(?![\w.-]|\s*[=(])",
    re.MULTILINE,
)


def programs(code: str) -> list[str]:
    """Return the programs of `helpers.PACKAGES` that this code runs; it is Python or shell code."""
    return sorted(set(_PROGRAM.findall(code)))


# Numbers that differ from run to run: 0.222 and 0.1/0.2/0.3, but not 10.0.0.1 or 1.2.3; times of
# day; whole milliseconds; the identifier that ping chooses.
_VARYING = re.compile(
    r"\d\d:\d\d:\d\d\.\d+|(?<![\d.])\d+\.\d+(?![\d.]*\d)|\b\d+(?= ?ms\b)|(?<=\bid )\d+"
)


def matches(expected: list[str], printed: list[str]) -> bool:
    """Whether a program printed the output that a page shows."""
    wanted = [_VARYING.sub("0.0", line.rstrip()) for line in expected]
    got = "".join(_VARYING.sub("0.0", line.rstrip()) + "\n" for line in printed)
    pattern = ""
    for line in wanted:
        if line == "...":
            pattern += r"(?:.*\n)*?"
        else:
            pattern += ".*?".join(re.escape(part) for part in line.split("...")) + r"\n"
    return re.fullmatch(pattern, got) is not None
