"""What the C module does where there is one, and Python where there is none.

The environment variable AIOTUN_SPEEDUPS chooses: ``require`` makes a missing C module an error
rather than a slower program, ``forbid`` leaves it alone. Each function here has the same signature
and behaviour either way.
"""

import os
from collections.abc import Callable

__all__ = ["SPEEDUPS", "read", "read_many"]

_choice = os.environ.get("AIOTUN_SPEEDUPS", "")
if _choice not in ("", "require", "forbid"):
    raise ImportError(f"AIOTUN_SPEEDUPS is {_choice!r}; it may be 'require' or 'forbid', or unset")


def _read_many(fd: int, size: int, limit: int) -> list[bytes]:
    """Read packets from a non-blocking fd until none waits, or there are `limit`.

    Raises:
        OSError: the first read failed. A later failure ends the batch, and the next call meets it.
    """
    read = os.read
    batch = [read(fd, size)] if limit > 0 else []
    append = batch.append
    try:
        for _ in range(limit - 1):
            append(read(fd, size))
    except OSError:
        pass
    return batch


read: Callable[[int, int], bytes] = os.read
"""Read one packet from a non-blocking fd: ``read(fd, size)``, as `os.read`."""

read_many: Callable[[int, int, int], list[bytes]] = _read_many

SPEEDUPS = False
"""Whether the C module is in use."""

if _choice != "forbid":
    try:
        from . import _speedups
    except ImportError as error:
        if _choice == "require":
            raise ImportError(
                "AIOTUN_SPEEDUPS=require, and aiotun was installed without its C module: install "
                "it again with AIOTUN_SPEEDUPS=require, a C compiler and Python's headers, or "
                f"unset the variable ({error})"
            ) from error
    else:
        read, read_many = _speedups.read, _speedups.read_many
        SPEEDUPS = True
