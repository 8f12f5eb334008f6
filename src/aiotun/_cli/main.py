"""The `aiotun` command. Only this module prints; the others give it the lines."""

import argparse
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import aiotun

from . import arguments, run_arguments, terminal, texts

__all__ = ["main", "make_parser"]


# Flushes each line, because the reader of a pipe may be waiting for it. The text must be
# `printable` already; it may have colors.
def _say_painted(text: str, end: str = "\n") -> None:
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"the output can't be written: {error.strerror}") from error


class OutputError(aiotun.AiotunError):
    """Stdout takes no more, for example because the disk is full."""


def _say(text: str, end: str = "\n") -> None:
    _say_painted(terminal.printable(text), end=end)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0, 1 (failed), 2 (usage) or 130 (interrupted)."""
    parser = make_parser()
    # The words of `add`, `del` and `list` are arguments that argparse does not know. If we declared
    # them as positional arguments, argparse would refuse those that follow an option.
    given = sys.argv[1:] if argv is None else list(argv)
    args, words = parser.parse_known_args(given)
    if words and (not hasattr(args, "words") or any(each.startswith("-") for each in words)):
        # The help of the command lists its options, unless the option stands before the command.
        refuse = parser.error if words[0] == given[0] else args.error
        refuse(f"unrecognized arguments: {' '.join(words)}")
    if not hasattr(args, "run"):
        parser.error("the following arguments are required: COMMAND")
    args.words = words
    status: int | None = None
    try:
        status = args.run(args)
    except arguments.UsageError as error:
        _note(str(error))
        return 2
    except OutputError as error:
        _discard_output()
        _note(str(error))
        return 1
    except aiotun.AiotunError as error:
        _note(getattr(error, "strerror", None) or str(error))
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _discard_output()
        return 1
    return status or 0


def _discard_output() -> None:
    """Let what is left go nowhere, or Python would report the same error again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Parser(argparse.ArgumentParser):
    """Reports a usage error in one line, as the rest of the command does."""

    def error(self, message: str) -> NoReturn:
        # The choices of 'aiotun help' are the commands, which the help of all of them explains.
        program = self.prog.removesuffix(" help")
        self.exit(2, f"aiotun: {terminal.printable(message)}; see '{program} --help'\n")


class _Version(argparse.Action):
    """Looks the version up when it is asked for, because that takes 15 ms."""

    def __call__(self, parser: argparse.ArgumentParser, *args: object, **kwargs: object) -> None:
        _say(f"aiotun {_version()}")
        parser.exit()


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; `tools/manual.py` writes the man page from it."""
    parser: argparse.ArgumentParser = _Parser(
        prog="aiotun", description="Create, inspect and try out Linux TUN and TAP devices."
    )
    parser.add_argument(
        "--version", action=_Version, nargs=0, help="show program's version number and exit"
    )
    # Not required=True: argparse would ask for a command before it names an unknown option.
    commands = parser.add_subparsers(metavar="COMMAND")

    said = "send pings to a TUN device, and answer them in Python"
    command = commands.add_parser("demo", help=said, description=texts.DEMO)
    said = "send N pings to each address (default: 5)"
    command.add_argument("--count", type=_positive, default=5, metavar="N", help=said)
    said = "run on uvloop instead of asyncio's event loop"
    command.add_argument("--uvloop", action="store_true", help=said)
    command.set_defaults(run=_run_demo)

    usage = "aiotun list [-j] [[dev] NAME] [netns NAME]"
    said = "list TUN and TAP devices, as 'ip tuntap show' does"
    command = _with_words(commands, "list", usage, said, texts.LISTED, aliases=["show"])
    said = "print everything the kernel reports, as a JSON list"
    command.add_argument("-j", "--json", action="store_true", help=said)
    command.set_defaults(run=_run_list)

    usage = (
        "aiotun add [[dev] NAME] mode {tun | tap} [user USER] [group GROUP]\n"
        "                  [multi_queue] [pi] [vnet_hdr] [ipv6_autoconf {on | off}]\n"
        "                  [netns NAME]"
    )
    said = "add a persistent device, as 'ip tuntap add' does"
    command = _with_words(commands, "add", usage, said, texts.ADDED)
    command.set_defaults(run=_run_add)

    usage = "aiotun del [dev] NAME [mode {tun | tap}] [netns NAME]"
    said = "delete a device, as 'ip tuntap del' does"
    command = _with_words(commands, "del", usage, said, texts.DELETED, aliases=["delete"])
    command.set_defaults(run=_run_del)

    usage = "aiotun networkd [--write DIR] [dev] NAME [mode {tun | tap}] [WORDS...]"
    said = "print files that make systemd-networkd create a device at boot"
    command = _with_words(commands, "networkd", usage, said, texts.UNITS)
    said = "write the files into this folder, replace existing ones, print the paths"
    command.add_argument("--write", type=Path, metavar="DIR", help=said)
    command.set_defaults(run=_run_networkd)

    _add_dump(commands)
    run_arguments.add_run(commands, _run_run)

    said = "check what works on this machine, and say how to fix what doesn't"
    command = commands.add_parser("doctor", help=said, description=texts.DOCTOR)
    command.add_argument("--json", action="store_true", help="print the report as a JSON object")
    command.set_defaults(run=_run_doctor)

    said = "show this text, or the help of a command"
    command = commands.add_parser("help", help=said, description=f"{said[0].upper()}{said[1:]}.")
    command.add_argument("command", nargs="?", metavar="COMMAND", choices=[*commands.choices])
    command.set_defaults(run=lambda args: _run_help(parser, commands.choices, args.command))
    for each in commands.choices.values():
        each.set_defaults(error=each.error)
    return parser


def _add_dump(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    said = "show the packets of an interface, one line each"
    command = commands.add_parser(
        "dump",
        usage="aiotun dump {IFACE | --new NAME [--tap] [--address A/LEN]}\n"
        "                   [--write FILE] [--count N] [--json]",
        help=said,
        description=_wrapped(texts.DUMP),
        epilog=texts.DUMPED,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("interface", nargs="?", metavar="IFACE", help="listen on this interface")
    said = "open a device of this name instead; create it if there is none"
    command.add_argument("--new", metavar="NAME", help=said)
    command.add_argument(
        "--tap", action="store_true", help="open a TAP device instead of a TUN device"
    )
    said = "an address for the new device; may be repeated"
    command.add_argument("--address", action="append", default=[], metavar="A/LEN", help=said)
    said = "also write the packets to a pcap file, or a pcapng file if FILE ends in .pcapng; '-' "
    said += "is stdout, and then no lines are printed"
    command.add_argument("--write", metavar="FILE", help=said)
    said = "stop after N packets"
    command.add_argument("--count", type=_positive, metavar="N", help=said)
    said = "print each packet as a JSON object"
    command.add_argument("--json", action="store_true", help=said)
    command.set_defaults(run=_run_dump)


def _with_words(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    usage: str,
    said: str,
    epilog: str,
    aliases: Sequence[str] = (),
) -> argparse.ArgumentParser:
    """Declare a command that takes words without dashes, as ip(8) does."""
    command = commands.add_parser(
        name,
        aliases=aliases,
        usage=usage,
        help=said,
        description=f"{said[0].upper()}{said[1:]}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(words=[])
    return command


def _wrapped(text: str) -> str:
    """Wrap paragraphs, which argparse's raw formatter leaves as they are."""
    return "\n\n".join(textwrap.fill(each, 78) for each in text.strip().split("\n\n"))


