"""Runs a module of ours in another Python interpreter that never imports aiotun.

The module's functions are sent there as compiled code (marshal), through a socket. The other
interpreter reads none of our files, so this works from a zip archive, after a chroot, and while the
package is being upgraded. It starts without site-packages, and ignores Python's environment
variables.
"""

from __future__ import annotations

import marshal
import os
import sys
from types import CodeType, FunctionType, ModuleType

__all__ = ["arguments", "available", "packed"]

# Give the functions one dictionary as their globals, with the modules and constants that they use.
_BOOT = """
import marshal, sys
stream = open(int(sys.argv[1]), "rb")
try:
    modules, names = marshal.load(stream)
except EOFError:  # the program has ended
    sys.exit(1)
space = {name: __import__(name) for name in modules}
for name, value in names.items():
    space[name] = type(lambda: 0)(value, space) if hasattr(value, "co_code") else value
space["main"](stream)
"""


def available() -> bool:
    """Whether this program can start another Python interpreter.

    ``sys.executable`` of a frozen program is the program itself, and of an embedded Python it may
    be the program around it. Starting that again, with arguments of ours, could do anything.
    """
    name = os.path.basename(sys.executable or "")
    frozen = getattr(sys, "frozen", False) or "__compiled__" in vars(sys.modules["__main__"])
    return not frozen and name.startswith(("python", "pypy"))


def arguments(fd: int, title: str) -> list[str]:
    """Return the command that runs a module that is sent through a socket.

    Args:
        fd: an inherited socket. Send the module through it first, as `packed` returns it. All that
            follows goes to the module's ``main``, as a binary file.
        title: the name that ps(1) shows.
    """
    return [sys.executable, "-ISE", "-c", _BOOT, str(fd), title]


def packed(module: ModuleType) -> bytes:
    """Return a module as bytes: its functions, its constants, and the names of what it imports.

    The functions must have no default arguments. They may use each other, the module's constants
    (numbers, text, tuples) and imported modules, but no names imported from modules.
    """
    modules: list[str] = []
    names: dict[str, CodeType | int | str | bytes | tuple[object, ...]] = {}
    for name, value in vars(module).items():
        if not name.isidentifier():  # pytest adds such names when it rewrites the module
            continue
        if isinstance(value, ModuleType):
            modules.append(value.__name__)
        elif isinstance(value, FunctionType):
            names[name] = value.__code__
        elif not name.startswith("__") and isinstance(value, int | str | bytes | tuple):
            names[name] = value
    return marshal.dumps((modules, names))
