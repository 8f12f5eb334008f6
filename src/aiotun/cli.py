"""The entry point of the `aiotun` command. Its parts are in `_cli/`."""

from ._cli.main import main

__all__ = ["main"]
