"""Imports the few modules of pyroute2 that aiotun needs.

``import pyroute2`` loads some 160 modules, which takes about 70 ms, because the package's own
``__init__`` imports all of them. A third of them is enough for rtnetlink. So this module puts a
package into `sys.modules` that runs its ``__init__`` only when somebody asks for a name that
``__init__`` defines. Programs that use pyroute2 themselves notice no difference.
"""

import importlib
import importlib.util
import sys
import threading
from typing import Any, NamedTuple

__all__ = ["Pyroute", "pyroute"]

_NAME = "pyroute2"

# Reentrant: what `__init__` imports may ask the package for names.
_lock = threading.RLock()


class Pyroute(NamedTuple):
    """The classes of pyroute2 that aiotun uses."""

    AsyncIPRoute: Any
    MarshalRtnl: Any
    NetlinkError: Any


def pyroute() -> Pyroute:
    """Return pyroute2's classes; the first call imports them, which takes some 30 ms.

    Only one thread at a time imports them. pyroute2 has circular imports. To avoid a deadlock,
    Python would give the second thread a module that is only half initialized.
    """
    with _lock:
        if _NAME not in sys.modules:
            _add_package()
        from pyroute2.iproute.linux import AsyncIPRoute
        from pyroute2.netlink.exceptions import NetlinkError
        from pyroute2.netlink.rtnl.marshal import MarshalRtnl

        return Pyroute(AsyncIPRoute, MarshalRtnl, NetlinkError)


def _add_package() -> None:
    """Put the package into `sys.modules`, without running its ``__init__`` yet."""
    spec = importlib.util.find_spec(_NAME)
    if spec is None or spec.loader is None:
        return  # the import that follows raises the error
    package, loader, ran = importlib.util.module_from_spec(spec), spec.loader, False

    def missing(name: str) -> Any:
        nonlocal ran
        # Many programs look for such names in every module, and would load all of pyroute2.
        if name.startswith("__") and name not in ("__all__", "__version__"):
            raise AttributeError(f"module {_NAME!r} has no attribute {name!r}")
        if importlib.util.find_spec(f"{_NAME}.{name}") is not None:
            return importlib.import_module(f"{_NAME}.{name}")
        with _lock:
            if not ran:
                ran = True
                try:
                    loader.exec_module(package)
                except BaseException:
                    ran = False
                    raise
        try:
            return vars(package)[name]
        except KeyError:
            raise AttributeError(f"module {_NAME!r} has no attribute {name!r}") from None

    vars(package)["__getattr__"] = missing  # PEP 562
    sys.modules[_NAME] = package
