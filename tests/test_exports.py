"""The public surface, and who may import what (the table of rooms in the design)."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import aiotun

PACKAGE = Path(aiotun.__file__).parent
# "queue", "_queue.waiting", and "__init__", which is aiotun itself. A room's own __init__ holds
# nothing but a docstring.
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
    if path.parent == PACKAGE or path.name != "__init__.py"
}
FOLDERS = {path.parent.name: path for path in PACKAGE.glob("*/__init__.py")}

# The rooms, the lowest first, and the rooms that each may import. `_queue/` belongs to the room of
# `queue`. A room is below all rooms that import it, so the imports have no cycle. Add a new room
# here first: the rooms that it may import are part of its design.
ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "_kernel": {"errors"},
    "_packets": {"_kernel"},
    "runs": {"_packets"},
    "offload": {"_kernel", "_packets"},
    "reply": {"_kernel", "offload"},
    "decode": {"_kernel", "_packets", "errors"},
    "capture": {"_kernel"},
    "namespaces": {"_kernel", "errors"},
    "link": {"_kernel", "errors"},
    # decode and capture: for types only, or imported when used
    "queue": {"_kernel", "_packets", "capture", "decode", "errors"},
    "datagrams": {"_kernel", "_packets", "errors", "queue"},
    "device": {"_kernel", "_packets", "capture", "decode", "errors", "link", "queue"},
    "networkd": {"_kernel", "device", "link"},
    "netstack": {"_kernel", "_packets", "device", "errors", "link", "namespaces", "queue"},
    "transport": {"_kernel", "device", "errors"},
    "testing": {"_kernel", "_packets", "device", "errors", "link", "queue"},
    "__init__": {
        "_packets",
        "capture",
        "datagrams",
        "decode",
        "device",
        "errors",
        "link",
        "namespaces",
        "netstack",
        "networkd",
        "offload",
        "queue",
        "reply",
        "runs",
        "transport",
    },
    "cli": {
        "__init__",
        "_kernel",
        "_packets",
        "capture",
        "errors",
        "namespaces",
        "netstack",
        "reply",
        "testing",
    },
}
# Modules that belong to another room than their name suggests.
ELSEWHERE = {"__main__": "cli", "pytest_plugin": "testing"}

# Other packages, and the only modules that may import each.
FOREIGN = {
    "pyroute2": {"_link.session", "_cli.pyroute2_part"},
    "dpkt": {"decode", "_packets.encode"},
    "uvloop": {"_cli.demo"},
    "pytest": {"pytest_plugin"},
    "fcntl": {"_kernel.ioctl", "_kernel.isolation"},
}
PRINTING = {"__main__", "_cli.main"}
# Rooms of functions of bytes.
PURE = {"_packets", "decode", "offload", "reply", "runs", "networkd"}


def room_of(module: str) -> str:
    first = ELSEWHERE.get(module, module).partition(".")[0]
    return first if first in ROOMS or not first.startswith("_") else first[1:]


def imports(module: str) -> tuple[set[str], set[str]]:
    """Return (our modules, other top-level packages) that a module imports anywhere."""
    ours: set[str] = set()
    others: set[str] = set()
    package = ["aiotun", *module.split(".")[:-1]]
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            origin = ".".join([*base, *(node.module or "").split(".")]).rstrip(".")
            names = [(origin, alias.name) for alias in node.names]
        else:
            continue
        for origin, name in names:
            top, _, inside = origin.partition(".")
            if top != "aiotun":
                others.add(top)
                continue
            # "from .._kernel import abi" imports a module, "from .._kernel.abi import Iff" a name.
            whole = f"{inside}.{name}".strip(".")
            if whole == "_packets._speedups" or inside == "_packets._speedups":
                continue
            ours.add(whole if whole in MODULES else inside or "__init__")
    return ours, others


IMPORTS = {module: imports(module) for module in MODULES}


def test_every_module_has_a_room() -> None:
    assert {room_of(module) for module in MODULES} == set(ROOMS)
    assert {room_of(f"{folder}.x") for folder in FOLDERS} <= set(ROOMS)


def test_rooms_import_only_rooms_below_them() -> None:
    order = list(ROOMS)
    upward = {
        (room, other)
        for room, allowed in ROOMS.items()
        for other in allowed
        if order.index(other) >= order.index(room)
    }
    assert upward == set()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_modules_import_only_what_their_room_may(module: str) -> None:
    ours, others = IMPORTS[module]
    assert ours <= set(MODULES), "it imports a room as a whole"
    room = room_of(module)
    assert {room_of(each) for each in ours} - {room} <= ROOMS[room]
    for package in others & FOREIGN.keys():
        assert module in FOREIGN[package]
    if room in PURE:
        assert "asyncio" not in others


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_nothing_is_allowed_that_is_not_imported(room: str) -> None:
    used = {
        room_of(each)
        for module in MODULES
        if room_of(module) == room
        for each in IMPORTS[module][0]
    }
    assert ROOMS[room] - used == set()


def test_the_parts_of_a_room_do_not_import_its_face() -> None:
    upward = {
        (module, face)
        for module in MODULES
        if "." in module
        for face in IMPORTS[module][0]
        if "." not in face and room_of(face) == room_of(module)
    }
    assert upward == set()


def test_modules_do_not_import_each_other_in_circles() -> None:
    left = {module: set(ours) for module, (ours, _) in IMPORTS.items()}
    # A module that imports none of the rest is in no cycle, nor is one that none of them imports.
    while True:
        imported = set[str]().union(*left.values())
        kept = {
            module: ours & left.keys()
            for module, ours in left.items()
            if ours & left.keys() and module in imported
        }
        if kept == left:
            break
        left = kept
    assert left == {}


@pytest.mark.parametrize("module", sorted(set(MODULES) - PRINTING))
def test_one_module_prints(module: str) -> None:
    calls = {
        node.func.id
        for node in ast.walk(ast.parse(MODULES[module].read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert "print" not in calls


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"__main__"}))
def test_modules_say_what_is_theirs(module: str) -> None:
    found = importlib.import_module("aiotun" if module == "__init__" else f"aiotun.{module}")
    assert found.__doc__
    assert len(set(found.__all__)) == len(found.__all__)
    for name in found.__all__:
        assert hasattr(found, name)


@pytest.mark.parametrize("folder", sorted(FOLDERS))
def test_folders_say_what_they_are_for_and_hold_no_code(folder: str) -> None:
    tree = ast.parse(FOLDERS[folder].read_text())
    assert ast.get_docstring(tree)
    assert len(tree.body) == 1


def test_all_is_what_is_public() -> None:
    for name in aiotun.__all__:
        getattr(aiotun, name)  # some are imported only now
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


# The modules that opening a device needs, beyond those of asyncio. All others, and with them what
# they import, are loaded when they are first used.
NEEDED = {"device", "errors", "link", "queue"}
NEEDED |= {"_device", "_kernel", "_link", "_packets", "_queue"}


def test_importing_loads_only_what_opening_a_device_needs() -> None:
    code = "import sys, asyncio; b = {*sys.modules}; import aiotun; print(*{*sys.modules} - b)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    others = {name for name in loaded if not name.startswith("aiotun")}
    # Some of these are loaded by asyncio itself: the last three before Python 3.14, struct before
    # Python 3.15.
    light = {"__future__", "copy", "dataclasses", "ipaddress", "struct", "_struct"}
    light |= {"array", "typing", "_typing"}
    assert others <= light
    ours = {name.split(".")[1] for name in loaded - others if "." in name}
    assert ours <= NEEDED
    rare = {"aiotun._device.adopting", "aiotun._kernel.rootless", "aiotun._kernel.rtnetlink"}
    assert loaded & rare == set()


@pytest.mark.parametrize("module", ["datagrams", "namespaces", "netstack", "testing"])
def test_modules_need_no_import_of_their_own(module: str) -> None:
    code = f"import aiotun; print(aiotun.{module}.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"aiotun.{module}\n"
