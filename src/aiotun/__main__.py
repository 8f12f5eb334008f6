"""The `aiotun` command, and ``python -m aiotun``."""

import sys

__all__ = ["main"]


def main() -> int:
    """Run the command and give its exit status; see `cli.main`."""
    try:
        # Here, so that Ctrl-C ends it without a traceback while it is being loaded, too.
        from . import cli
    except KeyboardInterrupt:
        return 130
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
