"""The `aiotun` command, and ``python -m aiotun``."""

import gc
import sys

__all__ = ["main"]


def main() -> int:
    """Run the command and return its exit status; see `cli.main`."""
    if sys.argv[1:2] == ["run"]:
        # What is imported is no garbage, and looking for some takes a tenth of the time of the
        # imports. `run` switches this on again once its command runs.
        gc.disable()
    try:
        # Imported here, so that Ctrl-C during the import ends the command without a traceback.
        from . import cli

        if sys.argv[1:2] == ["run"]:
            from ._cli import pyroute2_part

            pyroute2_part.load()
    except KeyboardInterrupt:
        return 130
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
