"""A door to the `aiotun` command, whose parts are in `_cli/`."""

from ._cli.main import main

__all__ = ["main"]
