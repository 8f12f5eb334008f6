"""The reference has every public name, and docstrings have their required parts.

`make docs` also checks that Sphinx has found all of them, with their methods.
"""

import importlib
import inspect
import re
from collections.abc import Iterator

import pytest

import aiotun

from .helpers import ROOT

# The modules that users import from.
MODULES = (
    "aiotun",
    "aiotun.capture",
    "aiotun.netstack",
    "aiotun.offload",
    "aiotun.reply",
    "aiotun.runs",
    "aiotun.testing",
)

RAISES = re.compile(r"\braises?\b", re.IGNORECASE)
CANCELLATION = re.compile(r"^\s*\*?Cancellation\*?[:,]", re.MULTILINE)
CONCURRENCY = re.compile(r"^\s*(\*Cancellation\*, )?\*?Concurrency\*?:", re.MULTILINE)


def public() -> Iterator[tuple[str, object]]:
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in module.__all__:
            value = getattr(module, name)
            twice = module_name != "aiotun" and name in aiotun.__all__
            if not inspect.ismodule(value) and not twice:
                yield f"{module_name}.{name}", value


def test_modules_with_public_names_of_their_own() -> None:
    """Every public module is in the list above."""
    modules = {
        f"aiotun.{name}" for name in aiotun.__all__ if inspect.ismodule(getattr(aiotun, name))
    }
    assert modules | {"aiotun", "aiotun.testing"} == set(MODULES)


def test_the_reference_has_every_public_name() -> None:
    described: set[str] = set()
    for page in (ROOT / "docs" / "reference").glob("*.md"):
        module = ""
        for directive, name in re.findall(r"^\.\. (\w+):: (\S+)", page.read_text(), re.MULTILINE):
            if directive == "currentmodule":
                module = name
            elif directive.startswith("auto"):
                described.add(name if name.startswith("aiotun.") else f"{module}.{name}")
    assert {name for name, _ in public()} - described == set()


def test_the_reference_leaves_out_what_queues_have_for_other_modules() -> None:
    page = (ROOT / "docs" / "reference" / "devices.md").read_text()
    found = re.search(r"^.. autoclass:: Queue\n   :exclude-members: (.+)", page, re.MULTILINE)
    assert found
    own = {name for name in dir(aiotun.Queue) if not name.startswith("_")}
    shown = own - set(dir(aiotun.PacketIO)) - set(found[1].split(", "))
    assert shown == {
        "detach",
        "disable",
        "disabled",
        "enable",
        "from_fd",
        "name",
        "offloads",
        "offload",
        "vnet_header_size",
    }


def test_all_examples_are_described() -> None:
    page = (ROOT / "docs" / "examples.md").read_text()
    folder = ROOT / "examples"
    programs = [path.name for path in folder.glob("*.py") if not path.name.startswith("_")]
    programs += [path.parent.name for path in folder.glob("*/__main__.py")]
    assert programs
    assert [name for name in programs if f"`examples/{name}`" not in page] == []


def coroutines() -> Iterator[tuple[str, object, type | None]]:
    """Every public function and method that is awaited, and the class that it belongs to."""
    for name, value in public():
        if inspect.isclass(value):
            for member in dir(value):
                if member.startswith("_"):
                    continue
                inside = inspect.getattr_static(value, member)
                if is_awaited(inside):
                    yield f"{name}.{member}", getattr(value, member), value
        elif is_awaited(value):
            yield name, value, None
    yield "aiotun.open_tun", aiotun.open_tun, None
    yield "aiotun.open_tap", aiotun.open_tap, None
    events = type(aiotun.Link("lo").events())
    yield "Link.events().__anext__", events.__anext__, events
    yield "Link.events().__aenter__", events.__aenter__, events
    yield "Link.events().aclose", events.aclose, events


def is_awaited(value: object) -> bool:
    if inspect.iscoroutinefunction(value):
        return True
    # Some functions return a coroutine, to save a coroutine's frame for each packet.
    annotation = getattr(value, "__annotations__", {}).get("return", "")
    return isinstance(annotation, str) and annotation.startswith("Coroutine[")


def texts(function: object, owner: type | None) -> list[str]:
    """The function's own or inherited docstring, and those of its class and base classes."""
    found = [inspect.getdoc(function) or ""]
    if owner is not None:
        found += [each.__doc__ or "" for each in owner.__mro__ if each is not object]
    return found


COROUTINES = sorted({name: (function, owner) for name, function, owner in coroutines()}.items())


def test_known_coroutines_are_found() -> None:
    names = {name for name, _ in COROUTINES}
    assert {
        "aiotun.Queue.recv",
        "aiotun.Device.send_many",
        "aiotun.Link.up",
        "aiotun.create_bridge",
        "aiotun.create_tun_endpoint",
        "aiotun.capture.PcapWriter.aclose",
        "aiotun.testing.FaultInjector.recv",
    } <= names


@pytest.mark.parametrize(("name", "found"), COROUTINES, ids=[name for name, _ in COROUTINES])
def test_a_coroutine_says_what_it_promises(name: str, found: tuple[object, type | None]) -> None:
    own, *inherited = texts(*found)
    assert own, "it has no docstring"
    assert RAISES.search(own), "what does it raise?"
    everything = "\n".join([own, *inherited])
    assert CANCELLATION.search(everything), "what does cancelling it do?"
    assert CONCURRENCY.search(everything), "may calls overlap?"
