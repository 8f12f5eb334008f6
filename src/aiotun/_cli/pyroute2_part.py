"""Loads the part of pyroute2 that opening devices takes, a third of the time of all of it.

``import pyroute2`` loads some 160 modules, because the package's own ``__init__`` imports them.
This puts a package without that into `sys.modules`. So it is for a process in which nobody else
uses pyroute2: the command's, never that of a program that uses the library.
"""

import importlib.util
import sys

__all__ = ["load"]

_NAME = "pyroute2"


def load() -> None:
    """Put a package into `sys.modules` that has only what `_link.session` uses.

    Does nothing if pyroute2 is not installed, or lacks these modules: then the import later raises
    the error.
    """
    spec = importlib.util.find_spec(_NAME)
    if spec is None or _NAME in sys.modules:
        return
    package = sys.modules[_NAME] = importlib.util.module_from_spec(spec)
    try:
        from pyroute2.iproute import AsyncIPRoute
        from pyroute2.netlink.exceptions import NetlinkError
    except ImportError:
        del sys.modules[_NAME]
    else:
        vars(package).update(AsyncIPRoute=AsyncIPRoute, NetlinkError=NetlinkError)
