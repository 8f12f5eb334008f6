"""The `aiotun` command. This module alone prints; the others give it what there is to print."""

import argparse
import functools
import importlib.metadata
import os
import sys
from collections.abc import Sequence

import aiotun

from . import _demo

__all__ = ["main"]

# At once, also into a pipe: whoever reads it may be waiting for each line.
_say = functools.partial(print, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and give its exit status: 0, 1 (failed), 2 (usage) or 130 (interrupted)."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except aiotun.AiotunError as error:
        print(f"aiotun: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read the output has gone. Python would complain once more when it flushes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="aiotun", description=aiotun.__doc__)
    parser.add_argument("--version", action="version", version=f"aiotun {_version()}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    said = "ping a device that this program answers on"
    command = commands.add_parser("demo", help=said, description=_demo.__doc__)
    said = "pings to each address (default: 5)"
    command.add_argument("--count", type=_positive, default=5, metavar="N", help=said)
    command.add_argument("--uvloop", action="store_true", help="run on uvloop instead of asyncio's")
    command.set_defaults(run=_run_demo)

    return parser


def _version() -> str:
    try:
        return importlib.metadata.version("aiotun")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return "(not installed)"


def _positive(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError("must be a whole number above 0")
    return int(text)


def _run_demo(args: argparse.Namespace) -> None:
    _demo.demo(args.count, uvloop=args.uvloop, say=_say)