def _version() -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version("aiotun")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return "(not installed)"


def _positive(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError("must be a whole number above 0")
    return int(text)


def _run_help(
    parser: argparse.ArgumentParser,
    commands: "dict[str, argparse.ArgumentParser]",
    command: str | None,
) -> None:
    _say((commands[command] if command else parser).format_help(), end="")


# Each command imports its own module, so that it starts without waiting for those of others.


def _run_list(args: argparse.Namespace) -> None:
    from . import tuntap

    _say_all(tuntap.show(args.words, as_json=args.json))


def _run_add(args: argparse.Namespace) -> None:
    from . import tuntap

    _say_all(tuntap.add(args.words))


def _run_del(args: argparse.Namespace) -> None:
    from . import tuntap

    _say_all(tuntap.delete(args.words))


def _say_all(lines: Sequence[str]) -> None:
    for line in lines:
        _say(line)


def _run_networkd(args: argparse.Namespace) -> None:
    from . import networkd

    texts = networkd.units(args.words)
    if args.write is None:
        _say("\n".join(texts.values()), end="")
    else:
        _say_all(networkd.write(texts, args.write))


def _run_demo(args: argparse.Namespace) -> None:
    from . import demo

    demo.demo(args.count, uvloop=args.uvloop, say=_say)


def _run_dump(args: argparse.Namespace) -> None:
    from . import dump

    dump.dump(
        dump.Options(
            interface=args.interface,
            new=args.new,
            tap=args.tap,
            addresses=args.address,
            write=args.write,
            count=args.count,
            as_json=args.json,
            colour=terminal.wanted(sys.stdout) and not args.json,
            say=_say_painted,
            note=_note,
            stdout=None if sys.stdout.isatty() else sys.stdout.buffer,
        )
    )


def _run_run(args: argparse.Namespace) -> int:
    from . import run

    return run.run(run_arguments.options(args, _note))


def _note(line: str) -> None:
    print(f"aiotun: {terminal.printable(line)}", file=sys.stderr, flush=True)


def _run_doctor(args: argparse.Namespace) -> int:
    from . import doctor

    report = doctor.examine()
    if args.json:
        _say(doctor.as_json(report))
    else:
        for line in doctor.as_lines(report, colour=terminal.wanted(sys.stdout)):
            _say_painted(line)
    return 0 if report.usable else 1
