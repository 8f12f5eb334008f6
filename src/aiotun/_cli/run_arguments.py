"""The arguments of ``aiotun run``."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import textwrap
from collections.abc import Callable, Sequence

from .arguments import UsageError

__all__ = ["Options", "add_run", "options"]

_DESCRIPTION = """\
Runs a command whose whole network is carried by aiotun. It needs no root.

The command runs in a private network namespace, as the same user. Its connections, datagrams and
pings are carried to this machine's network one by one. Names are asked of this machine's name
servers. The machine itself can't be reached, neither its 127.0.0.1 nor its other addresses.
"""
_EPILOG = """\
The command's standard streams, its terminal and its exit status are its own.
When it ends, so does the network of what it has left running. An address
family that this machine can't route is not there for the command either.

HOST is an address, a network (10.0.0.0/8) or a name, which stands for the
addresses that it has when this starts. Denied connections fail with 'no route
to host' (IPv4) or 'permission denied' (IPv6). With --allow everything else is
denied.

examples:

  aiotun run -- curl https://example.org
  aiotun run --log --deny 10.0.0.0/8 --write browser.pcapng -- firefox
  aiotun run --drop 5 --delay 50 --rate 2mbit -- ping -c 3 192.0.2.1
"""


@dataclasses.dataclass(frozen=True)
class Options:
    """The options on the command line, and the command's output."""

    command: Sequence[str]
    log: bool
    drop: float  # percent
    delay: float  # milliseconds
    rate: float  # bits a second; 0 for no limit
    seed: int
    deny: Sequence[str]
    allow: Sequence[str]
    host_loopback: str | None
    write: str | None
    note: Callable[[str], None]  # prints messages to stderr

    @property
    def has_faults(self) -> bool:
        return bool(self.drop or self.delay or self.rate)


def add_run(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    run: Callable[[argparse.Namespace], int],
) -> None:
    """Declare the command; `run` is called with its arguments."""
    command = commands.add_parser(
        "run",
        usage="aiotun run [OPTIONS] [--] COMMAND [ARGUMENT ...]",
        help="run a command whose whole network is carried by aiotun",
        description="\n\n".join(textwrap.fill(each, 78) for each in _DESCRIPTION.split("\n\n")),
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = command.add_argument
    option("--log", action="store_true", help="print a line for each connection to stderr")
    option(
        "--deny",
        action="append",
        default=[],
        metavar="HOST[:PORT]",
        help="never reach this; may be repeated",
    )
    option(
        "--allow",
        action="append",
        default=[],
        metavar="HOST[:PORT]",
        help="reach only this; may be repeated",
    )
    said = "let the command reach this machine's 127.0.0.1 (or ::1) as ADDR"
    option("--host-loopback", metavar="ADDR", help=said)
    said = "lose P %% of the packets in each direction"
    option("--drop", type=_percent, default=0.0, metavar="P", help=said)
    said = "delay packets by MS milliseconds in each direction"
    option("--delay", type=_milliseconds, default=0.0, metavar="MS", help=said)
    said = "carry at most BIT bits a second in each direction (500kbit, 10mbit, 1gbit)"
    option("--rate", type=_rate, default=0.0, metavar="BIT", help=said)
    said = "choose which packets are lost (default: 0); the same number loses the same ones"
    option("--seed", type=_whole, default=0, metavar="N", help=said)
    said = "also write the packets to a pcap file, or a pcapng file if FILE ends in .pcapng"
    option("--write", metavar="FILE", help=said)
    option("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    command.set_defaults(run=run)


def options(args: argparse.Namespace, note: Callable[[str], None]) -> Options:
    """Give the options; `note` prints messages.

    Raises:
        UsageError: there is no command.
    """
    values = {each.name: getattr(args, each.name, note) for each in dataclasses.fields(Options)}
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        raise UsageError("give a command to run; see 'aiotun run --help'")
    return Options(**{**values, "command": command})


def _not_negative(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError("must be a number, 0 or more")
    return number


def _milliseconds(text: str) -> float:
    try:
        return _not_negative(text)
    except argparse.ArgumentTypeError:
        text = "must be milliseconds without a unit, such as 50"
        raise argparse.ArgumentTypeError(text) from None


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError("must be a whole number") from None


def _percent(text: str) -> float:
    if (number := _not_negative(text.removesuffix("%"))) > 100:
        raise argparse.ArgumentTypeError("must be a percentage, at most 100")
    return number


def _rate(text: str) -> float:
    """Bits a second, in the words of tc(8)."""
    found = re.fullmatch(r"([0-9.]+)([kmg]?)(bit)?", text.lower())
    if not found or not (rate := _not_negative(found[1])):
        raise argparse.ArgumentTypeError("must be bits a second, such as 500kbit or 10mbit")
    return rate * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[found[2]]
