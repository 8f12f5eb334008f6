"""The public surface, and who may import what (the table of rooms in the design)."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import aiotun

PACKAGE = Path(aiotun.__file__).parent
MODULES = {path.stem: path for path in PACKAGE.glob("*.py")}

# Which of our own modules a module may import. A new module is added here first: what it may know
# of the others is part of its design.
ALLOWED: dict[str, set[str]] = {
    "__init__": set(MODULES)
    - {
        "__main__",
        "_commands",
        "_demo",
        "_describe",
        "_doctor",
        "_dump",
        "_faults",
        "_isolating",
        "_listen",
        "_memory",
        "_private",
        "_probe",
        "_terminal",
        "_units",
        "cli",
        "pytest_plugin",
        "testing",
    },
    "__main__": {"cli"},
    "_abi": set(),
    "_adopting": {
        "_abi",
        "_interface",
        "_ioctl",
        "_judging",
        "_opening",
        "_packetio",
        "_threads",
        "errors",
    },
    "_autoconf": {"_linkinfo", "_rtnetlink"},
    "_bridges": {
        "_linkinfo",
        "_linktypes",
        "_netlink",
        "_options",
        "_rtnetlink",
        "_threads",
        "errors",
    },
    "_commands": {"_arguments"},
    "_demo": {"_isolating", "aiotun"},
    "_describe": set(),
    "_doctor": {"_isolating", "_probe", "_terminal"},
    "_dump": {"_arguments", "_describe", "_listen", "_terminal"},
    "_encode": {"_native"},
    "_faults": {"_packetio", "_port", "_refusals", "device", "errors", "link"},
    "_flow": set(),
    "_gso": {"_abi"},
    "_interface": {"_ioctl", "_threads", "errors"},
    "_ioctl": {"_abi", "_limits", "errors"},
    "_ipheader": set(),
    "_isolating": {"_threads", "errors"},
    "_linkdecode": {"_abi", "_autoconf", "_linkinfo", "_linkstate", "_linktypes"},
    "_linkevents": {"_interface", "_linkinfo", "_linkwatch", "_linkwatcher", "_threads"},
    "_linkinfo": {"_linktypes"},
    "_linkstate": {"_linkinfo", "_linktypes"},
    "_linktypes": {"_abi"},
    "_linkwatch": {
        "_limits",
        "_linkstate",
        "_linkwatcher",
        "_netlink",
        "_rtnetlink",
        "_rtnlmonitor",
        "_threads",
        "errors",
    },
    "_linkwatcher": {"_interface", "_linkinfo", "_linkstate"},
    "_listen": {"aiotun"},
    "_memory": {
        "_interface",
        "_packetio",
        "_port",
        "_threads",
        "_waiting",
        "device",
        "errors",
        "link",
        "queue",
    },
    "_native": {"_abi", "_gso", "_speedups"},
    "_opening": {
        "_abi",
        "_autoconf",
        "_interface",
        "_ioctl",
        "_linkinfo",
        "_linktypes",
        "_netlink",
        "_options",
        "_rtnetlink",
        "_threads",
        "errors",
    },
    "_options": {"_abi", "_linktypes", "_packetio", "_threads"},
    "_packetio": {"_abi", "decode", "errors"},
    "_pcapformat": set(),
    "_pcapthread": {"_threads"},
    "_persistent": {
        "_abi",
        "_autoconf",
        "_ioctl",
        "_linkinfo",
        "_linktypes",
        "_netlink",
        "_options",
        "_packetio",
        "_rtnetlink",
        "_threads",
        "errors",
    },
    "_recording": {"_abi", "_port", "capture"},
    "_private": {"aiotun"},
    # What the doctor has to ask the driver, and no public name does.
    "_probe": {"_abi", "_ioctl", "_native", "errors"},
    "_rtnetlink": {"_autoconf", "_limits", "_linkdecode", "_linkinfo", "_linktypes", "errors"},
    "_rtnlmonitor": {"_linkdecode", "_linkstate", "_rtnetlink"},
    "_queuebase": {
        "_closing",
        "_fdwatch",
        "_interface",
        "_ioctl",
        "_lookahead",
        "_packetio",
        "_port",
        "_refusals",
        "_sending",
        "_waiting",
        "errors",
    },
    "_sending": {"_interface", "_limits", "_port"},
    "_closing": {"_threads"},
    "_fdwatch": {"_interface", "_sendwatch", "_waiting"},
    "_judging": {
        "_abi",
        "_interface",
        "_ioctl",
        "_packetio",
        "_port",
        "_split",
        "_threads",
        "errors",
    },
    "_lookahead": set(),
    "_port": {"_abi", "_native", "_packetio"},
    "_refusals": {"_port", "errors"},
    "_sendwatch": {"_interface", "_limits", "errors"},
    "_limits": {"errors"},
    "_arguments": set(),
    "_netlink": {"_rtnetlink"},
    "_split": {"_abi", "_native", "_port"},
    "_several": {"_closing", "_flow", "_packetio", "_queuebase", "_waiting", "errors"},
    "_terminal": set(),
    "_threads": {"_limits", "errors"},
    "_units": {"_arguments"},
    "_waiting": set(),
    "capture": {"_packetio", "_pcapformat", "_pcapthread", "_threads"},
    "cli": {"_arguments", "_commands", "_demo", "_doctor", "_dump", "_terminal", "_units"},
    "decode": {"_encode", "_packetio", "errors"},
    "device": {
        "_adopting",
        "_interface",
        "_ioctl",
        "_linktypes",
        "_opening",
        "_options",
        "_packetio",
        "_port",
        "_recording",
        "_several",
        "_split",
        "_threads",
        "_waiting",
        "capture",
        "decode",
        "errors",
        "link",
        "queue",
    },
    "errors": set(),
    "link": {
        "_abi",
        "_interface",
        "_ioctl",
        "_linkevents",
        "_linkinfo",
        "_linktypes",
        "_netlink",
        "_rtnetlink",
        "_threads",
        "errors",
    },
    "networkd": {"_linktypes", "_options", "_packetio"},
    "offload": {"_abi", "_native"},
    "pytest_plugin": {"_isolating", "_threads", "device", "errors", "testing"},
    "queue": {
        "_abi",
        "_judging",
        "_lookahead",
        "_packetio",
        "_queuebase",
        "_refusals",
        "_waiting",
        "errors",
    },
    "reply": {"_linktypes", "offload"},
    "testing": {"_faults", "_isolating", "_memory", "errors"},
    "transport": {"_ioctl", "_options", "device", "errors"},
}
# Foreign packages, and the only modules that may import each.
# (_rtnetlink is link's own part, and _encode is decode's, and nobody else's.)
FOREIGN = {
    "pyroute2": {"link", "_rtnetlink"},
    "dpkt": {"decode", "_encode"},
    "uvloop": {"_demo"},
    "pytest": {"pytest_plugin"},
}
PRINTING = {"__main__", "cli"}


def imports(tree: ast.AST) -> tuple[set[str], set[str]]:
    """Give (our modules, other top-level packages) that a module imports, wherever in it."""
    ours: set[str] = set()
    others: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            module = node.module or ""
            # "from aiotun import reply" imports a module, "from aiotun import Link" does not.
            names = [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1
            names = [f"aiotun.{node.module or alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            if top != "aiotun":
                others.add(top)
            elif rest.partition(".")[0] in {*MODULES, "_speedups"}:
                ours.add(rest.partition(".")[0])
            else:
                ours.add("aiotun")
    return ours, others


@pytest.mark.parametrize("module", sorted(MODULES))
def test_modules_import_only_what_they_may(module: str) -> None:
    assert module in ALLOWED, f"{module} is new: say in ALLOWED what it may import of ours"
    tree = ast.parse(MODULES[module].read_text())
    ours, others = imports(tree)
    assert ours <= ALLOWED[module]
    for package in others & FOREIGN.keys():
        assert module in FOREIGN[package]
    calls = {
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert "print" not in calls or module in PRINTING


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"__main__"}))
def test_modules_say_what_is_theirs(module: str) -> None:
    found = importlib.import_module("aiotun" if module == "__init__" else f"aiotun.{module}")
    assert found.__doc__
    assert len(set(found.__all__)) == len(found.__all__)
    for name in found.__all__:
        assert hasattr(found, name)


def test_all_is_what_is_public() -> None:
    for name in aiotun.__all__:
        getattr(aiotun, name)  # some are loaded only now
    public = {
        name
        for name, value in vars(aiotun).items()
        if not name.startswith("_") and not isinstance(value, type(sys))
    } - {"TYPE_CHECKING"}
    assert public == set(aiotun.__all__) - set(MODULES)


def test_importing_loads_neither_pyroute2_nor_dpkt() -> None:
    code = "import sys, aiotun; print({'pyroute2', 'dpkt', 'uvloop'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
