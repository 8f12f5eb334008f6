"""Prints aiotun(8), the manual page, with the texts that `aiotun help` shows; see `make man`."""

import argparse
import os
import re
from collections.abc import Iterator

os.environ.update(COLUMNS="80", NO_COLOR="1")  # argparse reads them

from aiotun._cli.main import make_parser

_HEAD = """\
.\\" Made by tools/manual.py from the texts of the command's --help.
.TH AIOTUN 8 "" aiotun "System Administration"
.SH NAME
aiotun \\- {}
.SH SYNOPSIS
.B aiotun
.I COMMAND
[\\fIOPTIONS\\fR] [\\fIWORDS\\fR]
.SH COMMANDS"""
_TAIL = """\
.SH EXIT STATUS
.TP
0
It worked.
.TP
1
It failed, and stderr has one line that says why and what to do.
.TP
2
The command line is wrong.
.TP
130
It was interrupted (SIGINT).
.SH ENVIRONMENT
.TP
.B NO_COLOR
If it is set, there are no colors.
.SH SEE ALSO
.BR ip\\-tuntap (8),
.BR network_namespaces (7)"""


def _escaped(text: str) -> str:
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq")
    return re.sub(r"^\.", r"\\&.", text, flags=re.MULTILINE)


def _as_it_is(text: str) -> str:
    return f".nf\n{_escaped(text.rstrip())}\n.fi"


def _command(name: str, said: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    yield f".SS {_escaped(name)}"
    yield _as_it_is(parser.format_usage().removeprefix("usage: ").replace("\n       ", "\n"))
    for paragraph in (parser.description or said).strip().split("\n\n"):
        yield f".PP\n{_escaped(paragraph)}"
    for action in parser._actions:
        if not action.help or "-h" in action.option_strings:
            continue
        value = "" if action.nargs == 0 else f" {action.metavar or ''}".rstrip()
        names = ", ".join(f"{each}{value}" for each in action.option_strings) or value.strip()
        yield f".TP\n.B {_escaped(names)}\n{_escaped(action.help.replace('%%', '%'))}"
    if parser.epilog:
        yield f".PP\n{_as_it_is(parser.epilog)}"


def page() -> str:
    """Return the page's source, for man(1)."""
    parser = make_parser()
    (commands,) = (each for each in parser._actions if hasattr(each, "_choices_actions"))
    said = (parser.description or "").rstrip(".")
    lines = [_HEAD.format(_escaped(said[0].lower() + said[1:]))]
    for choice in commands._choices_actions:
        name = choice.dest.partition(" ")[0]
        assert commands.choices is not None
        lines += _command(f"aiotun {name}", choice.help or "", dict(commands.choices)[name])
    return "\n".join([*lines, _TAIL, ""])


if __name__ == "__main__":
    print(page(), end="")
